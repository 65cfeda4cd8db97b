"""Results as one HTML page: a single file that loads nothing, readable without scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from harness.core import units
from harness.core.errors import StoreError
from harness.core.metrics import METRICS
from harness.core.records import Result
from harness.core.redact import clean_text
from harness.core.text import line, plural, visible
from harness.machine import atomic
from harness.machine.garbage import uncollected
from harness.report import tasks
from harness.report.page import charts, language, packing, view
from harness.report.page.cases import write_cases, write_cell, write_code
from harness.report.page.figures import icon, surprise
from harness.report.page.overview import overview
from harness.results import selection

_TEMPLATES = Path(__file__).parents[1] / "templates"
PAGE_SCRIPTS = ("language.js", "page.js")
# All charts of a page share this many points, so that a page of 500 cases stays small.
_POINTS_OF_A_PAGE = 24_000
_FEWEST_POINTS = 24
# What Python for browsers takes: scripts beside the page, which no server gives where it is opened from disk, WebAssembly, and a
# worker that the page makes of its own text.
_PYTHON = " 'self' file: blob: 'wasm-unsafe-eval'; worker-src blob:"
# The details of more cases than these are packed: they are most of a page, and hardly any of them is read.
_MOST_UNPACKED = 60
# More cases than these are rendered faster by several processes.
_MOST_ALONE = 1_000
_BARE_BYTES, _CASE_BYTES = 64 * units.KIB, 64 * units.KIB


@dataclass(frozen=True)
class PageFacts:
    """What the page says of itself: how much was measured, how often the plan was wrong, what was set aside."""

    shown: int
    read: int
    runs: int
    newest: str
    false_fits: int
    false_refusals: int
    noisy: int
    problems: tuple[str, ...]


class Frame(NamedTuple):
    """What a site puts around a page."""

    above: Markup | None = None
    below: Markup | None = None
    styles: Sequence[str] = ()  #: the files of its style
    most_points: int = charts.POINTS  #: of a line in a chart; a page of many cases has fewer


@uncollected()
def render(
    results: Sequence[Result],
    *,
    title: str | None = None,
    problems: Sequence[str] = (),
    frame: Frame | None = None,
) -> str:
    """Render results as one page.

    Args:
        results: in the order of the file; the last one of a case counts.
        title: the page's title; by default the model and the machine.
        problems: what could not be read from the store, one sentence each.
        frame: what a site puts around it.
    """
    frame = frame or Frame()
    points = min(frame.most_points, max(_FEWEST_POINTS, _POINTS_OF_A_PAGE // max(len(results), 1)))
    found = view.blocks(results)
    facts = _facts(results, problems)
    measured = {key for result in results for key in result.metrics}
    pieces = [(matrix, block.anchor) for block in found for matrix in block.matrices]
    tell = functools.partial(_told, points=points)
    # Where processes do not fork it takes as long to send them the cases as to tell of these.
    is_shared = facts.shown > _MOST_ALONE and tasks.forks()
    telling = tasks.shared(tell, pieces, few=2) if is_shared else nullcontext(map(tell, pieces))
    with telling as told:
        packed = packing.pack_parts(told) if facts.shown > _MOST_UNPACKED else None
        parts = iter(packed.parts if packed else list(map(Markup, told)))
    return template("page.html.j2", *frame.styles).render(
        title=title or _title(found),
        named=title,
        # What is fine is a line each, above what is worth a look.
        blocks=sorted(found, key=lambda block: bool(block.doubts)),
        cases={block.anchor: [next(parts) for _ in block.matrices] for block in found},
        patterns=packed and packed.patterns,
        choices=view.choices(found),
        how=[(key, entry) for key, entry in METRICS.items() if key in measured],
        facts=facts,
        above=frame.above,
        below=frame.below,
    )


def _told(piece: tuple[view.Matrix, str], points: int) -> str:
    """Write all that is told of the cases of a matrix in a block of this anchor: most of a page, of which hardly any is read."""
    matrix, up = piece
    at_a_glance = template("overview.html.j2").render(over=overview(matrix.cells))
    return f'<div class="cases">{write_cases(matrix, up, points=points)}</div>\n{at_a_glance}'


def most_bytes(cases: int, stored_bytes: int) -> int:
    """Return the most bytes that a page of `cases` cases takes, style and script included, whose store has `stored_bytes`."""
    return _BARE_BYTES + _CASE_BYTES * cases + 2 * stored_bytes


def write(path: Path, text: str, what: str = "the page", option: str = "--html") -> None:
    """Write a page, or `what` else, whole or not at all, making its folder if need be; `option` is that which names the place.

    Raises:
        StoreError: the file cannot be written there.
    """
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise StoreError(path, f"{what} cannot be written: {error.strerror}. Give another file with {option}") from error


def _title(found: Sequence[view.Block]) -> str:
    return f"{found[0].model} on {found[0].machine.name}" if len(found) == 1 else "What fits where"


def _facts(results: Sequence[Result], problems: Sequence[str]) -> PageFacts:
    shown = selection.newest(results)
    surprises = [surprise(result) for result in shown]
    return PageFacts(
        shown=len(shown),
        read=len(results),
        runs=len({result.run for result in results}),
        newest=units.format_instant(max(result.at for result in results)) if results else "",
        false_fits=surprises.count("false fit"),
        false_refusals=surprises.count("false refusal"),
        noisy=sum(len(result.noisy) for result in shown),
        problems=tuple(clean_text(problem) for problem in problems),
    )


@functools.cache
def template(name: str, *styles: str, scripts: tuple[str, ...] = PAGE_SCRIPTS, runs_python: bool = False) -> jinja2.Template:
    """Return one of our templates, all of which share their parts, their style and how they write text.

    `styles` are files that add to the style, with what their pages say in other languages; `scripts` are all that may run,
    beside Python and what it runs in a page that `runs_python`.
    """
    return _environment(styles, scripts, runs_python).get_template(name)


@functools.cache
def _environment(styles: Sequence[str], scripts: Sequence[str], runs_python: bool) -> jinja2.Environment:
    """Return where templates find each other, so that the parts that several of them share are compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        clip=_clip,
        pack=packing.deflated,
        plural=plural,
        size=units.format_size,
        count=units.format_count,
        share=units.format_share,
    )
    # These two are ours and hold no text of a result, so they go in as they are; nothing else may apply or run.
    style = "".join((_TEMPLATES / file).read_text(encoding="utf-8") for file in ("style.css", *styles))
    script = "".join((_TEMPLATES / file).read_text(encoding="utf-8") for file in scripts)
    environment.globals |= {
        "style_css": Markup(style),
        "page_js": Markup(script),
        "chinese": language.block(language.CHINESE, *(Path(file).stem for file in styles)),
        "policy": _policy(style, script) + _PYTHON * runs_python,
        "cell": write_cell,
        "code": write_code,
        "icon": icon,
    }
    return environment


def _policy(style: str, script: str) -> str:
    """Write the Content-Security-Policy that allows this style and this script, by their hashes, and the empty icon alone."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    sources = (
        "default-src 'none'; style-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'; script-src 'sha256-{}'"
    )
    return sources.format(*hashes)


def _clip(text: str, most: int = 120) -> str:
    """Write a name on one line that has an end."""
    return line(text, most)


def _shown(value: object) -> object:
    """Spell out what cannot be seen in every text that a template writes."""
    return visible(value) if type(value) is str else value
