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
    parser.add_argument(
        "--wait", action="store_true", help="leave out what shards have that were not heard of yet, until they are due"
    )


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
    left = status.to_hand_out(contract, found, now, expected=status.UNFINISHED if given.wait else (status.State.RUNNING,))
    early = set(left.again).intersection(status.to_hand_out(contract, found, now).waiting)
    place = given.contract / CONTRACT if given.contract.is_dir() else given.contract
    contract, cut = shards.issue(contract, left.again)
    files = shards.write_issued(place, contract, cut)
    for shard, path in zip(cut, files, strict=True):
        print(
            f"{line(str(path))}: {plural(len(shard.cases), 'case')} for {line(shard.machine_class.name)}, attempt {shard.attempt}"
        )
    if not found.missing:
        print("nothing is missing: every case has a result that counts")
        return 0
    waiting = f", {len(left.waiting)} from shards that were not heard of yet" if left.waiting else ""
    print(f"{plural(len(left.again), 'case')} handed out again, {len(left.running)} still to come from shards that run{waiting}")
    if files:
        print(f"\n{line(how_to_measure(files))}")
    if early:
        what = f"{len(early)} of them {'was' if len(early) == 1 else 'were'} handed out before to shards that are not due yet"
        print_note(f"{what} and were not heard of; --wait leaves such cases to them")
    for key in left.spent:
        print_note(f"{key}: given up after {plural(contract.terms.attempts, 'attempt')}")
    return NOTHING_LEFT if left.spent else 0
