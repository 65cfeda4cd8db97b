"""The smallest RAM that a case works in, found by running it under limits: the estimate, proved.

A case works under a limit if it ends well and does not live on rereading its weights: if memory is too short for what every
token reads, the kernel drops pages of the file and fetches them again, for each token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.records import Case, Outcome, Record, Result, TierEstimate
from harness.core.units import MIB, format_size
from harness.run.case_result import CaseEnded
from harness.run.runner import Run
from harness.run.session import Session

WITHIN = 0.05
_STEP = 1.3  # from the estimate outwards until one limit works and another does not
_LEAST_BYTES = 64 * MIB
_REREAD_SHARE = 0.05  # of the weights in RAM, by each token: more is thrashing


class Minimum(Record, frozen=True, kw_only=True):
    """What was found, and the estimate that it proves."""

    case: Case
    works_bytes: int | None  #: the smallest limit that works, None if none does
    fails_bytes: int | None  #: the largest limit that does not
    why: str | None  #: how the case fared at `fails_bytes`
    estimate_bytes: int
    estimate_high_bytes: int
    runs: int  #: the limits that were tried


def prove(session: Session, case: Case, *, within: float = WITHIN, tried: Callable[[Result], None] | None = None) -> Minimum:
    """Bisect for the smallest limit on RAM that `case` works under, to a share `within` of it; `tried` sees every result.

    The session must be prepared for the case, and the case have an estimate.
    """
    expected, ram = _in_ram(session, case), session.machine.tier("cpu")
    most = (ram.capacity_bytes if ram else None) or expected.needed_high_bytes
    works, fails, why, runs = None, None, None, 0
    limit: int | None = _whole(min(expected.needed_bytes, most))
    while limit is not None:
        result, runs = measure(session, replace(case, ram_bytes=limit)), runs + 1
        if tried is not None:
            tried(result)
        if (failure := failed(result)) is None:
            works = limit
        else:
            fails, why = limit, failure
        limit = _next(works, fails, most, within)
    return Minimum(
        case=case,
        works_bytes=works,
        fails_bytes=fails,
        why=why,
        estimate_bytes=expected.needed_bytes,
        estimate_high_bytes=expected.needed_high_bytes,
        runs=runs,
    )


def _in_ram(session: Session, case: Case) -> TierEstimate:
    estimate = session.plan(case).estimate
    assert estimate is not None
    return estimate.tiers["cpu"]


def _next(works: int | None, fails: int | None, most: int, within: float) -> int | None:
    """Return the limit to try next, None when the two are close enough or there is nothing left to try."""
    if works is None:
        assert fails is not None
        return _whole(min(fails * _STEP, most)) if fails < _whole(most) else None
    if fails is None:
        return _whole(works / _STEP) if works > _LEAST_BYTES else None
    return _whole(math.sqrt(works * fails)) if works > fails * (1 + within) else None


def _whole(size: float) -> int:
    """Round down to whole MiB, which a user can type."""
    return max(int(size) // MIB, 1) * MIB


def measure(session: Session, case: Case) -> Result:
    """Load, generate twice, and return what the case has shown; nothing is kept."""
    run = Run(session.plan(case), session.case_model(case), session.context)
    try:
        with contextlib.suppress(CaseEnded):
            run.load()
            run.first_round()
            run.round()
    finally:
        result = run.finish()
    return result


def failed(result: Result) -> str | None:
    """Say why a case does not work under its limit, None if it does. Raises UsageError: it could not be tried."""
    if result.outcome is Outcome.SKIPPED:
        raise UsageError(f"{result.id} could not be tried: {result.why}")
    if result.outcome is not Outcome.OK:
        return result.why
    reread = result.metrics.get("token_disk_bytes", 0.0)
    weights = result.loaded.tier_bytes.get("cpu", 0) if result.loaded else 0
    if reread > _REREAD_SHARE * weights:
        return f"too little for what every token reads: {format_size(reread)} came from the disk for each"
    return None
