"""Badges: for each model and size of card one line as SVG, "chatglm-6b | int8 fits 12 GiB, 23.1 tok/s".

A badge is one file that loads nothing, made by badgepy. Its texts have a fixed length, so that they fit in any font.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from xml.sax.saxutils import quoteattr

import badgepy
from badgepy.precalculated_text_measurer import PrecalculatedTextMeasurer

from harness.core.records import Result
from harness.core.text import line, plural
from harness.core.units import GIB, MIB, significant
from harness.report.export.answers import PublishedAnswer, answers, best_of
from harness.report.page.view import Anchors, Cell, blocks


@dataclass(frozen=True)
class Badge:
    """One badge. `slug` is the name of its file: the model, then the size, `chatglm-6b-12GiB`."""

    slug: str
    model: str
    said: str
    svg: str


@dataclass(frozen=True)
class _Size:
    """What a badge is about: the memory of the cards or, without a card, the RAM. `emulated` on larger cards."""

    text: str
    emulated: bool


# White is read on each of these, also where badgepy's gloss lightens them: WCAG's contrast is 4.5 or more.
_LEFT, _GOOD, _DOUBTFUL, _BAD, _UNKNOWN = "#444", "#1a7032", "#8a5a00", "#a32a1c", "#5c5c5c"
_MOST_LETTERS = 40
# How wide a letter is that is as wide as high, in the units of badgepy's widths: tenths of a pixel.
_SQUARE = 110


def badges(results: Sequence[Result]) -> list[Badge]:
    """Make the badges of all models and sizes; where machines have cards of one size, the newest result's counts."""
    found: dict[tuple[str, bool, str], tuple[str, PublishedAnswer, _Size]] = {}
    for block in blocks(results):
        for answer in answers(block):
            if answer.matrix is not block.matrices[0]:  # the page's answer is the first one too
                continue
            size, newest = _size(answer), max(cell.result.at for cell in answer.cells)
            key = (block.model, block.synthetic, size.text)
            if key not in found or newest >= found[key][0]:
                found[key] = newest, answer, size
    anchors = Anchors()
    return [_badge(answer, size, newest, anchors) for newest, answer, size in found.values()]


def _badge(answer: PublishedAnswer, size: _Size, newest: str, anchors: Anchors) -> Badge:
    block, (said, color) = answer.block, _said(answer, size)
    limits = f", limited to {answer.limits}" if answer.limits else ""
    title = f"{block.model} on {block.machine.name}{limits}: {answer.sentence} {newest[:10]}"
    name = f"{block.model}-{re.sub(' (?=[GM]iB)', '', size.text)}"
    if block.synthetic:
        said, name = f"{said}, synthetic weights", f"{name}-synthetic"
    slug = anchors.give(name.lstrip("."))
    return Badge(slug, block.model, said, _svg(slug, line(block.model, _MOST_LETTERS), said, title, color))


def _size(answer: PublishedAnswer) -> _Size:
    gpus = answer.block.machine.gpus
    if not gpus:
        ram = answer.block.machine.tier("cpu")
        size = answer.ram_bytes or (ram.total_bytes if ram else None)
        return _Size(f"{_short(size)} RAM", answer.ram_bytes is not None)
    count = f"{len(gpus)} x " if len(gpus) > 1 else ""
    size = answer.vram_bytes or min((gpu.total_bytes for gpu in gpus if gpu.total_bytes), default=None)
    ram_limit = f" and {_short(answer.ram_bytes)} RAM" if answer.ram_bytes else ""
    return _Size(f"{count}{_short(size)}{ram_limit}", answer.vram_bytes is not None or answer.ram_bytes is not None)


def _short(size: int | None) -> str:
    """Write a size as cards are called: "12 GiB", "79.6 GiB", "512 MiB"."""
    if size is None:
        return "unknown"
    unit, name = (GIB, "GiB") if size >= GIB else (MIB, "MiB")
    number = significant(size / unit)
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {name}"


def _said(answer: PublishedAnswer, size: _Size) -> tuple[str, str]:
    """Say what fits, and in which color."""
    on_cards = [cell for cell in answer.cells if cell.memory and cell.memory.kind == "VRAM"]
    best = best_of(on_cards) if answer.block.machine.gpus else answer.best
    if best:
        return f"{best.result.case.precision} fits {size.text}{_spill(best)}{_figures(best, size)}", _color(best)
    if answer.best:
        return f"{answer.best.result.case.precision} in RAM only{_figures(answer.best, size)}", _DOUBTFUL
    looks = {cell.status.look for cell in answer.cells}
    if "broken" in looks:
        return f"answers broken on {size.text}", _BAD
    if looks & {"too-big", "oom"}:
        return f"does not fit {size.text}", _BAD
    if any(cell.ran for cell in answer.cells):
        return f"does not work on {size.text}", _BAD
    return f"not measured on {size.text}", _UNKNOWN


def _spill(best: Cell) -> str:
    """Name the other tiers that hold weights: what fits with their help does not fit the card alone."""
    held = best.result.loaded.tier_bytes if best.result.loaded else {}
    names = {"cpu": "RAM", "disk": "disk"} if best.result.machine.gpus else {"disk": "disk"}
    return "".join(f" + {names[tier]}" for tier in names if held.get(tier))


def _figures(best: Cell, size: _Size) -> str:
    """Say the speed, unless the size was emulated on a larger card, and doubts."""
    rate = best.result.metrics.get("decode_tok_s")
    speed = f", {significant(rate)} tok/s" if rate and best.speed.value and not size.emulated else ""
    doubt = f", answers {best.quality}" if best.quality == "degraded" else ""
    checks = f", {plural(len(best.faults), 'check')} failed" if best.faults else ""
    return f"{speed}{doubt}{checks}"


def _color(best: Cell) -> str:
    return _DOUBTFUL if best.faults or best.quality == "degraded" else _GOOD


def _svg(slug: str, left: str, right: str, title: str, color: str) -> str:
    """Draw two fields, one text in each; the title is what a screen reader says and a pointer shows."""
    left, right, title = (_drawable(text) for text in (left, right, title))
    drawn = badgepy.badge(
        left,
        right,
        left_color=_LEFT,
        right_color=color,
        whole_title=title,
        measurer=_measurer(),
        id_suffix=f"-{slug}",
        font_family="Verdana,DejaVu Sans,sans-serif",
    )
    # Without a role a screen reader would read the texts, each of which badgepy writes twice: once as its shadow.
    return drawn.replace("<svg ", f'<svg role="img" aria-label={quoteattr(f"{left}: {right}")} ', 1) + "\n"


# Code points that no XML may hold, which `line` leaves because they are no control characters.
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _drawable(text: str) -> str:
    return _NO_XML.sub("\ufffd", line(text))


@functools.cache
def _measurer() -> PrecalculatedTextMeasurer:
    """Measure texts by badgepy's widths of DejaVu Sans, and letters that it has none of, as those of East Asia, as squares."""
    widths = json.loads(files(badgepy).joinpath("default-widths.json").read_bytes())
    return PrecalculatedTextMeasurer(_SQUARE, widths["character-lengths"], widths["kerning-pairs"])
