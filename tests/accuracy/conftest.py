"""Collect what an accuracy run found, and keep it with machine, versions and date in reports/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from harness import machine
from harness.case import Record

REPORT = Path(__file__).parents[2] / "reports" / "accuracy.md"


class Figure(Record, frozen=True, kw_only=True):
    """One line of the report: what was compared, over how many rows, with what error, and what is asked for."""

    what: str
    rows: int
    found: str
    wanted: str


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    """A list to add to; the report is written unless only some were chosen with -k."""
    found: list[Figure] = []
    yield found
    if found and not request.config.option.keyword:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(found), encoding="utf-8")


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
