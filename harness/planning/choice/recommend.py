"""Which way of loading is best, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from harness.architecture.model_spec import ModelSpec
from harness.catalog.resolve import Source
from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.methods.packages import quoted
from harness.core.metrics import UNNOTICED
from harness.core.placements import PLACEMENTS, plainness
from harness.core.precisions import PRECISIONS
from harness.core.records import USUAL_KV, Case, Plan, Record, Verdict, Workload
from harness.core.text import plural
from harness.core.units import format_seconds, significant
from harness.planning.choice.nearest import SLOW_TOK_S, faster_way, nearest_way
from harness.planning.choice.search import SPEED_ALIKE, best_way, search
from harness.planning.other_form import left_wide
from harness.planning.planner import Planner
from harness.planning.quality import quality_kept

# At this speed half of what speed can give is reached: more helps less and less beyond the speed of reading.
_HALF_TOK_S = 3.0
_PLACES = 4  # to which worth is rounded
_NAMED = 4  # as many ways as are named of those that need the same packages
_SLOWER = 1.2  # what is slower than that surprises, where it has fewer bits


def choose_best(plans: Iterable[Plan]) -> tuple[Plan, str] | None:
    """Return the best way to load and why: what surely fits, then speed weighed with quality; None if nothing fits."""
    fitting = _surest(plans)
    if not fitting:
        return None
    best = _usual_alike(_simplest_alike(_smallest_alike(max(fitting, key=worth), fitting), fitting), fitting)
    return best, _reason(best, fitting)


def _surest(plans: Iterable[Plan]) -> list[Plan]:
    """Return the plans that surely fit; where none does, those that may."""
    good = [one for one in plans if one.verdict.is_good]
    return [one for one in good if one.verdict is Verdict.FITS] or good


def _simplest_alike(best: Plan, fitting: Iterable[Plan]) -> Plan:
    """Return the simplest placement of the same weights that is as fast, or as good as.

    Simpler is what keeps them in fewer of the same tiers, or in those by a plainer call; and what computes is the same. What does
    without a tier is preferred wherever neither speed is outside the doubt of the other.
    """
    held = _tiers(best)
    alike = [
        one
        for one in fitting
        if one.case.precision == best.case.precision
        and _tiers(one) <= held
        and any(tier.startswith("gpu") for tier in _tiers(one)) == any(tier.startswith("gpu") for tier in held)
        and (_speed(one) >= (1 - SPEED_ALIKE) * _speed(best) or (_tiers(one) < held and _is_as_fast(one, best)))
    ]
    return min(alike, key=lambda one: (len(_tiers(one)), _order(one)), default=best)


def _tiers(one: Plan) -> set[str]:
    """Return the tiers that hold weights."""
    return {name for name, tier in one.estimate.tiers.items() if tier.weights_bytes} if one.estimate else set()


def _is_as_fast(one: Plan, other: Plan) -> bool:
    """Say whether each speed lies in the interval of the other: then nobody knows which is faster."""
    if one.estimate is None or other.estimate is None:
        return False
    first, second = one.estimate.decode_tok_s, other.estimate.decode_tok_s
    return first.best >= second.low and second.best <= first.high


def _smallest_alike(best: Plan, fitting: Iterable[Plan]) -> Plan:
    """Return what keeps more quality in fewer bits where `best` is faster inside its doubt; or as much, nearly as fast.

    As many bits that keep more are nearly as fast, too, or give the whole answer no later: bfloat16 before float16
    where the prompt, which many processors compute far slower in float16, costs more than faster tokens save.
    """
    assert best.estimate is not None
    bits, kept = _bits(best), quality_kept(best)
    alike = [
        one
        for one in fitting
        if one.estimate is not None
        and one.case.placement == best.case.placement
        and (_bits(one), -quality_kept(one)) < (bits, -kept)
        and (
            _speed(one) >= (1 - UNNOTICED) * _speed(best)
            or (_bits(one) < bits and _keeps_more_in_doubt(one, best))
            or _answer_s(one) <= _answer_s(best)
        )
        and quality_kept(one) >= kept
    ]
    return max(alike, key=worth, default=best)


def _keeps_more_in_doubt(one: Plan, other: Plan) -> bool:
    assert other.estimate is not None
    return quality_kept(one) > quality_kept(other) and _speed(one) >= other.estimate.decode_tok_s.low


def _answer_s(one: Plan) -> float:
    """Return the seconds from the prompt to the last token of the answer."""
    assert one.estimate is not None
    workload = one.case.workload
    return one.estimate.first_token_s.best + workload.batch * (workload.new_tokens - 1) / one.estimate.decode_tok_s.best


def _usual_alike(best: Plan, fitting: Iterable[Plan]) -> Plan:
    """Return the usual precision that keeps as much quality the same way and is as fast: the one that most people have."""
    alike = [
        one
        for one in fitting
        if PRECISIONS[one.case.precision].default
        and (one.case.placement, one.case.kv, one.case.attention) == (best.case.placement, best.case.kv, best.case.attention)
        and quality_kept(one) == quality_kept(best)
        and _speed(one) >= (1 - SPEED_ALIKE) * _speed(best)
    ]
    return best if PRECISIONS[best.case.precision].default else max(alike, key=worth, default=best)


class Recommendation(Record, frozen=True, kw_only=True):
    """The plans of one model, which of them is best, and why."""

    source: Source
    planner: Planner
    plans: list[Plan]
    best: Plan | None
    reason: str
    nearest: str | None = None  #: where nothing fits, what comes closest
    faster: str | None = None  #: where what fits is slow, what would not be
    is_found: bool = False  #: whether the best is none of the cases that were asked about, but was searched for
    contexts: Mapping[str, int] = {}  #: of a search, by case: the most tokens with which each way that stays fits

    @property
    def spec(self) -> ModelSpec:
        return self.planner.spec

    @property
    def workload(self) -> Workload:
        """What the plans are for: what was asked for, with the tokens of its images."""
        return self.plans[0].case.workload

    @property
    def longest(self) -> Mapping[str, int]:
        """By case the most tokens with which it fits: of a search, and where several KV caches are compared; else empty."""
        if self.contexts or len({one.case.kv for one in self.plans}) < 2:
            return self.contexts
        return {one.case.id: self.planner.max_context(one) or 0 for one in self.plans if one.verdict.is_good}

    @property
    def notes(self) -> list[str]:
        """What is odd about the model, what plans need on a machine that is only described, and what experts do to precisions."""
        wide = left_wide(self.spec, (one.case.precision for one in self.plans))
        asked: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for one in self.plans:
            if one.needs and not self.planner.here:
                asked[tuple(one.needs)].add(_named(one.case))
        needs = [
            f"{', '.join(sorted(who)) if len(who) <= _NAMED else self.spec.name} needs pip install {quoted(what)}"
            for what, who in asked.items()
        ]
        return [*self.spec.notes, *needs, *filter(None, [self.faster, wide]), *self._slower()]

    def _slower(self) -> list[str]:
        """Say of the precision in the fewest bits that it is slower than a wider one where both go the way of the best, and why."""
        best = self.best
        alike = [one for one in self.plans if best and one.verdict.is_good and one.case.place == best.case.place and one.estimate]
        for one in sorted(alike, key=lambda one: PRECISIONS[one.case.precision].bits):
            wider = [other for other in alike if PRECISIONS[other.case.precision].bits > PRECISIONS[one.case.precision].bits]
            other = max(wider, key=_speed, default=one)
            if _speed(other) > _SLOWER * _speed(one):
                times = significant(_speed(other) / _speed(one), 2)
                names = f"{one.case.way} is {times} times slower than {other.case.way}"
                return [f"{names}: {one.estimate.bound_by}." if one.estimate else names]
        return []


def advise(source: Source, planner: Planner, cases: Sequence[Case]) -> Recommendation:
    """Plan the cases of one model and choose the best."""
    plans = planner.plans(cases)
    best, reason = choose_best(plans) or (None, "nothing fits")
    return _advised(source, planner, plans, best, reason)


def advise_usual(source: Source, planner: Planner, cases: Sequence[Case]) -> Recommendation:
    """Plan the usual cases of one model, and beside them the best way that a search finds."""
    plans = planner.plans(cases)
    found = best_way(planner, cases[0].workload, _best_of, least_quality)
    if found is None:
        return _advised(source, planner, plans, None, "nothing fits")
    is_found = found.case not in cases
    plans += [found] * is_found
    best = next(one for one in plans if one.case == found.case)
    reason = _reason(best, _surest(plans))
    return replace(_advised(source, planner, plans, best, reason), is_found=is_found)


def advise_best(source: Source, planner: Planner, workload: Workload, least_tok_s: float = 0.0) -> Recommendation:
    """Search for the ways that no other is better than in everything, and choose the best of them."""
    found = search(planner, workload, least_tok_s, _best_of)
    best = found.best
    reason = _reason(best, _surest(found.plans)) if best else "nothing fits"
    return replace(_advised(source, planner, found.plans, best, reason), contexts=found.contexts)


def _advised(source: Source, planner: Planner, plans: list[Plan], best: Plan | None, reason: str) -> Recommendation:
    """Put a recommendation together, with what comes nearest where there is no best way or a slow one."""
    nearest = nearest_way(planner, plans, choose_best) if best is None else None
    faster = faster_way(planner, best, choose_best) if best is not None else None
    return Recommendation(source=source, planner=planner, plans=plans, best=best, reason=reason, nearest=nearest, faster=faster)


def _best_of(plans: Sequence[Plan]) -> Plan | None:
    chosen = choose_best(plans)
    return chosen[0] if chosen else None


def least_quality(one: Plan) -> float:
    """Return the quality below which nothing is chosen beside a plan that surely fits: what it is worth, for speed adds nothing."""
    return worth(one)[0] - 0.5 * 10**-_PLACES if one.verdict is Verdict.FITS else 0.0


def _named(case: Case) -> str:
    """Name what of a case takes packages."""
    kv = [f"KV {case.kv}"] if KV_FORMS[case.kv].needs else []
    attention = [case.attention] if case.attention and ATTENTIONS[case.attention].needs else []
    return " with ".join(
        [*([case.precision] if PRECISIONS[case.precision].needs or not (kv or attention) else []), *kv, *attention]
    )


def _bits(one: Plan) -> float:
    return PRECISIONS[one.case.precision].bits


def _speed(one: Plan) -> float:
    return one.estimate.decode_tok_s.best if one.estimate else 0.0


def worth(one: Plan) -> tuple[float, int]:
    """Weigh speed with quality, then the plainness of the call; of plans with figures alone."""
    assert one.estimate is not None
    speed = one.estimate.decode_tok_s.best
    return round(quality_kept(one) * speed / (speed + _HALF_TOK_S), _PLACES), -_order(one)


def _order(one: Plan) -> int:
    """Return the place of a plan among those that do the same: the plainest call comes first."""
    plain = 0 if one.case.kv == USUAL_KV and one.case.attention is None else len(PLACEMENTS)
    return plain + plainness(one.case.placement)


def _reason(best: Plan, fitting: Sequence[Plan]) -> str:
    assert best.estimate is not None
    short = f". {best.why}" if PLACEMENTS[best.case.placement].map_is_recommended and best.why else ""
    return f"{_merit(best, fitting)}{_slowness(best)}{short}"


def _slowness(best: Plan) -> str:
    """Say of a way that nobody would wait for how long its answers take; empty of what is fast enough."""
    assert best.estimate is not None
    speed, workload = best.estimate.decode_tok_s.best, best.case.workload
    if speed >= SLOW_TOK_S:
        return ""
    return f", but slow: {plural(workload.new_tokens, 'token')} take {format_seconds(workload.batch * workload.new_tokens / speed)}"


def _merit(best: Plan, fitting: Sequence[Plan]) -> str:
    """Say what a plan has over the others that fit."""
    assert best.estimate is not None
    if best.verdict is Verdict.TIGHT:
        return "nothing fits with room to spare; this comes closest"
    bits = min(_bits(best), 16)
    better = [one for one in fitting if _bits(one) >= bits and quality_kept(one) > quality_kept(best)]
    if not better:
        return "highest quality that fits, and the fastest at that quality"
    wider = [one for one in better if _bits(one) > bits]
    if not wider:
        rival = max(better, key=worth)
        return f"{_times(best, rival)} times as fast as {rival.case.way}, which is worth the exactness it gives up"
    fastest = max(wider, key=_speed)
    if _speed(fastest) < SLOW_TOK_S <= _speed(best):  # how many times as fast as what nobody waits for says nothing
        slow = f"{fastest.case.way}, the fastest, makes {significant(_speed(fastest), 2)} tokens/s"
        return f"since nothing in more bits that surely fits reaches {SLOW_TOK_S:g} token a second: {slow}"
    rival = max(wider, key=worth)
    return f"{_times(best, rival)} times as fast as {rival.case.way}, which is worth the bits it gives up"


def _times(best: Plan, rival: Plan) -> str:
    return significant(_speed(best) / _speed(rival), 2)
