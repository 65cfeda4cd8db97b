"""`fitmatrix fleet run CONTRACT [--ray ADDRESS]`: measure the shards of a contract over a cluster of Ray, live."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.fleet.case_files import add_case_files, read_case_files
from harness.cli.fleet.collect import INCOMPLETE, show_collected
from harness.core.text import print_note

if TYPE_CHECKING:
    from harness.fleet.ray_engine.driver import Tell

HELP = "Measure the shards of a contract over a cluster of Ray, and go on where an earlier run stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("contract", type=Path, metavar="CONTRACT", help="the contract, or its directory")
    parser.add_argument("--ray", metavar="ADDRESS", help="address of the cluster, or auto (default: one of this machine alone)")
    parser.add_argument("--without-token", action="store_true", help="use a cluster that lets in whoever reaches its ports")
    add_case_files(parser)
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="for what machines send (default: results, beside the contract)",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="write the results that count to DIR/results.jsonl (default: none)")


def run(given: argparse.Namespace) -> int:
    """Measure, show what came back, and return 1 if a case is missing, 130 after Ctrl-C.

    Raises:
        UsageError, OSError: contract, cluster or test files are not as they must be; nothing was measured.
    """
    from harness.fleet.collect import write_counted
    from harness.fleet.ray_engine import cluster
    from harness.fleet.ray_engine.driver import Driver
    from harness.machine import signals

    folder, status = given.contract if given.contract.is_dir() else given.contract.parent, 0
    with _progress() as tell:
        driver = Driver(given.contract, given.results or folder / "results", tell)
        files = read_case_files(given.cases)
        try:
            with cluster.cluster_at(given.ray, without_token=given.without_token):
                driver.run(files)
        except KeyboardInterrupt as stop:
            signals.say_stopped("what came is kept, and the same command goes on with the rest")
            status = signals.exit_status(stop)
    found = driver.collected()
    show_collected(driver.contract, found, write_counted(found, given.to) if given.to else None)
    for note in driver.notes:
        print_note(note)
    return status or (INCOMPLETE if found.missing else 0)


@contextmanager
def _progress() -> Iterator[Tell]:
    """Show a bar for each machine on a terminal; elsewhere a line each time it begins something."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    text = TextColumn("{task.description}", markup=False)
    bars = Progress(text, BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    tasks: dict[str, TaskID] = {}
    doing: dict[str, str] = {}

    def tell(machine: str, what: str, done: int, cases: int) -> None:
        if doing.get(machine) != what and not console.is_terminal:
            print(f"{machine}: {what}", file=console.file, flush=True)
        doing[machine] = what
        if machine not in tasks:
            tasks[machine] = bars.add_task("")
        bars.update(tasks[machine], description=f"{machine}: {what}", completed=done, total=cases)

    if not console.is_terminal:
        yield tell
        return
    with bars:
        yield tell
