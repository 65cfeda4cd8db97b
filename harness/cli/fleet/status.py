"""`fitmatrix fleet status CONTRACT DIR`: how far each shard is, by the receipts below a directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.report.terminal import output

HELP = "Show how far each shard is: its state, its cases with a result, when it was last heard of."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("contract", type=Path, metavar="CONTRACT", help="the contract, or its directory")
    parser.add_argument("results", type=Path, metavar="DIR", help="where the shards' directories of results lie")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> int:
    """Show the shards. Raises UsageError, OSError: the contract cannot be read, or there is no such directory."""
    from datetime import datetime, timezone

    from harness.core.text import plural
    from harness.fleet import status
    from harness.fleet.collect import hear
    from harness.fleet.contract import CONTRACT_SCHEMA, read_contract
    from harness.fleet.receipt import find_receipts
    from harness.report.terminal import tables

    contract = read_contract(given.contract)
    heard, strange = hear(contract, find_receipts([given.results]))
    found = status.progress(contract, heard, datetime.now(timezone.utc))
    if given.json:
        output.print_json({"schema": CONTRACT_SCHEMA, "contract": contract.digest, "shards": found, "strange": strange})
        return 0
    table = tables.table("shard", "state", "machine", "done", "last heard of", left=3)
    for one in found:
        table.add_row(one.shard, one.state.value, one.machine, f"{one.done} of {one.cases}", one.heard_at or "")
    why = [tables.said(f"{one.shard}: {one.why}") for one in found if one.why]
    why += [tables.said(f"{one.of}: {one.why}") for one in strange]
    tables.show(tables.title(f"{plural(len(found), 'shard')} of contract {contract.digest[:12]}"), table, *why)
    return 0
