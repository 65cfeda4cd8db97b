"""Plans and verdicts against traced rows.

Every row (`tests.oracle.rows`) is planned on one card of 13 sizes. It would really fit where the traced bytes, and what the plan
counts beside them (context, what the allocator cannot use), are no more than the card has, and what loading takes as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from statistics import median, quantiles

import pytest

from harness.core.records import Case, TierEstimate, Verdict, Workload
from harness.core.units import GIB
from harness.planning.planner import Planner
from tests.oracle import planned_rows, rows
from tests.oracle.rows import Row
from tests.support.reporting import Figure, Section, table

SIZES_GIB = (6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96)
USUAL = ("bf16", "int8", "int4")
MEDIAN, MOST, REFUSED = 0.003, 0.02, 0.02
ROWS = rows.everything()
# What was once called "fits" or "tight" and is more than the card has: model, GiB of the card, prompt, batch. 16 new tokens, bf16.
ONCE_FALSE = (
    ("mistral-7b-instruct-v0.1", 20, 32000, 1),
    ("mixtral-8x7b-instruct-v0.1", 96, 64, 16),
    ("gemma-3-4b-it", 12, 32768, 1),
)

Judged = tuple[Verdict, TierEstimate, Row, int]


@cache
def planner(model: str, card: str) -> Planner:
    return planned_rows.planner(model, card)


def case(model: str, precision: str, workload: Workload) -> Case:
    return Case(model=planned_rows.spec(model).name, precision=precision, placement="direct", workload=workload)


def planned(row: Row, card: str) -> tuple[Verdict, TierEstimate]:
    workload = Workload(prompt_tokens=row.prompt_tokens, new_tokens=row.new_tokens, batch=row.batch)
    plan = planner(row.model, card).plan(case(row.model, row.precision, workload))
    assert plan.estimate is not None, plan.why
    return plan.verdict, plan.estimate.tiers["gpu:0"]


def real(row: Row, tier: TierEstimate) -> int:
    """What a row takes of its card: as traced, or what loading takes, and beside either what the plan counts as overhead."""
    return max(row.peak_bytes + tier.overhead_bytes, tier.load_peak_bytes)


@pytest.fixture(scope="module")
def direct() -> list[Row]:
    return [row for row in ROWS if row.placement == "direct" and row.peak_bytes]


@pytest.fixture(scope="module")
def judged(direct: list[Row]) -> list[Judged]:
    """Every row on a card of every size."""
    return [(*planned(row, f"{size}GiB"), row, size * GIB) for row in direct for size in SIZES_GIB]


def spread(found: Iterable[float]) -> str:
    errors = [abs(error) for error in found]
    return f"{median(errors):.3%}, {most(errors):.3%}, {max(errors):.3%}"


def most(errors: list[float]) -> float:
    """Return the 99th percentile."""
    return quantiles(errors, n=100, method="inclusive")[98]


def test_plans_are_near_the_rows(direct: list[Row], figures: list[Figure], section: Section) -> None:
    tiers = {id(row): planned(row, row.cards)[1] for row in direct}
    errors = {id(row): tiers[id(row)].allocated_bytes / row.peak_bytes - 1 for row in direct}
    for precision in dict.fromkeys(row.precision for row in direct):
        of = [errors[id(row)] for row in direct if row.precision == precision]
        wanted = f"{MEDIAN:.1%}, {MOST:.0%}" if precision in USUAL else ""
        what = f"allocated bytes, {precision}: median, 99th percentile, worst"
        figures.append(Figure(what=what, found=spread(of), wanted=wanted, rows=len(of)))
    above = [row for row in direct if row.peak_bytes > tiers[id(row)].high_bytes]
    figures.append(Figure(what="traced peaks above `high_bytes`", found=str(len(above)), wanted="0", rows=len(direct)))
    by: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in direct:
        by[row.architecture, row.precision].append(errors[id(row)])
    lines = [(*part, f"{max(found, key=abs):+.2%}", str(len(found))) for part, found in by.items()]
    section.notes.append("\n".join(table(["architecture", "precision", "worst error", "rows"], lines)))
    usual = [abs(errors[id(row)]) for row in direct if row.precision in USUAL]
    assert median(usual) <= MEDIAN
    assert most(usual) <= MOST
    assert not [row for row in above if row.precision in USUAL]


def test_no_verdict_says_that_fits_what_does_not(judged: list[Judged], figures: list[Figure], section: Section) -> None:
    """A verdict that it fits is false if the card is too small for what was traced, one that it does not if it is large enough."""
    false = [one for one in judged if one[0] is Verdict.FITS and real(one[2], one[1]) > one[3]]
    narrow = [one for one in judged if one[0] is Verdict.TIGHT]
    fitting = [one for one in judged if real(one[2], one[1]) <= one[3]]
    refused = [one for one in fitting if one[0] is Verdict.TOO_BIG]
    figures += [
        Figure(what='verdicts "fits" that are false', found=str(len(false)), wanted="0", rows=len(judged)),
        Figure(
            what='what would fit and is called "too big"',
            found=f"{len(refused)}, {len(refused) / len(fitting):.2%}",
            wanted=f"< {REFUSED:.0%}",
            rows=len(fitting),
        ),
        Figure(
            what='verdicts "tight", of which would fit',
            found=f"{len(narrow)}, {sum(real(row, tier) <= size for _, tier, row, size in narrow)}",
            wanted="",
            rows=len(judged),
        ),
    ]
    counted = Counter((size // GIB, verdict.value) for verdict, _, _, size in judged)
    lines = [[f"{size} GiB", *(str(counted[size, name]) for name in ("fits", "tight", "too_big"))] for size in SIZES_GIB]
    section.notes.append("\n".join(table(["card", "fits", "tight", "too big"], lines)))
    assert len(judged) >= 1000
    assert not false
    assert len(refused) < REFUSED * len(fitting)


def test_what_was_once_called_fitting_is_too_big(figures: list[Figure]) -> None:
    """Hold the three verdicts by which the oracle began."""
    verdicts = [
        planner(model, f"{card}GiB").plan(case(model, "bf16", Workload(prompt_tokens=prompt, new_tokens=16, batch=batch))).verdict
        for model, card, prompt, batch in ONCE_FALSE
    ]
    found = Counter(verdict.value for verdict in verdicts)
    said = ", ".join(f"{count} {verdict}" for verdict, count in found.items())
    figures.append(Figure(what="verdicts that were once false", found=said, wanted="too_big", rows=len(verdicts)))
    assert set(verdicts) == {Verdict.TOO_BIG}
