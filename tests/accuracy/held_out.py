"""What is planned of models after one of them has calibrated, beside what was measured of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.core import metrics
from harness.core.metrics import when_ready
from harness.core.options import DEFAULT_MODEL
from harness.core.records import Machine, Result
from harness.core.units import format_share
from harness.planning.calibrating import evidence, fit
from harness.planning.calibration import default
from harness.planning.cost.speed import IN_CACHE, ON_DISK
from harness.planning.loading import seconds
from tests.accuracy.local_runs import planner_of
from tests.support.published import Prediction, interval_score, median_width, share_inside

MEASURED = ("decode_tok_s", "first_token_s", "load_s", "ready_s again")
AT_FIRST = "ready_s at first"


class Forecast(Prediction, frozen=True, kw_only=True):
    """One figure of one case."""

    case: str
    placement: str
    figure: str


def forecasts(
    results: Sequence[Result],
    here: Machine,
    models: dict[str, Path],
    calibrates: str = DEFAULT_MODEL,
) -> Iterator[Forecast]:
    """Plan the cases of all models but one by constants that only its results corrected.

    Of a run whose files came from the disk only the time until it was ready is forecast; nothing where they did so in part.
    """
    base = default()
    own = evidence.observations([one for one in results if one.case.model == calibrates], base.digest, here)
    constants = fit.fit_constants(base, own).calibration
    for one in results:
        name = one.case.model
        if name == calibrates:
            continue
        planner = planner_of(name, models[name], here, constants)
        plan = planner.plan(one.case)
        estimate, load = plan.estimate, seconds.timed(planner, plan)
        assert estimate is not None
        assert load is not None
        ready, came = estimate.ready_s, when_ready(one)
        if came == metrics.AT_FIRST:
            yield Forecast(
                case=one.id, placement=one.case.placement, figure=AT_FIRST, planned=ready[ON_DISK], measured=one.metrics["ready_s"]
            )
        elif came == metrics.AGAIN:
            planned = (estimate.decode_tok_s, estimate.first_token_s, load.warm_s, ready[IN_CACHE])
            measured = (1 / one.metrics["token_p50_s"], *(one.metrics[name] for name in ("first_token_s", "load_s", "ready_s")))
            for figure, interval, value in zip(MEASURED, planned, measured, strict=True):
                assert interval is not None
                yield Forecast(case=one.id, placement=one.case.placement, figure=figure, planned=interval, measured=value)


def mean_error(rows: Sequence[Forecast]) -> float:
    """Return the mean size of the errors."""
    return statistics.fmean(abs(one.error) for one in rows)


def share_within(rows: Sequence[Forecast], most: float) -> float:
    """Return the share of rows whose error is at most this."""
    return statistics.fmean(abs(one.error) <= most for one in rows)


def said(rows: Sequence[Forecast]) -> str:
    """Say how good the rows are, as the report does."""
    inside, score = format_share(share_inside(rows)), interval_score(rows)
    return f"mean error {format_share(mean_error(rows))}, {inside} inside, median width {median_width(rows):.2f}, score {score:.2f}"
