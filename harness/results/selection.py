"""Which of many results count: the newest of each case, those that are sound, and the best."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from harness.core.metrics import UNNOTICED
from harness.core.placements import plainness
from harness.core.records import Case, Machine, Outcome, Result
from harness.results.needed import need_of

SEARCH = "search"  #: the stage of a result that no case of a run is of

# What a disturbance may take from a speed that is not slower.
_AS_FAST = 0.85
_MUCH_LESS = 0.8  # of the memory


def ran(result: Result) -> bool:
    """Tell whether a worker was started: a combination that cannot work is "unsupported" without having run."""
    return result.outcome is not Outcome.SKIPPED and result.stage != "plan"


def is_proposed(result: Result) -> bool:
    """Tell whether this is no case of a run but what a search found best when it ended (`run.cases.CaseMatrix.proposed`)."""
    return result.stage == SEARCH and result.outcome is Outcome.SKIPPED and result.estimate is not None


def proposed(results: Iterable[Result]) -> list[Result]:
    """Return what the newest run found best and did not measure, one for each pair of limits.

    What an earlier run proposed does not count: a newer one has searched with what was measured since, or has measured it.
    """
    newest: dict[tuple[int | None, int | None], Result] = {}
    for one in sorted(results, key=lambda one: (one.at, is_proposed(one))):  # a search comes last, if in the same second
        newest[one.case.vram_bytes, one.case.ram_bytes] = one
    return [one for one in newest.values() if is_proposed(one)]


def faults(result: Result) -> list[str]:
    """List the checks of what was loaded that found something wrong."""
    return [found for found in result.checks.values() if found != "ok"]


def is_sound(result: Result) -> bool:
    """Tell whether a case worked, its answers are not degraded, and no check of what was loaded found a fault."""
    return result.outcome is Outcome.OK and _quality(result) not in ("degraded", "broken") and not faults(result)


def is_broken(result: Result) -> bool:
    """Tell whether the weights no longer give sensible answers."""
    return _quality(result) == "broken"


def _quality(result: Result) -> str:
    return result.quality.verdict if result.quality else ""


def newest(results: Iterable[Result]) -> list[Result]:
    """Keep the last result of every case on every machine, by what its weights were, in file order; rounds make no other case.

    What a case showed stands against a later plan that was not run (one run with --run-all, the next without), unless the versions
    have changed: then the plan may know better.
    """
    kept: dict[tuple[str, Case, str], Result] = {}
    for result in results:
        key = (result.machine.name, replace(result.case, workload=result.case.workload.asked), result.weights)
        earlier = kept.get(key)
        if earlier and ran(earlier) and not ran(result) and earlier.environment == result.environment:
            continue
        kept.pop(key, None)
        kept[key] = result
    return list(kept.values())


def last_on(machine: Machine, results: Iterable[Result]) -> dict[tuple[Case, str], Result]:
    """Return the last result of each case on a machine of this name, run or not, by the case and what its weights were."""
    return {(result.case, result.weights): result for result in results if result.machine.name == machine.name}


def best_result(results: Iterable[Result]) -> Result | None:
    """Pick the fastest case that works soundly, else the fastest with degraded answers or a failed check; never a broken one.

    Of those that are as fast but for what noise may hide, one that nobody disturbed. Instead of it one that is slower by less than
    anybody notices: in much less memory; else by a plainer call that puts the same weights into the same tiers.
    """
    usable = [result for result in results if result.outcome is Outcome.OK and not is_broken(result)]
    found = [result for result in usable if is_sound(result)] or usable
    fastest = max((_speed(result) for result in found), default=0.0)
    near = [result for result in found if _speed(result) >= _AS_FAST * fastest]
    best = max(near, key=_calm_speed, default=None)
    best = best and max((one for one in near if _is_lighter(one, best)), key=_calm_speed, default=best)
    return best and min((one for one in near if _is_alike(one, best)), key=lambda one: plainness(one.case.placement), default=best)


def _calm_speed(result: Result) -> tuple[bool, float]:
    return "decode_tok_s" not in result.noisy, _speed(result)


def _is_lighter(one: Result, best: Result) -> bool:
    """Tell whether a case is almost as fast as the best in much less of the same memory."""
    if (need := need_of(one)) is None or (most := need_of(best)) is None or need.key != most.key:
        return False
    return need.bytes <= _MUCH_LESS * most.bytes and _is_nearly_as_fast(one, best)


def _is_alike(one: Result, best: Result) -> bool:
    """Tell whether a case has the same weights in the same tiers as the best, almost as fast and in no more memory to speak of."""
    same = replace(one.case, placement=best.case.placement) == best.case and _tiers(one) == _tiers(best)
    return same and _is_nearly_as_fast(one, best) and not _is_lighter(best, one)


def _tiers(result: Result) -> set[str] | None:
    return {name for name, size in result.loaded.tier_bytes.items() if size} if result.loaded else None


def _is_nearly_as_fast(one: Result, best: Result) -> bool:
    return _calm_speed(one) >= (_calm_speed(best)[0], (1 - UNNOTICED) * _speed(best))


def _speed(result: Result) -> float:
    return result.metrics.get("decode_tok_s", 0.0)
