"""A checkpoint as a page: a treemap of its bytes, and the same in tables.

Area is bytes. A run of blocks that are alike is one frame with a rectangle for each block, cut into kinds of module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import squarify
from markupsafe import Markup

from harness.architecture.inspection import KIND_ORDER, BlockRun, Inspection, explain, largest, runs
from harness.checkpoint.size_breakdown import SizePart
from harness.core.text import plural, visible
from harness.core.units import format_count, format_share, format_size
from harness.report.page.axes import short
from harness.report.page.render import template

TREEMAP_WIDTH, TREEMAP_HEIGHT = 1200, 620
# More parts, or more blocks drawn one by one, than these make a page slow and tell nothing.
MOST_PARTS = 400
MOST_BLOCKS = 512
MOST_TIES = 20
# Smaller shares of an area cannot be seen, and squarify divides by what rounding leaves for them, which may be nothing.
LEAST_SHARE = 1e-7
_CAPTION, _GAP = 20, 3
_LINE, _LETTER = 15, 6.6


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of the drawing."""

    x: float
    y: float
    width: float
    height: float

    def inside(self, gap: float, top: float = 0) -> Rectangle:
        """Return what is left within a margin of `gap`, and `top` more above; all of it if nothing would be left."""
        if self.width < 4 * gap or self.height < 4 * gap + top:
            return self
        return Rectangle(self.x + gap, self.y + gap + top, self.width - 2 * gap, self.height - 2 * gap - top)


def render_treemap(inspection: Inspection) -> str:
    """Render a checkpoint as one page that loads nothing."""
    shown = largest(inspection.parts, MOST_PARTS)
    return template("inspect.html.j2").render(
        title=f"Inside {inspection.name}",
        of=inspection,
        treemap=draw(shown, inspection.bytes),
        kinds=_kinds(inspection.parts),
        runs=runs(shown),
        hidden=len(inspection.parts) - len(shown),
        ties=[explain(tie, format_size(tie.extra_bytes)) for tie in inspection.ties[:MOST_TIES]],
        more_ties=max(len(inspection.ties) - MOST_TIES, 0),
    )


def draw(parts: Sequence[SizePart], total: int) -> Markup:
    """Draw parts as a treemap; `total` bytes are what shares are of."""
    ordered = sorted((run for run in _apart(runs(parts)) if run.bytes), key=lambda run: -run.bytes)
    one_by_one = sum(run.repeats for run in ordered) <= MOST_BLOCKS
    places = divide([run.bytes for run in ordered], Rectangle(0, 0, TREEMAP_WIDTH, TREEMAP_HEIGHT))
    drawn = [piece for run, box in zip(ordered, places, strict=True) for piece in _run(run, box, total, one_by_one)]
    label = f"Treemap of {format_size(total)} in {plural(len(parts), 'part')}; the table below says the same"
    opening = Markup('<svg class="treemap" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(
        label, TREEMAP_WIDTH, TREEMAP_HEIGHT
    )
    return opening + Markup("").join(drawn) + Markup("</svg>")


def divide(sizes: Sequence[float], box: Rectangle) -> list[Rectangle]:
    """Divide a box among sizes, largest first, into rectangles as square as can be; sizes too small to be seen get none of it."""
    least = LEAST_SHARE * sum(sizes)
    seen = [size for size in sizes if size > least] if box.width > 0 and box.height > 0 else []
    areas = squarify.normalize_sizes(seen, box.width, box.height)
    found = squarify.squarify(areas, box.x, box.y, box.width, box.height)
    boxes = [Rectangle(place["x"], place["y"], place["dx"], place["dy"]) for place in found]
    return boxes + [Rectangle(box.x, box.y, 0, 0)] * (len(sizes) - len(seen))


def grid(count: int, box: Rectangle) -> Iterator[Rectangle]:
    """Divide a box into `count` equal areas in reading order, about square; rows differ by one in how many they hold."""
    rows = min(max(round(math.sqrt(count * box.height / max(box.width, 1e-9))), 1), count)
    y = box.y
    for number in range(rows):
        columns = count // rows + (number < count % rows)
        height = box.height * columns / count
        yield from (Rectangle(box.x + box.width * place / columns, y, box.width / columns, height) for place in range(columns))
        y += height


