"""`fitmatrix fleet emit slurm|github CONTRACT`: job files for engines that exist, from the shards of a contract."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from harness.cli.fleet.next_steps import how_to_collect

HELP = "Write job files for the shards: an sbatch array for each class, or a workflow for GitHub's runners."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("engine", choices=("slurm", "github"), metavar="slurm|github", help="what runs the shards")
    parser.add_argument("contract", type=Path, metavar="CONTRACT", help="the contract, or its directory, as seen from the jobs")
    parser.add_argument(
        "--to", type=Path, default=Path(), metavar="DIR", help="directory for the files (default: this one, .github/workflows)"
    )


def run(given: argparse.Namespace) -> int:
    """Write the files and print their paths. Raises UsageError, OSError: the contract is not for this engine."""
    import platform

    from harness.core.text import line
    from harness.fleet import job_files
    from harness.fleet.contract import read_contract
    from harness.machine import atomic

    contract = read_contract(given.contract)
    folder = given.contract if given.contract.is_dir() else given.contract.parent
    if given.engine == "github":
        python = ".".join(platform.python_version_tuple()[:2])
        files = {".github/workflows/fleet.yml": job_files.github(contract, folder, python)}
    else:
        files = dict(job_files.slurm(contract, kind.name, folder) for kind in contract.terms.classes)
    for name, text in files.items():
        atomic.write_text(given.to / name, text)
        print(line(str(given.to / name)))
    paths = [str(given.to / name) for name in files]
    if given.engine == "github":
        print()
        print(line(f"Commit it with {folder}/, then:  gh workflow run {Path(paths[0]).name}"))
    else:
        print()
        print(line(f"To submit:  {' && '.join(shlex.join(['sbatch', path]) for path in paths)}"))
        print(line(how_to_collect(folder, folder / "results")))
    return 0
