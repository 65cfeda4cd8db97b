"""Collect what an accuracy run found, and keep it with machine, versions and date in reports/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from harness import machine
from harness.case import Record
from harness.units import GIB
from tests.accuracy import chart
from tests.accuracy.chart import Pair

REPORT = Path(__file__).parents[2] / "reports" / "accuracy.md"


class Figure(Record, frozen=True, kw_only=True):
    """One line of the report: what was compared, over how many rows, with what error, and what is asked for."""

    what: str
    rows: int
    found: str
    wanted: str


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest, pairs: list[Pair]) -> Iterator[list[Figure]]:
    """A list to add to; report and charts are written unless only some were chosen with -k."""
    found: list[Figure] = []
    yield found
    if not found or request.config.option.keyword:
        return
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(found) + details(pairs), encoding="utf-8")
    for name, unit, scale in (("memory", "GiB", float(GIB)), ("speed", "tokens/s", 1.0)):
        chosen = [pair for pair in pairs if ("tokens/s" in pair.figure) == (name == "speed")]
        chart.write(REPORT.with_name(f"accuracy-{name}.svg"), chosen, unit, scale)


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Estimated and measured values, case by case: for the charts beside the report, and for its last table."""
    return []


def details(found: list[Pair]) -> str:
    """List every case with estimated / measured."""
    figures = list(dict.fromkeys(pair.figure for pair in found))
    by_case: dict[str, dict[str, float]] = {}
    for pair in found:
        by_case.setdefault(pair.case, {})[pair.figure] = pair.estimated / pair.measured
    lines = [
        "",
        "![memory](accuracy-memory.svg) ![speed](accuracy-speed.svg)",
        "",
        "Estimated / measured, case by case:",
        "",
        f"| case | {' | '.join(figures)} |",
        "|---" * (len(figures) + 1) + "|",
        *(
            f"| {case} | {' | '.join(f'{ratios[name]:.2f}' if name in ratios else '' for name in figures)} |"
            for case, ratios in by_case.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def report(found: list[Figure]) -> str:
    probed, versions = machine.probe(), machine.versions()
    lines = [
        "# How good the estimates are",
        "",
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d} by `tox run -e accuracy`",
        f"on {probed.name} ({probed.cpu}, {probed.system}),",
        f"with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "Errors are |estimate / measured - 1|.",
        "",
        "| what | rows | found | wanted |",
        "|---|---|---|---|",
        *(f"| {figure.what} | {figure.rows} | {figure.found} | {figure.wanted} |" for figure in found),
    ]
    return "\n".join(lines) + "\n"
