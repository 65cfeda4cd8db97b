"""`fitmatrix fleet collect CONTRACT RECEIPTS...`: what came back, held against what was asked for."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.fleet.next_steps import how_to_resume
from harness.report.terminal import output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from harness.fleet.collect import Amiss, Collected, Finding
    from harness.fleet.contract import Contract

HELP = "Hold receipts against the contract, and write the one result of each case that counts."
INCOMPLETE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("contract", type=Path, metavar="CONTRACT", help="the contract, or its directory")
    parser.add_argument(
        "receipts", type=Path, nargs="+", metavar="RECEIPTS", help="receipts, or directories with results of shards"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="write the results that count to DIR/results.jsonl (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> int:
    """Show what came back and what is amiss. Returns 1 if a case is missing.

    Raises:
        UsageError, OSError: the contract cannot be read, or the results not written.
    """
    from datetime import datetime, timezone

    from harness.core.text import line
    from harness.fleet import collect
    from harness.fleet.contract import read_contract
    from harness.fleet.receipt import find_receipts

    contract = read_contract(given.contract)
    found = collect.collect(contract, find_receipts(given.receipts), datetime.now(timezone.utc))
    place = collect.write_counted(found, given.to) if given.to else None
    if given.json:
        output.print_json(collect.as_plain(found))
    else:
        show_collected(contract, found, place)
        if found.missing and len(given.receipts) == 1 and given.receipts[0].is_dir():
            print(f"\n{line(how_to_resume(given.contract, given.receipts[0]))}")
    return INCOMPLETE if found.missing else 0


def show_collected(contract: Contract, found: Collected, place: Path | None) -> None:
    """Print how many cases of each class have their result, and what is amiss."""
    from harness.core.text import plural
    from harness.report.terminal import tables

    table = tables.table("class", "cases", "counted", "missing")
    for kind in contract.terms.classes:
        keys = [one.key for one in contract.terms.cases if one.machine_class == kind.name]
        counted = sum(key in found.counted for key in keys)
        table.add_row(kind.name, str(len(keys)), str(counted), str(len(keys) - counted))
    tables.show(tables.title(f"contract {contract.digest[:12]} of {contract.terms.made_at}"), table, *_amiss(found.findings))
    if place is not None:
        print(f"\n{plural(len(found.counted), 'result')} in {tables.line(str(place))}")


def _amiss(findings: Sequence[Finding]) -> list[RenderableType]:
    """Make the list of what is amiss: what is said of several in the same words is said once."""
    from harness.core.text import plural
    from harness.report.terminal import tables

    alike: dict[tuple[Amiss, str], list[str]] = defaultdict(list)
    for one in findings:
        alike[one.kind, one.why].append(one.of)
    rows = []
    for (kind, why), several in sorted(alike.items()):
        others = f" and {plural(len(several) - 1, 'other')}" if len(several) > 1 else ""
        rows.append((kind.value, tables.line(f"{several[0]}{others}: {why}")))
    return [tables.facts(rows)] if rows else []
