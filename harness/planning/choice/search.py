"""The best ways there are: precision x placement x KV cache, of which those stay that no other is better than in everything.

What counts is speed, the share of the answers that stay right, and the longest context that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from harness.core.attention import KV_FORMS
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS, defaults
from harness.core.records import USUAL_KV, Case, Plan, Verdict, Workload
from harness.core.units import significant
from harness.planning.planner import Planner
from harness.planning.verdict import experts_of

# Speeds and contexts that are nearer to each other than this are alike: then the plainer way stays.
_SPEED_ALIKE, _CONTEXT_ALIKE = 0.05, 0.1


class Searched(NamedTuple):
    """What a search found: the ways that stay, then of each precision that does not work the plan that comes nearest.

    `contexts` has for each way that stays the most tokens, prompt and answer together, with which it fits.
    """

    plans: list[Plan]
    contexts: dict[str, int]


class _Way(NamedTuple):
    plan: Plan
    speed: float
    quality: float
    context: int

    def is_no_worse(self, other: _Way, *, nearly: bool) -> bool:
        """Say whether this is as good as another in everything, or nearly."""
        speed, context = (_SPEED_ALIKE, _CONTEXT_ALIKE) if nearly else (0.0, 0.0)
        return (
            self.quality >= other.quality
            and self.speed >= other.speed * (1 - speed)
            and self.context >= other.context * (1 - context)
        )


def quality_kept(case: Case) -> float:
    """Return the share of the answers that stay right, by the rules of thumb of the tables."""
    return PRECISIONS[case.precision].quality_kept * KV_FORMS[case.kv].quality_kept


def search(planner: Planner, workload: Workload, least_tok_s: float = 0.0) -> Searched:
    """Plan every precision that can load the model, wherever it can go, with every KV cache that could help; keep the best.

    `least_tok_s` is the speed below which a way is none.
    """
    plans = list(_planned(planner, workload))
    good = [one for one in plans if one.verdict.is_good and one.estimate is not None]
    fast = [one for one in good if one.estimate and one.estimate.decode_tok_s.best >= least_tok_s]
    front = _front(planner, fast)
    kept = [way.plan for way in front]
    slow = [_too_slow(one, least_tok_s) for one in good if one not in fast]
    return Searched(kept + _failing([*plans, *slow], fast), {way.plan.case.id: way.context for way in front})


def _planned(planner: Planner, workload: Workload) -> Iterator[Plan]:
    """Yield the plans; a KV cache in another form only where the usual one does not fit or not with the whole context."""
    gpus = len(planner.machine.gpus)
    places = [name for name in distinct(PLACEMENTS, gpus) if not PLACEMENTS[name].lacks_gpus(gpus)]
    places += [row.name for row in PLACEMENTS.values() if row.experts_in_ram and gpus and experts_of(planner.spec.skeleton)]
    for precision in _precisions(planner):
        for placement in places:
            case = Case(model=planner.spec.name, precision=precision, placement=placement, workload=workload)
            usual = planner.plan(case)
            yield usual
            if usual.estimate is None or not planner.can_hold(case):
                continue
            if usual.verdict is Verdict.FITS and planner.max_context(usual) == planner.spec.context_length:
                continue
            yield from (planner.plan(replace(case, kv=kv)) for kv in KV_FORMS if kv != USUAL_KV)


def _precisions(planner: Planner) -> list[str]:
    """Return what this checkpoint can be loaded in; other forms of it are not there."""
    asked = dict.fromkeys((*defaults(planner.spec.stored_as), *DEFAULT_PRECISIONS, *PRECISIONS))
    return [name for name in asked if planner.spec.stored_as is not None or PRECISIONS[name].requires_checkpoint is None]


def _front(planner: Planner, plans: Sequence[Plan]) -> list[_Way]:
    """Return the ways that no other is as good as in everything, best quality first and the fastest of equals."""
    ways = [
        _Way(one, one.estimate.decode_tok_s.best, quality_kept(one.case), planner.max_context(one) or 0)
        for one in plans
        if one.estimate is not None
    ]
    # Of what is alike the first stays: what surely fits, then the plainest.
    ways.sort(key=lambda way: (way.plan.verdict is not Verdict.FITS, _plainness(way.plan.case)))
    front: list[_Way] = []
    for way in ways:
        if not any(other.is_no_worse(way, nearly=True) for other in front):
            front = [other for other in front if not way.is_no_worse(other, nearly=False)] + [way]
    return sorted(front, key=lambda way: (-way.quality, -way.speed))


def _plainness(case: Case) -> tuple[int, int]:
    return [*KV_FORMS].index(case.kv), ("direct", "cpu", "auto", *PLACEMENTS).index(case.placement)


def _too_slow(one: Plan, least_tok_s: float) -> Plan:
    assert one.estimate is not None
    speed = one.estimate.decode_tok_s
    why = f"{significant(speed.best, 2)} tokens/s, and at least {significant(least_tok_s, 2)} are asked for"
    return replace(one, verdict=Verdict.TOO_BIG, why=f"too slow: {why}.")


def _failing(plans: Sequence[Plan], good: Sequence[Plan]) -> list[Plan]:
    """Return of each precision without a good plan what comes nearest: the fastest that is too slow, else what lacks least."""
    there = {one.case.precision for one in good}
    nearest: dict[str, Plan] = {}
    for one in sorted(plans, key=_distance):
        if one.case.precision not in there and not one.verdict.is_good:
            nearest.setdefault(one.case.precision, one)
    return [nearest[name] for name in PRECISIONS if name in nearest]


def _distance(one: Plan) -> tuple[bool, float, float]:
    """Order by what keeps a plan from being a way: memory or speed come before what cannot be, memory by how much is lacking."""
    if one.estimate is None:
        return True, 0.0, 0.0
    lacking = sum(max(0, tier.needed_bytes - (tier.capacity_bytes or 0)) for tier in one.estimate.tiers.values())
    return one.verdict is not Verdict.TOO_BIG, lacking, -one.estimate.decode_tok_s.best
