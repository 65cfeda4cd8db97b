"""Reports of measuring runs, as Markdown: a section for each file of tests, with machine, versions and date of its own.

A run replaces the sections of the files that it ran and leaves the others as they were, so a long report can be made in parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.core.records import Record
from harness.machine import probe

REPORTS = Path(__file__).parents[2] / "reports"


class Figure(Record, frozen=True, kw_only=True):
    """One line of a report: what was measured, what was found and what is asked for; `rows` is how many values it rests on."""

    what: str
    found: str
    wanted: str
    rows: int | None = None


class Section(NamedTuple):
    """What one file of tests found: its figures, and Markdown that stands below their table."""

    title: str
    figures: list[Figure]
    notes: list[str]


def gathered(request: pytest.FixtureRequest, report: str, heading: str, command: str, part: str = "") -> Iterator[Section]:
    """Be the body of a module's fixture: give it a section to fill, and write it unless only some tests were chosen with -k.

    `part` names one of the sections of a module that has several, each measured by itself.
    """
    title = part.capitalize() or (request.module.__doc__ or request.module.__name__).splitlines()[0].rstrip(".")
    section = Section(title, [], [])
    yield section
    if section.figures and not request.config.option.keyword:
        key = "_".join(filter(None, [request.module.__name__.rpartition(".")[2], part]))
        path = REPORTS / report
        path.parent.mkdir(exist_ok=True)
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        path.write_text(joined(heading, sections_of(before) | {key: written(section, command)}), encoding="utf-8")


def written(section: Section, command: str) -> str:
    """Write a section: title, how and where it was measured, a table of the figures, the notes."""
    probed, versions = probe.probe(), probe.versions()
    counted = any(figure.rows is not None for figure in section.figures)
    columns = ["what", *(["rows"] if counted else []), "found", "wanted"]
    lines = [
        f"## {section.title}",
        "",
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d} by `{command}` on {probed.name} ({probed.cpu}, {probed.system}),",
        f"with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        *table(columns, [_cells(figure, counted) for figure in section.figures]),
        *(line for note in section.notes for line in ("", note)),
    ]
    return "\n".join(lines)


def _cells(figure: Figure, counted: bool) -> list[str]:
    rows = ["" if figure.rows is None else str(figure.rows)] if counted else []
    return [figure.what, *rows, figure.found, figure.wanted]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def sections_of(text: str) -> dict[str, str]:
    """Take a report apart: the Markdown of each section by its key."""
    parts = re.split(r"^<!-- (\w+) -->\n", text, flags=re.MULTILINE)
    return {key: body.strip("\n") for key, body in zip(parts[1::2], parts[2::2], strict=True)}


def joined(heading: str, sections: Mapping[str, str]) -> str:
    """Put a report together: the heading, then the sections in the order of their keys."""
    return "\n\n".join([f"# {heading}", *(f"<!-- {key} -->\n{sections[key]}" for key in sorted(sections))]) + "\n"
