"""Memory against speed, drawn: a point for each case that works, its shape the quality of its answers, and the Pareto front.

The drawing is as wide as the page lets it be: across, places are shares of its width, so that text and marks keep their size. The
module of axes says why no library draws it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
from markupsafe import Markup, escape

from harness.core.text import line
from harness.core.units import GIB, format_gib, format_size, significant, significant_step
from harness.report.html import as_html
from harness.report.page import labels
from harness.report.page.axes import Axis, is_drawable, percent, rounded, short, text_width, tick_texts
from harness.report.page.figures import MemoryFigure
from harness.report.page.view import Cell
from harness.results.selection import is_sound

PANEL_HEIGHT = 300
HEIGHT_OF_SEVERAL = 210
# Marks on the axis of memory, about; and how many steps of the last figure that is written the axis spans at least.
TICKS, LEAST_STEPS = 4, 20
# Speeds that differ by more than this factor are drawn on a log scale.
MOST_LINEAR = 10
# More names than these make a drawing unreadable.
MOST_NAMES = 16
NAME_LETTERS = 40
SHAPES = ("intact", "degraded", "broken", "not checked")


class Point(msgspec.Struct, frozen=True, gc=False):
    """One case that works: the peak of its memory in bytes, its decode speed in tokens/s, and how its answers are."""

    cell: Cell
    memory: MemoryFigure
    name: str
    size: float
    speed: float
    shape: str
    is_sound: bool

    @property
    def gib(self) -> str:
        """Write the memory in GiB."""
        return format_gib(self.size)

    @property
    def rate(self) -> str:
        """Write the speed in tokens/s."""
        return significant(self.speed)


class Scales(msgspec.Struct, frozen=True, gc=False):
    """From bytes to shares of the width, from tokens/s to pixels down."""

    sizes: Axis
    speeds: Axis

    @property
    def height(self) -> float:
        return self.speeds.start

    def x(self, size: float) -> str:
        return percent(self.sizes.at(size))

    def y(self, speed: float) -> str:
        return short(self.speeds.at(speed))


@dataclass(frozen=True)
class Panel:
    """The points that are judged by one kind of memory, least memory first: drawn, in numbers for a table, and in a sentence."""

    kind: str
    drawing: Markup
    height: float
    points: tuple[Point, ...]
    numbers: Markup
    sentence: str


def panels(cells: Iterable[Cell]) -> list[Panel]:
    """Draw a panel for each kind of memory that two cases or more are judged by, all on one scale of speed."""
    by_kind: dict[str, list[Point]] = {}
    for cell in cells:
        if point := _point(cell):
            by_kind.setdefault(point.memory.kind, []).append(point)
    shown = {kind: sorted(found, key=lambda point: point.size) for kind, found in by_kind.items() if len(found) > 1}
    if not shown:
        return []
    speeds = _speeds(
        [point.speed for found in shown.values() for point in found], PANEL_HEIGHT if len(shown) == 1 else HEIGHT_OF_SEVERAL
    )
    return [_panel(kind, found, speeds) for kind, found in shown.items()]


def front(points: Iterable[Point]) -> list[Point]:
    """Choose the sound cases that no other sound case beats in memory or speed without losing in the other; least memory first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.size, -point.speed)):
        if point.is_sound and (not found or point.speed > found[-1].speed):
            found.append(point)
    return found


def name(cell: Cell) -> str:
    """Name a case as its point is labeled: int4/cpu."""
    return line(cell.result.case.way, NAME_LETTERS)


def _point(cell: Cell) -> Point | None:
    if not cell.status.measured or not cell.memory or cell.memory.predicted:
        return None
    size, speed = cell.memory.need.number, cell.speed.number
    if not is_drawable(size) or not is_drawable(speed):
        return None
    shape = cell.quality if cell.quality in SHAPES else "not checked"
    return Point(cell, cell.memory, name(cell), size, speed, shape, is_sound(cell.result))


