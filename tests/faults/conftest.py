"""Fixtures of the fault runs: what a file of tests finds becomes its section of reports/reliability.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.reporting import Figure, Section, gathered


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "reliability.md", "What it survives", "tox run -e faults")


@pytest.fixture(scope="module")
def figures(section: Section) -> list[Figure]:
    """A list to add figures to."""
    return section.figures
