"""How far a fleet is, from receipts alone: they grow with each case, so nothing of the results is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import Enum

from harness.core.records import Record
from harness.fleet.collect import Collected, Delivery
from harness.fleet.contract import Contract, Issued, parse_utc


class State(str, Enum):
    """Where a shard is."""

    WAITING = "not heard of"
    RUNNING = "running"
    SILENT = "silent"  # no case takes as long as it has been quiet, or its deadline has passed
    ENDED = "ended"
    STOPPED = "stopped"  # its machine said why


class Progress(Record, frozen=True, kw_only=True):
    """One shard: its state, how many of its cases have a result, and when it was last heard of."""

    shard: str
    attempt: int
    machine: str
    state: State
    done: int
    cases: int
    heard_at: str | None = None
    why: str = ""


def progress(contract: Contract, deliveries: Iterable[Delivery], now: datetime) -> list[Progress]:
    """Return the progress of each shard that was handed out, in their order."""
    heard: dict[str, list[Delivery]] = defaultdict(list)
    for delivery in deliveries:
        heard[delivery.issued.shard].append(delivery)
    return [_of_shard(contract, issued, heard[issued.shard], now) for issued in contract.issued]


def _of_shard(contract: Contract, issued: Issued, deliveries: Iterable[Delivery], now: datetime) -> Progress:
    last = max((one.receipt for one in deliveries), key=lambda receipt: receipt.heard_at, default=None)
    if last is None:
        return Progress(shard=issued.shard, attempt=issued.attempt, machine="", state=State.WAITING, done=0, cases=len(issued.keys))
    quiet = parse_utc(last.heard_at) + timedelta(seconds=contract.terms.case_timeout_s) * 2
    due = parse_utc(last.started_at) + timedelta(seconds=issued.deadline_s)
    ended = State.STOPPED if last.problem else State.ENDED
    state = ended if last.ended_at else State.SILENT if now > min(quiet, due) else State.RUNNING
    return Progress(
        shard=issued.shard,
        attempt=issued.attempt,
        machine=last.machine or last.identity,
        state=state,
        done=len(last.results),
        cases=len(issued.keys),
        heard_at=last.heard_at,
        why=last.problem,
    )


def to_hand_out(
    contract: Contract, collected: Collected, now: datetime, *, nothing_runs: bool = False
) -> tuple[list[str], list[str]]:
    """Return the keys to hand out once more, and those that are missing but have had all their attempts.

    What a running shard has still to bring is neither, unless whoever asks knows that none runs any more.
    """
    running = (
        set()
        if nothing_runs
        else {one.shard for one in progress(contract, collected.deliveries, now) if one.state is State.RUNNING}
    )
    pending = {key for one in contract.issued if one.shard in running for key in one.keys}
    missing = [key for key in collected.missing if key not in pending]
    issued = contract.by_key()
    left = [key for key in missing if len(issued[key]) < contract.terms.attempts]
    return left, [key for key in missing if len(issued[key]) >= contract.terms.attempts]
