"""Fixtures of the oracle: what a file of tests finds becomes its section of reports/oracle.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.reporting import Figure, Section, gathered

HEADING = "What a GPU would allocate, without a GPU: plans against traces of the libraries' own code"


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "oracle.md", HEADING, getattr(request.module, "COMMAND", "tox run -e oracle"))


@pytest.fixture(scope="module")
def figures(section: Section) -> list[Figure]:
    """A list to add figures to."""
    return section.figures
