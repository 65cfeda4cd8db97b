"""The best way that a search finds here, run beside the two that come next"""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest

from harness.catalog.resolve import resolve
from harness.core.options import DEFAULT_MODEL
from harness.core.records import Case, Machine, Outcome, Plan, Span
from harness.planning.calibration import Calibration
from harness.planning.choice.recommend import advise_best, worth
from tests.accuracy.local_runs import WAYS, WORK, planner_of, run_plan, running
from tests.support.reporting import Figure

ROUNDS = 3  # of each way, in turn, so that a busy minute meets all of them
NOISE = 0.05
NEXT = 2


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "qwen2", "moe"])
def test_the_winner_wins(
    name: str, models: dict[str, Path], here: Machine, calibrated: Calibration, figures: list[Figure], tmp_path: Path
) -> None:
    location = models[name]
    planner = planner_of(name, location, here, calibrated)
    best = advise_best(resolve(str(location)), planner, WORK).best
    assert best is not None
    usual = [Case(model=name, precision=precision, placement=placement, workload=WORK) for precision, placement in WAYS]
    others = [one for one in planner.plans(usual) if one.verdict.is_good and one.case != best.case]
    ways = [best, *sorted(others, key=worth, reverse=True)[:NEXT]]
    assert len(ways) == 1 + NEXT
    context = running(here, tmp_path)
    taken = [[run_plan(one, location, context) for one in ways] for _ in range(ROUNDS)]
    assert all(result.outcome is Outcome.OK for row in taken for result in row)
    speeds = [1 / statistics.median(row[at].metrics["token_p50_s"] for row in taken) for at in range(len(ways))]
    worths = [_worth(one, speed) for one, speed in zip(ways, speeds, strict=True)]
    told = ", ".join(f"{one.case.way} {speed:.1f}" for one, speed in zip(ways, speeds, strict=True))
    lead = worths[0] / max(worths[1:])
    what = f"worth of the winner beside its neighbors, {name} (tokens/s: {told})"
    figures.append(Figure(what=what, rows=ROUNDS, found=f"{lead:.3f} times", wanted="1, within noise"))
    assert lead >= 1 - NOISE


def _worth(one: Plan, tok_s: float) -> float:
    """Return what a plan is worth at the speed that it was measured at."""
    assert one.estimate is not None
    measured = msgspec.structs.replace(one.estimate, decode_tok_s=Span(low=tok_s, best=tok_s, high=tok_s))
    return worth(msgspec.structs.replace(one, estimate=measured))[0]