def _apart(found: Sequence[BlockRun]) -> Iterator[BlockRun]:
    """Give each part outside the blocks a place of its own: nothing holds them together."""
    for run in found:
        if run.block:
            yield run
        else:
            yield from (BlockRun(block="", repeats=1, parts=(part,)) for part in run.parts)


def _run(run: BlockRun, box: Rectangle, total: int, one_by_one: bool) -> Iterator[Markup]:
    """Draw the frame of a run, and in it its blocks."""
    if not run.block:
        yield from _kinds_of(run, 1, box, "", total)
        return
    many = f", {plural(run.repeats, 'block')}" if run.repeats > 1 else ""
    caption = f"{visible(run.block)}{many}, {format_size(run.bytes)}"
    frame = '<g><title>{}</title><rect class="run" x="{}" y="{}" width="{}" height="{}"/></g>'
    title = f"{caption} ({format_share(run.bytes / total)})"
    yield Markup(frame).format(title, *_numbers(box))
    has_caption = box.height > 3 * _CAPTION and box.width > 60
    if has_caption:
        yield _text("caption", box.x + 6, box.y + 15, _fitted(caption, box.width - 12))
    inner = box.inside(_GAP, _CAPTION - _GAP if has_caption else 0)
    count = run.repeats if one_by_one else 1
    for name, place in zip(_names(run, count), grid(count, inner), strict=True):
        yield from _kinds_of(run, count, place.inside(1), name, total)


def _names(run: BlockRun, count: int) -> list[str]:
    """Name the blocks of a run that are drawn: "model.layers.7", or the run where it is drawn as one."""
    if count == 1:
        return [run.block]
    prefix, _, numbers = run.block.rpartition(".")
    spans = [span.partition("-") for span in numbers.split(",")]
    return [f"{prefix}.{number}" for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


def _kinds_of(run: BlockRun, count: int, box: Rectangle, name: str, total: int) -> Iterator[Markup]:
    """Draw one of `count` equal blocks of a run: a rectangle for each kind of module."""
    ordered = sorted(run.parts, key=lambda part: -part.bytes)
    for part, place in zip(ordered, divide([part.bytes for part in ordered], box), strict=True):
        yield _cell(part, count, place, name, part is ordered[0] and count > 1, total)


def _cell(part: SizePart, count: int, box: Rectangle, name: str, is_numbered: bool, total: int) -> Markup:
    size = part.bytes / count
    where = f"{visible(name)}: " if name else ""
    title = f"{where}{part.kind}, {format_count(part.parameters // count)} parameters, {format_size(size)}"
    opening = '<g class="m-{}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/>'
    cell = Markup(opening).format(part.kind, f"{title} ({format_share(size / total)})", *_numbers(box))
    number = name.rpartition(".")[2] if is_numbered else ""
    return cell + Markup("").join(_labels(part.kind, number, format_size(size), box)) + Markup("</g>")


def _labels(kind: str, number: str, size: str, box: Rectangle) -> Iterator[Markup]:
    """Write into a rectangle what has room there: the kind, then the number of its block, then the size."""
    room = box.width - 10
    if box.height < _LINE + 5 or len(kind) * _LETTER > room:
        return
    label = f"{kind} {number}" if number and (len(kind) + len(number) + 1) * _LETTER <= room else kind
    yield _text("", box.x + 5, box.y + _LINE, label)
    if box.height >= 2 * _LINE + 5 and len(size) * _LETTER <= room:
        yield _text("small", box.x + 5, box.y + 2 * _LINE, size)


def _text(look: str, x: float, y: float, text: str) -> Markup:
    named = Markup(' class="{}"').format(look) if look else Markup("")
    return Markup('<text{} x="{}" y="{}">{}</text>').format(named, short(x), short(y), text)


def _fitted(text: str, width: float) -> str:
    """Cut a text at its end to about `width`; letters of East Asia are wider and may be cut by the frame."""
    most = max(int(width / _LETTER), 1)
    return text if len(text) <= most else text[: most - 1] + "…"


def _kinds(parts: Sequence[SizePart]) -> list[tuple[str, int]]:
    """Add up the bytes by kind, in KIND_ORDER, for the legend."""
    sums = {kind: sum(part.bytes for part in parts if part.kind == kind) for kind in KIND_ORDER}
    return [(kind, size) for kind, size in sums.items() if size]


def _numbers(box: Rectangle) -> tuple[str, str, str, str]:
    return short(box.x), short(box.y), short(box.width), short(box.height)