def _speeds(speeds: Sequence[float], height: float) -> Axis:
    low, high = min(speeds), max(speeds)
    if high > MOST_LINEAR * low:
        return Axis(low=low / 1.4, high=high * 1.4, start=height, end=0, log=True)
    return Axis(low=0, high=high * 1.12, start=height, end=0)


def _sizes(sizes: Sequence[float], capacities: Iterable[float]) -> Axis:
    """Lay out sizes between round ends; a capacity that is not far beyond them is taken in as well.

    Sizes that are written alike lie beside each other: the axis spans as many steps of the last figure as make it wide.
    """
    low, high = min(sizes), max(sizes)
    high = max([high, *(size for size in capacities if size < 1.3 * high)])
    margin = 0.08 * (high - low)
    low, high = 0 if low < 0.4 * high else low - margin, high + margin
    low, high = rounded(low, high, TICKS, GIB, LEAST_STEPS * significant_step(max(sizes) / GIB) * GIB)
    return Axis(low=low, high=high, start=0, end=1)


def _panel(kind: str, points: Sequence[Point], speeds: Axis) -> Panel:
    capacities = {point.memory.capacity.number for point in points if point.memory.capacity}
    scales, best = Scales(_sizes([point.size for point in points], capacities), speeds), front(points)
    in_front = set(map(id, best))
    others = [point for point in points if id(point) not in in_front]
    drawn = [size for size in sorted(capacities) if scales.sizes.low < size < scales.sizes.high]
    parts = [*_grid(kind, scales), *_steps(best, scales), *_capacities(drawn, scales)]
    parts += [_mark(point, scales) for point in (*others, *best)]
    parts += _names(best, others, scales, [*_room_of_steps(best, scales), *(_room_of_capacity(size, scales) for size in drawn)])
    numbers = [_numbers(point, id(point) in in_front) for point in points]
    return Panel(kind, Markup("".join(parts)), scales.height, tuple(points), Markup("".join(numbers)), _in_words(best))


def _grid(kind: str, scales: Scales) -> Iterable[str]:
    speeds, sizes = scales.speeds.ticks(5), [size / GIB for size in scales.sizes.ticks(TICKS, GIB)]
    bottom, log = scales.height, ", log scale" if scales.speeds.log else ""
    yield '<g class="axes" aria-hidden="true">'
    for speed, text in zip(speeds, tick_texts(scales.speeds, speeds), strict=True):
        y = scales.speeds.at(speed)
        yield f'<line class="grid" x2="100%" y1="{short(y)}" y2="{short(y)}"/>'
        yield f'<text class="end" x="-8" y="{short(y + 4)}">{text}</text>'
    for size, text in zip(sizes, tick_texts(scales.sizes, sizes), strict=True):
        x = scales.x(size * GIB)
        yield f'<line class="grid" x1="{x}%" x2="{x}%" y2="{short(bottom)}"/>'
        yield f'<text class="middle" x="{x}%" y="{short(bottom + 18)}">{text}</text>'
    yield f'<text x="-44" y="-12">tokens/s{log}</text><text class="end" x="100%" y="-12">↖ is better</text>'
    yield f'<text class="end" x="100%" y="{short(bottom + 36)}">{as_html(kind)} needed, GiB</text></g>'


def _capacity(size: float) -> str:
    return f"{format_size(size)} free"


def _room_of_capacity(size: float, scales: Scales) -> labels.Box:
    share, width = scales.sizes.at(size), text_width(_capacity(size), labels.LETTER)
    return labels.Box((share, -6 - width), (share, 3), 0, 22)


def _capacities(found: Iterable[float], scales: Scales) -> Iterable[str]:
    for size in found:
        x = scales.x(size)
        yield f'<line class="capacity" x1="{x}%" x2="{x}%" y2="{short(scales.height)}"/>'
        yield f'<text class="end" x="{x}%" dx="-6" y="16">{_capacity(size)}</text>'


