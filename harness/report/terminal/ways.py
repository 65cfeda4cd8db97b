"""The ways of loading a model that a person chooses between: equal rows are one, what is better in nothing has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from harness.core.records import Plan, Verdict
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
    """Leave out what cannot work here, and what is better than another way in nothing."""
    planned = [one for one in plans if one.estimate is not None]
    good = [one for one in planned if one.verdict.is_good]
    kept = [one for one in good if _name(one) in reason or not any(_is_better(other, one) for other in good)]
    hidden = {one.case.precision for one in good} - {one.case.precision for one in kept}
    too_big = [one for one in planned if one.verdict is Verdict.TOO_BIG and one.case.precision not in hidden]
    return [one for one in planned if one in kept or one in too_big]


def _name(one: Plan) -> str:
    return one.case.way


def _is_better(one: Plan, other: Plan) -> bool:
    """Say whether `one` is as good in everything that a person weighs, and better in something; less is better in all of it."""
    pairs = list(zip(_weighed(one, other), _weighed(other, one), strict=True))
    return all(ours <= theirs * (1 + _ALIKE) for ours, theirs in pairs) and any(
        ours < theirs * (1 - _ALIKE) for ours, theirs in pairs
    )


def _weighed(one: Plan, other: Plan) -> Iterable[float]:
    assert one.estimate is not None
    assert other.estimate is not None
    yield 1.0 if one.verdict is Verdict.FITS else 2.0
    yield 2 - quality_kept(one)
    yield one.estimate.load_s.best + one.estimate.first_token_s.best
    yield 1 / one.estimate.decode_tok_s.best
    for name in sorted({*one.estimate.tiers, *other.estimate.tiers}):
        yield float(one.estimate.tiers[name].needed_bytes) if name in one.estimate.tiers else 0.0


def _needed(one: Plan) -> tuple[bool, int]:
    """Order what is too big by what it needs; last what no memory would help, which a library refuses."""
    tiers = one.estimate.tiers.values() if one.estimate else ()
    overflows = any(tier.needed_high_bytes > tier.capacity_bytes for tier in tiers if tier.capacity_bytes is not None)
    return not overflows, sum(tier.needed_bytes for tier in tiers)
