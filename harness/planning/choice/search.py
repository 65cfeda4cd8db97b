"""The best ways there are: precision x placement x KV cache x attention, of which those stay that no other is better than.

What counts is speed, the share of the answers that stay right, and the longest context that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS, defaults
from harness.core.records import USUAL_KV, Case, Plan, TierEstimate, Verdict, Workload
from harness.core.units import significant
from harness.planning.device_map.experts import experts_of
from harness.planning.planner import Planner
from harness.planning.quality import quality_kept, quality_to_keep
from harness.planning.verdict import misplaced

# Speeds and contexts that are nearer to each other than this are alike: then the plainer way stays.
SPEED_ALIKE, _CONTEXT_ALIKE = 0.05, 0.1
_FLASH = tuple(row.name for row in ATTENTIONS.values() if row.gpu_only)
_RANKS = (Verdict.FITS, Verdict.TIGHT, Verdict.TOO_BIG)


class Searched(NamedTuple):
    """What a search found: the ways that stay, then of each precision that does not work the plan that comes nearest.

    `contexts` has for each way that stays the most tokens, prompt and answer together, with which it fits.
    """

    plans: list[Plan]
    contexts: dict[str, int]
    best: Plan | None


class _Way(NamedTuple):
    plan: Plan
    speed: float
    quality: float
    context: int

    def is_no_worse(self, other: _Way) -> bool:
        return self.quality >= other.quality and self.speed >= other.speed and self.context >= other.context


def best_way(
    planner: Planner, workload: Workload, choose: Callable[[Sequence[Plan]], Plan | None], least_quality: Callable[[Plan], float]
) -> Plan | None:
    """Return the way that `choose` takes of those that a search plans; what longer contexts ask for only if there is no other.

    `least_quality` is the quality below which nothing is chosen beside a plan: what cannot reach it is not planned.
    """
    if planner.judge.context_refusal(workload):  # of every way
        return None
    usual, least = list[Plan](), 0.0
    for precision in _precisions(planner):
        cases = _cases(planner, workload, precision)
        if cases and _most_quality(planner, cases[0]) >= least:
            planned = [*promising(planner, cases)]
            usual, least = usual + planned, max([least, *map(least_quality, planned)])
    leading = [one for one in _leading(planner, usual) if _most_quality(planner, one.case) >= least]
    found = choose(_good([*usual, *_varied_of(planner, [one for one in leading if _may_gain(planner, one)], least)]))
    found = found or choose(_good(_varied_of(planner, [one for one in leading if _asks_for_longer(planner, one)])))
    return planner.plan(found.case) if found else None


def _most_quality(planner: Planner, case: Case) -> float:
    """Return what the precision of a case keeps with the best KV cache for that."""
    return max(quality_to_keep(replace(case, kv=kv), planner.known_quality) for kv in KV_FORMS)


def search(
    planner: Planner, workload: Workload, least_tok_s: float = 0.0, choose: Callable[[Sequence[Plan]], Plan | None] = lambda _: None
) -> Searched:
    """Plan every precision that can load the model, wherever it can go, with every KV cache that could help; keep the best.

    `least_tok_s` is the speed below which a way is none; the one that `choose` takes of all ways stays in any case.
    """
    usual = _usual(planner, workload)
    leading = _leading(planner, usual)
    sure = [*usual, *_varied_of(planner, [one for one in leading if _may_gain(planner, one)])]  # as in `best_way`
    plans = [*sure, *_varied_of(planner, [one for one in leading if _asks_for_longer(planner, one)])]
    fast = [one for one in _good(plans) if _speed(one) >= least_tok_s]
    best = choose([one for one in _good(sure) if _speed(one) >= least_tok_s]) or choose(fast)
    front = _front(planner, fast, best)
    slow = [_too_slow(one, least_tok_s) for one in _good(plans) if _speed(one) < least_tok_s]
    kept = {one.case: planner.plan(one.case) for one in (*(way.plan for way in front), *([best] if best else ()))}
    failing = [replace(planner.plan(one.case), verdict=one.verdict, why=one.why) for one in _failing([*plans, *slow], fast)]
    contexts = {way.plan.case.id: way.context for way in front}
    return Searched([kept[way.plan.case] for way in front] + failing, contexts, kept[best.case] if best else None)


def _good(plans: Iterable[Plan]) -> list[Plan]:
    return [one for one in plans if one.verdict.is_good and one.estimate is not None]


def _usual(planner: Planner, workload: Workload) -> list[Plan]:
    """Plan every precision wherever it can go, with the usual KV cache and attention."""
    asked = [case for precision in _precisions(planner) for case in _cases(planner, workload, precision)]
    return [planner.plan(case, in_words=False) for case in asked]


def promising(planner: Planner, cases: Iterable[Case]) -> Iterator[Plan]:
    """Plan the cases of one precision that could be the best way: what fits the only GPU gains nothing by leaving it."""
    fits = False
    for case in cases:
        devices = PLACEMENTS[case.placement].devices
        if (fits and "gpu" in devices) or not planner.can_hold(case):
            continue
        one = planner.plan(case, in_words=False)
        fits |= one.verdict is Verdict.FITS and devices == ("gpu",) and len(planner.machine.gpus) == 1
        yield one


def _cases(planner: Planner, workload: Workload, precision: str) -> list[Case]:
    gpus = len(planner.machine.gpus)
    asked = [name for name in distinct(PLACEMENTS, gpus) if not PLACEMENTS[name].lacks_gpus(gpus)]
    asked += [row.name for row in PLACEMENTS.values() if row.experts_in_ram and gpus and experts_of(planner.spec.skeleton)]
    return [Case(model=planner.spec.name, precision=precision, placement=placement, workload=workload) for placement in asked]


def _varied_of(planner: Planner, plans: Iterable[Plan], least_quality: float = 0.0) -> Iterator[Plan]:
    for one in plans:
        yield from _varied(planner, one, least_quality)


def _varied(planner: Planner, one: Plan, least_quality: float) -> Iterator[Plan]:
    """Yield a plan with other attention where that takes less memory, and with every other KV cache that could help either."""
    kinds = [one]
    for name in _FLASH if planner.machine.gpus else ():
        other = planner.plan(replace(one.case, attention=name), in_words=False)
        if other.estimate is not None and _needs(other) < _needs(one):
            yield other
            kinds.append(other)
    for kind in kinds:
        if kind.verdict.is_good or _would_fit(planner, kind):
            others = (replace(kind.case, kv=kv) for kv in KV_FORMS if kv != USUAL_KV)
            enough = (other for other in others if quality_to_keep(other, planner.known_quality) >= least_quality)
            yield from (planner.plan(other, in_words=False) for other in enough)


def _precisions(planner: Planner) -> list[str]:
    """Return what this checkpoint can be loaded in; other forms of it are not there."""
    asked = dict.fromkeys((*defaults(planner.spec.stored_as), *DEFAULT_PRECISIONS, *PRECISIONS))
    return [name for name in asked if planner.spec.stored_as is not None or PRECISIONS[name].requires_checkpoint is None]


def _leading(planner: Planner, usual: Sequence[Plan]) -> list[Plan]:
    """Return the plans that less memory for the cache could make a way, or a longer one: those that no other is as good as."""
    planned = [one for one in usual if one.estimate is not None]
    planned.sort(key=lambda one: (-quality_kept(one), -_speed(one), _RANKS.index(one.verdict) if one.verdict in _RANKS else 9))
    leading: list[Plan] = []
    for one in planned:
        if not any(_is_as_good(other, one) for other in leading):
            leading.append(one)
    return [one for one in leading if planner.can_hold(one.case)]


def _may_gain(planner: Planner, one: Plan) -> bool:
    """Say whether all that another cache or attention could save makes this fit, or brings enough weights back to the GPUs."""
    assert one.estimate is not None
    if one.verdict is not Verdict.FITS:
        return _would_fit(planner, one)
    tiers = one.estimate.tiers
    off = sum(tier.weights_bytes for name, tier in tiers.items() if not name.startswith("gpu")) if planner.machine.gpus else 0
    return _adapts(one) and sum(map(_saved, tiers.values())) > SPEED_ALIKE * off


def _saved(tier: TierEstimate) -> int:
    return tier.kv_bytes + tier.activation_bytes


def _would_fit(planner: Planner, one: Plan) -> bool:
    """Say whether a plan could fit without any cache and activations; a map that adapts brings the room of one tier to another."""
    assert one.estimate is not None
    tiers, precision = one.estimate.tiers, planner.spec.adapted(PRECISIONS[one.case.precision])
    barred, _ = misplaced(precision, PLACEMENTS[one.case.placement], planner.footprints[one.case.id])
    lacking = [sum(tiers[name].weights_bytes for name in barred)]
    lacking += [
        tier.needed_high_bytes - _saved(tier) - tier.capacity_bytes
        for name, tier in tiers.items()
        if tier.capacity_bytes is not None and name not in barred
    ]
    return sum(lacking) <= 0 if _adapts(one) else max(lacking) <= 0


def _asks_for_longer(planner: Planner, one: Plan) -> bool:
    """Say whether another cache or attention would do no more than let a longer context fit, as far as can be told."""
    has_all = one.verdict is Verdict.FITS and planner.holds(one, planner.spec.context_length)
    return not _may_gain(planner, one) and not has_all


def _is_as_good(one: Plan, other: Plan) -> bool:
    """Say whether a plan is as good in quality and speed, in as little of each tier.

    A map that is computed for its case gains by what is saved, so it is only held against those of other precisions.
    """
    if _adapts(other) and one.case.placement != other.case.placement:
        return False
    assert one.estimate is not None
    assert other.estimate is not None
    theirs = other.estimate.tiers
    return (
        quality_kept(one) >= quality_kept(other)
        and _speed(one) >= _speed(other)
        and (one.verdict.is_good or not other.verdict.is_good)
        and all(name in theirs and tier.needed_bytes <= theirs[name].needed_bytes for name, tier in one.estimate.tiers.items())
    )


def _adapts(one: Plan) -> bool:
    row = PLACEMENTS[one.case.placement]
    spills = (
        any(tier.weights_bytes and not name.startswith("gpu") for name, tier in one.estimate.tiers.items())
        if one.estimate
        else False
    )
    return spills and (row.map_is_recommended or row.experts_in_ram)


def _front(planner: Planner, plans: Sequence[Plan], best: Plan | None) -> list[_Way]:
    """Return the ways that no other is as good as in everything, best quality first and the fastest of equals.

    Of what is alike the first stays: the best, then what surely fits, then the plainest. How long a context fits is counted of
    those alone that are not beaten by a way as good in all else.
    """
    order = sorted(
        plans, key=lambda one: (one is not best, one.verdict is not Verdict.FITS, _plainness(one.case), -quality_kept(one))
    )
    front: list[_Way] = []
    for one in order:
        speed, quality = _speed(one), quality_kept(one)
        beaten = [way.context for way in front if way.quality >= quality and way.speed >= speed * (1 - SPEED_ALIKE)]
        if beaten and not planner.holds(one, int(max(beaten) / (1 - _CONTEXT_ALIKE)) + 1):
            continue
        found = _Way(one, speed, quality, planner.max_context(one) or 0)
        front = [other for other in front if other.plan is best or not found.is_no_worse(other)] + [found]
    return sorted(front, key=lambda way: (-way.quality, -way.speed))


def _speed(one: Plan) -> float:
    return one.estimate.decode_tok_s.best if one.estimate else 0.0


def _needs(one: Plan) -> int:
    return sum(tier.needed_bytes for tier in one.estimate.tiers.values()) if one.estimate else 0


def _plainness(case: Case) -> tuple[bool, int, int]:
    return case.attention is not None, [*KV_FORMS].index(case.kv), ("direct", "cpu", "auto", *PLACEMENTS).index(case.placement)


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
