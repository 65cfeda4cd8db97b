"""How far a fleet is, from receipts alone: they grow with each case, so nothing of the results is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from enum import Enum
from typing import NamedTuple

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


#: The states in which a shard may still bring something.
UNFINISHED = (State.RUNNING, State.WAITING)


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


class ToHandOut(NamedTuple):
    """The keys of what is missing: to be handed out once more, out of attempts, and still to come from shards that run or wait."""

    again: list[str]
    spent: list[str]
    running: list[str]
    waiting: list[str]


def to_hand_out(contract: Contract, collected: Collected, now: datetime, *, expected: Collection[State] = UNFINISHED) -> ToHandOut:
    """Sort the keys of what is missing by what becomes of them.

    What a shard has still to bring is not handed out again as long as it is in one of the states `expected`. A shard that was
    never heard of is expected until its deadline has passed since it was handed out: it may stand in a queue.
    """
    pending: dict[State, set[str]] = {state: set() for state in UNFINISHED}
    for issued, one in zip(contract.issued, progress(contract, collected.deliveries, now), strict=True):
        late = one.state is State.WAITING and now > parse_utc(issued.at) + timedelta(seconds=issued.deadline_s)
        if one.state in expected and not late:
            pending[one.state] |= set(issued.keys)
    found = ToHandOut([], [], [], [])
    tried = contract.by_key()
    for key in collected.missing:
        if key in pending[State.RUNNING]:
            found.running.append(key)
        elif key in pending[State.WAITING]:
            found.waiting.append(key)
        elif len(tried[key]) < contract.terms.attempts:
            found.again.append(key)
        else:
            found.spent.append(key)
    return found
