"""`fitmatrix fleet plan`: a contract over the classes of a fleet file, and a shard file for each machine that shares the work."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from harness.cli.fleet.next_steps import SENT, how_to_collect, how_to_measure
from harness.cli.options import add_options, add_run_options, given_or_default
from harness.cli.plan_args import USAGE
from harness.core.options import OPTION
from harness.core.text import print_note

HELP = "Write the contract of a matrix over a fleet, and a shard file for each part of it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command: all of a run but those that a machine decides for itself."""
    from harness.fleet.shards import CONTRACT_OPTIONS

    add_run_options(parser, *CONTRACT_OPTIONS)
    parser.add_argument(
        "--fleet", type=Path, default=Path("fleet.toml"), metavar="FILE", help="the classes of machines (default fleet.toml)"
    )
    add_options(parser, "fleet", "attempts")
    parser.add_argument("--to", type=Path, default=Path("fleet"), metavar="DIR", help="directory of the contract (default fleet)")


def run(given: argparse.Namespace) -> int:
    """Write contract and shards. Returns 0, or 2 if a class of the fleet file is wrong; the others are planned all the same.

    Raises:
        UsageError, CheckpointError, OSError: nothing can be planned or written, or there is a contract already.
    """
    from harness.core.errors import UsageError
    from harness.core.text import line, plural
    from harness.fleet import shards, terms
    from harness.fleet.contract import CONTRACT
    from harness.fleet.fleet_file import read_fleet

    place = given.to / CONTRACT
    if given.to.is_file():
        raise UsageError(f"--to {given.to} is a file; name a directory")
    if place.exists():
        raise UsageError(f"{place} is there already, and receipts may come for it; name another directory with --to")
    contract = terms.agree(read_fleet(given.fleet), _words(given), given_or_default(given, "fleet", "attempts"))
    contract, cut = shards.issue(contract, [one.key for one in contract.terms.cases])
    files = shards.write_issued(place, contract, cut)
    for shard, path in zip(cut, files, strict=True):
        print(f"{line(str(path))}: {plural(len(shard.cases), 'case')} for {line(shard.machine_class.name)}")
    print(f"contract: {line(str(place))} ({plural(len(contract.terms.cases), 'case')}, {contract.digest[:12]})")
    if files:
        print(f"\n{line(how_to_measure(files))}\n{line(how_to_collect(given.to, SENT))}")
    for name, why in contract.terms.faults.items():
        print_note(f"{given.fleet}: class {name}: {why}")
    return USAGE if contract.terms.faults else 0


def _words(given: argparse.Namespace) -> dict[str, str | list[str] | bool]:
    """Return the options of the run as they were typed, for every machine to read again."""
    from harness.fleet.shards import CONTRACT_OPTIONS

    words: dict[str, str | list[str] | bool] = {}
    for name, typed in getattr(given, "typed", ()):
        if name not in CONTRACT_OPTIONS:
            continue
        _, *value = shlex.split(typed)
        if OPTION[name].switch:
            words[name] = True
        elif OPTION[name].repeat:
            earlier = words.get(name, [])
            words[name] = [*(earlier if isinstance(earlier, list) else []), *value]
        else:
            words[name] = value[0]
    return words
