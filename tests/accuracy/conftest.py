"""Fixtures of the accuracy runs: what a file of tests finds becomes its section of reports/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.core.units import GIB
from tests.accuracy import chart
from tests.accuracy.chart import Pair
from tests.support.reporting import REPORTS, Figure, Section, gathered, table

HEADING = "How good the estimates are"


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "accuracy.md", HEADING, "tox run -e accuracy")


@pytest.fixture(scope="module")
def figures(section: Section) -> list[Figure]:
    """A list to add figures to."""
    return section.figures


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, section: Section) -> Iterator[list[Pair]]:
    """Estimated and measured values, case by case: for the charts beside the report, and for the table below the figures."""
    found: list[Pair] = []
    yield found
    if not found or request.config.option.keyword:
        return
    section.notes.extend(["![memory](accuracy-memory.svg) ![speed](accuracy-speed.svg)", details(found)])
    for name, unit, scale in (("memory", "GiB", float(GIB)), ("speed", "tokens/s", 1.0)):
        chosen = [pair for pair in found if ("tokens/s" in pair.figure) == (name == "speed")]
        chart.write(REPORTS / f"accuracy-{name}.svg", chosen, unit, scale)


def details(found: list[Pair]) -> str:
    """List every case with estimated / measured."""
    figures = list(dict.fromkeys(pair.figure for pair in found))
    by_case: dict[str, dict[str, float]] = {}
    for pair in found:
        by_case.setdefault(pair.case, {})[pair.figure] = pair.estimated / pair.measured
    lines = [
        "Estimated / measured, case by case:",
        "",
        *table(
            ["case", *figures],
            [[case, *(f"{ratios[name]:.2f}" if name in ratios else "" for name in figures)] for case, ratios in by_case.items()],
        ),
    ]
    return "\n".join(lines)
