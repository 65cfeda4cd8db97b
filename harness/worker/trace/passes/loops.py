"""Loops over chunks of a prompt: their events cut to two rounds, whatever the number that ran.

A linear attention in plain torch walks over its chunks in Python, so that longer prompts run more operators. What a round makes is
as large as what the round before it made, and is gone once the round after it is done; then two rounds hold as much as all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from harness.worker.trace.workload import Trace

ROUNDS_KEPT = 2  # rounds
LEAST_ROUNDS = 3  # fewer are no loop


class Loop(NamedTuple):
    """Rounds of `period` events each, `rounds` of them from event `start` on."""

    start: int
    period: int
    rounds: int


def cut_loops(trace: Trace) -> Trace:
    """Leave out all but the first and the last round of every loop of a trace.

    What the last round frees of the round before it, it then frees of the first.
    """
    events: list[int] = []
    passes: list[int] = []
    stands: dict[int, int] = {}  # an allocation that is left out, and the one of the first round that stands for it
    for start, end in pairwise([*trace.passes, len(trace.events)]):
        passes.append(len(events))
        at = start
        for loop in _loops(trace, start, end):
            events += _renamed(trace.events[at : loop.start + loop.period], stands)
            last = loop.start + (loop.rounds - 1) * loop.period
            first = trace.events[loop.start : loop.start + loop.period]
            before = trace.events[last - loop.period : last]
            stands |= {gone: kept for kept, gone in zip(first, before, strict=True) if kept >= 0}
            at = last
        events += _renamed(trace.events[at:end], stands)
    cached = [[tuple(stands.get(number, number) for number in layer) for layer in layers] for layers in trace.cached]
    return trace._replace(events=events, passes=passes, cached=cached)


def _renamed(events: Sequence[int], stands: dict[int, int]) -> Iterator[int]:
    return (stands.get(event, event) if event >= 0 else ~stands.get(~event, ~event) for event in events)


def _loops(trace: Trace, start: int, end: int) -> Iterator[Loop]:
    """Yield the loops between two events, in their order."""
    tokens = _tokens(trace, start, end)
    seen: dict[object, int] = {}
    at, size = 0, end - start
    while at < size:
        period = at - seen.get(tokens[at], at)
        seen[tokens[at]] = at
        at += 1
        if not period:
            continue
        begin, stop = at - 1 - period, at
        while stop < size and tokens[stop] == tokens[stop - period]:
            stop += 1
        found = Loop(start + begin, period, (stop - begin) // period)
        if found.rounds < LEAST_ROUNDS:
            continue
        if _frees_itself(trace, found):
            yield found
        at = begin + found.rounds * period
        seen.clear()


def _tokens(trace: Trace, start: int, end: int) -> list[object]:
    """Return what each event is, however far along: what is made, or how many events ago that was made which is gone."""
    made = {event: number for number, event in enumerate(trace.events[:end]) if event >= 0}
    return [
        trace.allocations[event]
        if event >= 0
        else number - made[~event]
        for number, event in enumerate(trace.events[start:end], start)
    ]  # fmt: skip


def _frees_itself(trace: Trace, loop: Loop) -> bool:
    """Say whether all that the rounds before the last two make is gone when the last is done."""
    end = loop.start + loop.rounds * loop.period
    early = trace.events[loop.start : end - ROUNDS_KEPT * loop.period]
    gone = {~event for event in trace.events[loop.start : end] if event < 0}
    return all(event in gone for event in early if event >= 0)
