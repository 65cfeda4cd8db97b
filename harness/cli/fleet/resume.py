"""`fitmatrix fleet resume CONTRACT DIR`: hand out once more what is missing, as long as the contract allows attempts."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.fleet.next_steps import how_to_measure
from harness.core.text import print_note

HELP = "Write shard files with what is missing, and enter them in the contract as the next attempt."
NOTHING_LEFT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("contract", type=Path, metavar="CONTRACT", help="the contract, or its directory")
    parser.add_argument("results", type=Path, metavar="DIR", help="where the shards' directories of results lie")


def run(given: argparse.Namespace) -> int:
    """Write the shards. Returns 1 if a case is missing that has had all its attempts.

    Raises:
        UsageError, OSError: the contract cannot be read or written, or there is no such directory.
    """
    from datetime import datetime, timezone

    from harness.core.text import line, plural
    from harness.fleet import shards, status
    from harness.fleet.collect import collect
    from harness.fleet.contract import CONTRACT, read_contract
    from harness.fleet.receipt import find_receipts

    contract, now = read_contract(given.contract), datetime.now(timezone.utc)
    found = collect(contract, find_receipts([given.results]), now)
    keys, spent = status.to_hand_out(contract, found, now)
    place = given.contract / CONTRACT if given.contract.is_dir() else given.contract
    contract, cut = shards.issue(contract, keys)
    files = shards.write_issued(place, contract, cut)
    for shard, path in zip(cut, files, strict=True):
        print(
            f"{line(str(path))}: {plural(len(shard.cases), 'case')} for {line(shard.machine_class.name)}, attempt {shard.attempt}"
        )
    running = len(found.missing) - len(keys) - len(spent)
    if not found.missing:
        print("nothing is missing: every case has a result that counts")
        return 0
    print(f"{plural(len(keys), 'case')} handed out again, {running} still to come from shards that run")
    if files:
        print(f"\n{line(how_to_measure(files))}")
    for key in spent:
        print_note(f"{key}: given up after {plural(contract.terms.attempts, 'attempt')}")
    return NOTHING_LEFT if spent else 0
