"""FORMATS: the ways of writing a report, each from results to the text of a file.

The command line lists these before anything is read, so the renderers are imported by the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from harness.core.records import Record, Result

Render = Callable[[Sequence[Result], Sequence[str]], str]


def _html(results: Sequence[Result], problems: Sequence[str]) -> str:
    from harness.report.page import render as page

    return page.render(results, problems=problems)


def _markdown(results: Sequence[Result], problems: Sequence[str]) -> str:
    from harness.report.export import summary

    return summary.render_summary(results, problems)


def _json(results: Sequence[Result], problems: Sequence[str]) -> str:
    from harness.report.export import data

    return data.render_json(results, problems)


def _csv(results: Sequence[Result], _problems: Sequence[str]) -> str:
    from harness.report.export import data

    return data.render_csv(results)


class Format(Record, frozen=True, kw_only=True):
    """One row of the table."""

    what: str
    suffixes: tuple[str, ...]
    render: Render  #: takes results in file order, and a sentence for each line that could not be read


FORMATS: Mapping[str, Format] = {
    "html": Format(what="the page", suffixes=(".html", ".htm"), render=_html),
    "md": Format(what="Markdown for a job summary or a README", suffixes=(".md", ".markdown"), render=_markdown),
    "json": Format(what="one JSON object", suffixes=(".json",), render=_json),
    "csv": Format(what="one row per case", suffixes=(".csv",), render=_csv),
}
