"""Collect the figures of a bench run, and keep them with hardware, versions and date in reports/bench.md."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from harness import machine
from harness.case import Record

REPORT = Path(__file__).parents[2] / "reports" / "bench.md"


class Figure(Record, frozen=True, kw_only=True):
    what: str
    measured: str
    limit: str


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    """A list to add the measured figures to; the report is written unless only some were chosen with -k."""
    found: list[Figure] = []
    yield found
    if found and not request.config.option.keyword:
        REPORT.write_text(report(found), encoding="utf-8")


def report(found: list[Figure]) -> str:
    probed, versions = machine.probe(), machine.versions()
    lines = [
        "# What the harness costs",
        "",
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d} by `tox run -e bench` on {probed.name} ({probed.cpu}, {probed.system}),",
        f"with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "| what | measured | limit |",
        "|---|---|---|",
        *(f"| {figure.what} | {figure.measured} | {figure.limit} |" for figure in found),
        "",
    ]
    return "\n".join(lines)
