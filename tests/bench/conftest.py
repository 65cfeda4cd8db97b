"""Fixtures of the bench: what a file of tests finds becomes its section of reports/bench.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.reporting import Figure, Section, gathered


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "bench.md", "What the harness costs", "tox run -e bench")


@pytest.fixture(scope="module")
def figures(section: Section) -> list[Figure]:
    """A list to add figures to."""
    return section.figures