def _steps(best: Sequence[Point], scales: Scales) -> Iterable[str]:
    """Draw the highest speed at each amount of memory."""
    if best:
        height = short(scales.height)
        path = "".join(f"H{scales.x(point.size)}V{scales.y(point.speed)}" for point in best)
        yield f'<svg viewBox="0 0 100 {height}" preserveAspectRatio="none">'
        yield f'<path class="front" d="M{scales.x(best[0].size)} {height}{path}H100"/></svg>'


def _room_of_steps(best: Sequence[Point], scales: Scales) -> Iterable[labels.Box]:
    """Return the room that the steps take but where their points are: to the right of each and below it."""
    ends = [*(scales.sizes.at(point.size) for point in best[1:]), 1.0]
    floors = [scales.height, *(scales.speeds.at(point.speed) for point in best)]
    for point, end, floor in zip(best, ends, floors, strict=False):
        x, y = scales.sizes.at(point.size), scales.speeds.at(point.speed)
        yield labels.Box((x, 0), (end, 0), y - 2, y + 2)
        yield labels.Box((x, -2), (x, 2), y, floor)


def _mark(point: Point, scales: Scales) -> str:
    noisy = ", noisy" if point.cell.speed.noisy else ""
    title = escape(f"{point.name}: {point.gib} GiB {point.memory.kind}, {point.cell.speed.text}{noisy}, {point.shape}")
    place = f'x="{scales.x(point.size)}%" y="{scales.y(point.speed)}"'
    ring = f'<use href="#q-noisy" {place}/>' if noisy else ""
    mark = f'<use href="#q-{point.shape.replace(" ", "-")}" {place}/>'
    return f'<a href="#{as_html(point.cell.anchor)}"><title>{title}</title>{ring}{mark}</a>'


def _names(best: Sequence[Point], others: Sequence[Point], scales: Scales, taken: Sequence[labels.Box]) -> Iterable[str]:
    """Write the names of the front, then of others, where there is room."""
    points = [*best, *others]
    marks = [labels.mark(scales.sizes.at(point.size), scales.speeds.at(point.speed)) for point in points]
    wanted = {number: point.name for number, point in enumerate(points[:MOST_NAMES])}
    yield '<g class="names" aria-hidden="true">'
    for number, label in labels.place(marks, wanted, scales.height, taken).items():
        point = points[number]
        looks = {label.anchor: label.anchor != "start", "best": number < len(best), "roomy": label.is_roomy}
        look = " ".join(name for name, is_so in looks.items() if is_so)
        y = short(scales.speeds.at(point.speed) + label.dy + 4)
        where = f'data-of="{as_html(point.cell.anchor)}" x="{scales.x(point.size)}%" dx="{short(label.dx)}" y="{y}"'
        yield f'<text class="{look}" {where}>{as_html(point.name)}</text>'
    yield "</g>"


def _numbers(point: Point, is_in_front: bool) -> str:
    """Write a row of the table: name, memory in GiB, tokens/s, answers."""
    size, speed = point.memory.need.value, point.cell.speed.value
    noisy = '<em class="doubt">noisy</em> ' if point.cell.speed.noisy else ""
    figures = f'<td><data value="{size}">{point.gib}</data></td><td>{noisy}<data value="{speed}">{point.rate}</data></td>'
    place = ", on the front" if is_in_front else ""
    return f'<tr><th scope="row">{as_html(point.name)}</th>{figures}<td>{point.shape}{place}</td></tr>\n'


def _in_words(best: Sequence[Point]) -> str:
    if not best:
        return "No case here works with sound answers."
    least, fastest = best[0], best[-1]
    if least is fastest:
        return f"{least.name} uses the least memory ({least.memory.need.text}) and is the fastest ({least.cell.speed.text})."
    return (
        f"{least.name} uses the least memory ({least.memory.need.text}, {least.cell.speed.text}), "
        f"{fastest.name} is the fastest ({fastest.cell.speed.text}, {fastest.memory.need.text})."
    )
