"""Markdown as GitHub renders it, with names and reasons of others kept text: the only place that escapes for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.core.text import visible

# Letters with a meaning to Markdown, HTML or formulas. GitHub's spec lets any ASCII punctuation stand behind a backslash.
_ESCAPES = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;"} | {letter: f"\\{letter}" for letter in "\\`*_[]|~"})
# GitHub turns these into links, mentions and pictures after escapes are gone, so only a letter between their parts stops it. It
# has no width and is written as an entity, which whoever reads the source can see.
_NOTHING = "&#8203;"
_BREAKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"@(?=\w)"), f"@{_NOTHING}"),  # mentions, mail addresses
    (re.compile(r"(?<!&)#(?=\w)"), f"#{_NOTHING}"),  # issues, but not the entities above
    (re.compile(r"\b(GH)-(?=\d)", re.IGNORECASE), rf"\1{_NOTHING}-"),
    (re.compile(r"://"), f":{_NOTHING}//"),
    (re.compile(r"\b(www)\.", re.IGNORECASE), rf"\1{_NOTHING}."),
    (re.compile(r":(?=(?:[\w+-]*[A-Za-z][\w+-]*|\d{3,4}|[+-]1):)"), f":{_NOTHING}"),  # :emoji:
)
# What would begin a list, a heading or a rule at the start of a line.
_BEGINS = re.compile(r"^(\d{0,9})([-+=.)#])(?=\s|$|\2)")
_UNSAFE_IN_CODE = frozenset("`|\\")


def escaped(text: str, most: int = 0) -> str:
    """Keep a text text, on one line: no Markdown, HTML, link, mention or end of a cell; cut beyond `most` letters."""
    flat = _flat(text, most)
    safe = _BEGINS.sub(r"\1\\\2", flat.translate(_ESCAPES))
    for pattern, broken in _BREAKS:
        safe = pattern.sub(broken, safe)
    return safe


def code(text: str, most: int = 0) -> str:
    """Write a name as code, in which nothing is found; one that could end it is escaped instead."""
    flat = _flat(text, most)
    return escaped(flat) if not flat or _UNSAFE_IN_CODE & set(flat) else f"`{flat}`"


def _flat(text: str, most: int) -> str:
    flat = " ".join(visible(text).split())
    return flat if not most or len(flat) <= most else f"{flat[: most - 1]}…"


def block(text: str, language: str = "") -> list[str]:
    """Write lines of a program, in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *visible(text).split("\n"), fence]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Write a table of cells that are Markdown already; the columns numbered in `right` hold figures."""
    figures = set(right)
    rules = ["---:" if number in figures else "---" for number in range(len(columns))]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows)]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Write lines that open on demand; `summary` is plain text of ours, or escaped."""
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>"]
