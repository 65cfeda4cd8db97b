"""The ways of loading a model that a person chooses between: equal rows are one, what is better in nothing has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import le, lt
from typing import NamedTuple

from harness.core.records import Plan, Verdict
from harness.planning.cost.speed import IN_CACHE, ON_DISK
from harness.planning.quality import quality_kept

Cells = tuple[str, ...]
# What differs by less is the same to a person, and to the estimate by far.
_ALIKE = 0.01
_NAMED = 2


class Way(NamedTuple):
    """Plans whose rows show the same; `one` stands for them."""

    precisions: tuple[str, ...]
    placements: tuple[str, ...]
    one: Plan

    @property
    def where(self) -> str:
        """The placements; of what is too big wherever it goes, the one that needs least and how many more."""
        if self.one.verdict is not Verdict.TOO_BIG or len(self.placements) <= _NAMED:
            return ", ".join(self.placements)
        return f"{self.placements[0]}, {len(self.placements) - 1} more"


def would_work(one: Plan) -> bool:
    """Say whether a case works here, as the model is stored or, where it is not, in the form that its precision reads."""
    return one.verdict.is_good or (one.needs_checkpoint is not None and one.verdict is Verdict.UNAVAILABLE)


def ways(plans: Sequence[Plan], best: Plan | None, reason: str, cells: Callable[[Plan], Cells]) -> list[Way]:
    """Return the ways that differ in what `cells` shows of them; of what is too big, one way a precision: what needs least.

    What the `reason` compares the best with is among them.
    """
    shown: dict[tuple[str, Cells], list[Plan]] = {}
    for one in _worth_a_row(plans, reason):
        is_too_big = one.verdict is Verdict.TOO_BIG
        shown.setdefault((one.case.precision, () if is_too_big else cells(one)), []).append(one)
    joined: dict[tuple[Cells, Cells], list[tuple[str, Plan]]] = {}
    for (precision, _), alike in shown.items():
        first = best if best in alike else min(alike, key=_needed) if alike[0].verdict is Verdict.TOO_BIG else alike[0]
        assert first is not None
        placements = tuple(dict.fromkeys((first.case.place, *(one.case.place for one in alike))))
        joined.setdefault((placements, cells(first)), []).append((precision, first))
    return [Way(tuple(name for name, _ in same), places, same[0][1]) for (places, _), same in joined.items()]


def _worth_a_row(plans: Sequence[Plan], reason: str) -> list[Plan]:
    """Leave out what cannot work here in any form, and what is better than another way in nothing."""
    planned = [one for one in plans if one.estimate is not None]
    good = [one for one in planned if one.verdict.is_good]
    tiers = sorted({name for one in good if one.estimate for name in one.estimate.tiers})
    weighed = [_weighed(one, tiers) for one in good]
    kept = [one for one, own in zip(good, weighed, strict=True) if _name(one) in reason or not _is_beaten(own, weighed)]
    hidden = {one.case.precision for one in good} - {one.case.precision for one in kept}
    too_big = [one for one in planned if one.verdict is Verdict.TOO_BIG and one.case.precision not in hidden]
    return [one for one in planned if one in kept or one in too_big or (would_work(one) and one.needs_checkpoint)]


def _name(one: Plan) -> str:
    return one.case.way


def _is_beaten(own: Sequence[float], weighed: Iterable[Sequence[float]]) -> bool:
    """Say whether any is as good in everything that a person weighs, and better in something; less is better in all of it."""
    alike, less = [weight * (1 + _ALIKE) for weight in own], [weight * (1 - _ALIKE) for weight in own]
    return any(all(map(le, others, alike)) and any(map(lt, others, less)) for others in weighed)


def _weighed(one: Plan, tiers: Iterable[str]) -> tuple[float, ...]:
    assert one.estimate is not None
    expected, ready = one.estimate, one.estimate.ready_s
    return (
        1.0 if one.verdict is Verdict.FITS else 2.0,
        2 - quality_kept(one),
        ready[ON_DISK].best,
        ready.get(IN_CACHE, ready[ON_DISK]).best,
        1 / expected.decode_tok_s.best,
        *(float(expected.tiers[name].needed_bytes) if name in expected.tiers else 0.0 for name in tiers),
    )


def _needed(one: Plan) -> tuple[bool, int]:
    """Order what is too big by what it needs; last what no memory would help, which a library refuses."""
    tiers = one.estimate.tiers.values() if one.estimate else ()
    overflows = any(tier.needed_high_bytes > tier.capacity_bytes for tier in tiers if tier.capacity_bytes is not None)
    return not overflows, sum(tier.needed_bytes for tier in tiers)
