"""`fitmatrix compare`: compare two sets of results, with an exit status for CI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.errors import UsageError
from harness.core.text import print_note
from harness.report.terminal import output

if TYPE_CHECKING:
    from harness.core.records import Result

COMPARE_SCHEMA = 1
GOT_WORSE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("before", type=Path, metavar="BEFORE", help="results.jsonl, or its directory")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the same, newer")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object")
    shape.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML")
    parser.add_argument("--all", action="store_true", help="also show what did not change")


def run(given: argparse.Namespace) -> int:
    """Compare and print; raises StoreError, UsageError."""
    from harness.report.export import changes
    from harness.results import compare
    from harness.run.options import read_config

    limits = compare.thresholds(read_config(Path.cwd()).get("gate", {}))
    found = compare.compare(_read(given.before), _read(given.after), limits)
    if not any(pair.before and pair.after for pair in found.pairs):
        raise UsageError(f"{given.before} and {given.after} have no case with the same workload in common: nothing to compare")
    if given.junit is not None:
        _write(given.junit, changes.junit(found))
    if given.json:
        said = {"failures": found.failures, "not_judged": found.unjudged, "thresholds": found.limits}
        output.print_json({"schema": COMPARE_SCHEMA, **said, "pairs": found.pairs})
    elif given.markdown:
        print(changes.markdown(found), end="")
    else:
        changes.show_changes(found, given.all)
    return GOT_WORSE if found.failures else 0


def _read(place: Path) -> list[Result]:
    from harness.results import store

    return store.read_telling(store.file_of(place), print_note)


def _write(path: Path, data: bytes) -> None:
    from harness.machine import atomic

    try:
        atomic.write_bytes(path, data)
    except OSError as error:
        raise UsageError(f"--junit {path}: cannot be written: {error.strerror}; choose another place") from None
