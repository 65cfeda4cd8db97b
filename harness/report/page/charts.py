"""Charts as inline SVG: memory over time, a bar against a capacity, a strip of the blocks of a model.

Colors come from the style sheet by class, so that they follow the page into the dark and onto paper. The module of axes says
why no library draws them.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from markupsafe import Markup, escape

from harness.core import units
from harness.core.metrics import phase_title
from harness.core.records import Phase, Timeline
from harness.core.text import visible
from harness.report.html import as_html
from harness.report.page.axes import Axis, short

POINTS = 400
WIDTH, HEIGHT = 720, 216
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 24, 24
# What a letter of a label takes, in the units of the drawing.
_LETTER = 6.5
_MOST_BYTES = 1 << 80
_BLOCK = re.compile(r"(.*?)(\d+)((?:\.\D*)?)")


class Series(msgspec.Struct, frozen=True, gc=False):
    """One line of the chart. `look` is its class in the style sheet."""

    name: str
    look: str
    values: Sequence[int]
    filled: bool = False


class Scale(msgspec.Struct, frozen=True, gc=False):
    """From seconds and bytes to the drawing; the axis of time begins at `start`."""

    start: float
    since: Axis
    sizes: Axis

    def x(self, seconds: float) -> float:
        return self.since.at(seconds - self.start)

    def y(self, size: float) -> float:
        return self.sizes.at(size)


class Group(msgspec.Struct, frozen=True, gc=False):
    """Consecutive modules of a device map that lie in one tier."""

    modules: str
    count: int
    tier: str

    @property
    def look(self) -> str:
        """The class of the tier's kind: gpu, cpu or disk."""
        return self.tier if self.tier in ("cpu", "disk", "meta") else "gpu"


def timeline(samples: Timeline | None, phases: Sequence[Phase], *, points: int = POINTS) -> Markup | None:
    """Draw memory over time with the phases as bands and their exact peaks as dashes; None if nothing recorded can be shown."""
    lines = series(samples) if samples else []
    if not phases and not lines:
        return None
    times = samples.t_s if samples else []
    scale = _scale(times, phases, lines)
    if scale is None:
        return None
    body = [*_bands(phases, scale), *_grid(scale)]
    body += [_path(line, decimate(times, line.values, points), scale) for line in lines]
    body += _peaks(phases, scale)
    title = escape(_summary(scale, lines))
    opening = f'<svg class="timeline" role="img" viewBox="0 0 {WIDTH} {HEIGHT}"><title>{title}</title>'
    return Markup(f"{opening}{''.join(body)}</svg>")


def decimate(times: Sequence[float], values: Sequence[int], limit: int) -> list[tuple[float, int]]:
    """Thin a series to at most `limit` points: the ends stay, and every stretch between keeps its highest point."""
    last = min(len(times), len(values)) - 1
    if last < limit:
        return list(zip(times, values, strict=False))
    highest = [values.index(max(values[low:high]), low, high) for low, high in _stretches(last, max(limit - 2, 1))]
    return [(times[i], values[i]) for i in (0, *highest, last)]


@functools.lru_cache(64)  # all lines of a drawing, and drawings of equal length, are cut alike
def _stretches(last: int, count: int) -> tuple[tuple[int, int], ...]:
    """Cut what lies between the first and the last of a series into as many stretches of about equal length, none empty."""
    edges = [1 + (last - 1) * i // count for i in range(count + 1)]
    return tuple((low, high) for low, high in itertools.pairwise(edges) if high > low)


def bar(size: float, capacity: float, *, firm: float | None = None, predicted: bool = False) -> Markup:
    """Draw `size` against `capacity`, `firm` being the part of it that must fit.

    A size beyond the capacity fills the bar; a tick then stands where the capacity ends.
    """
    full = max(size, capacity, 1)
    width = short(100 * size / full)
    parts = ['<rect class="track" width="100%"/>']
    if predicted:
        parts.append(f'<line class="hatch" x2="{width}%" y1="50%" y2="50%"/><rect class="guess" width="{width}%"/>')
    elif firm is None or firm < size:
        parts.append(f'<rect class="all" width="{width}%"/>')
    if firm is not None:
        parts.append(f'<rect class="firm" width="{short(100 * min(firm, size) / full)}%"/>')
    if size > capacity:
        tick = short(100 * capacity / full)
        parts.append(f'<line class="limit" x1="{tick}%" x2="{tick}%" y1="-25%" y2="125%"/>')
    return Markup(f'<svg class="bar" aria-hidden="true">{"".join(parts)}</svg>')


def groups(device_map: Mapping[str, str]) -> list[Group]:
    """Collapse the consecutive blocks of a device map: model.layers.0 to 14 on cpu become one group."""
    found: list[Group] = []
    for (prefix, suffix, tier), run in itertools.groupby(device_map.items(), key=_block_of):
        names = [name for name, _ in run]
        numbers = [match[2] for name in names if (match := _BLOCK.fullmatch(name))]
        if prefix is None or len(numbers) < 2:
            found += [Group(modules=name or "the whole model", count=1, tier=tier) for name in names]
        else:
            found.append(Group(modules=f"{prefix}{numbers[0]}-{numbers[-1]}{suffix}", count=len(names), tier=tier))
    return found


def strip(found: Sequence[Group]) -> Markup:
    """Draw groups side by side, as wide as they have modules, colored by the kind of tier."""
    total, at, parts = sum(group.count for group in found) or 1, 0.0, []
    for group in found:
        width = 100 * group.count / total
        title = escape(f"{visible(group.modules)}: {visible(group.tier)}")
        where = f'x="{short(at)}%" width="{short(width)}%"'
        parts.append(f'<rect class="t-{group.look}" {where}><title>{title}</title></rect>')
        at += width
    return Markup(f'<svg class="strip" aria-hidden="true">{"".join(parts)}</svg>')


def _block_of(item: tuple[str, str]) -> tuple[str | None, str, str]:
    match = _BLOCK.fullmatch(item[0])
    return (match[1], match[3], item[1]) if match else (None, "", item[1])


def series(samples: Timeline) -> list[Series]:
    ram = [Series("RAM", "ram", samples.ram_bytes, True), Series("anonymous RAM", "anon", samples.ram_anon_bytes, True)]
    vram = [Series(tier, f"vram{i % 3}", values) for i, (tier, values) in enumerate(samples.vram_bytes.items())]
    return [line for line in ram + vram if line.values and len(line.values) == len(samples.t_s)]


def _scale(times: Sequence[float], phases: Sequence[Phase], lines: Sequence[Series]) -> Scale | None:
    """Fit a drawing to times and sizes; None if they exceed the range of numbers."""
    moments = [*times[:1], *times[-1:], *(moment for phase in phases for moment in (phase.start_s, phase.end_s))]
    start, end = min(moments, default=0.0), max(moments, default=0.0)
    sizes = [max(line.values) for line in lines] + [phase.ram_peak_bytes or 0 for phase in phases]
    if not math.isfinite(WIDTH * (end - start)) or not math.isfinite(start * WIDTH) or max(sizes, default=0) > _MOST_BYTES:
        return None
    span = end - start if end > start else 1
    return Scale(
        start=start,
        since=Axis(low=0, high=span, start=LEFT, end=WIDTH - RIGHT),
        sizes=Axis(low=0, high=max([*sizes, 1]) * 1.08, start=HEIGHT - BOTTOM, end=TOP),
    )


def _bands(phases: Sequence[Phase], scale: Scale) -> Iterable[str]:
    for i, (name, run) in enumerate(itertools.groupby(phases, key=lambda phase: phase.name)):
        rounds = list(run)
        left, right = scale.x(rounds[0].start_s), scale.x(rounds[-1].end_s)
        label = visible(phase_title(name)) + (f" ×{len(rounds)}" if len(rounds) > 1 else "")
        said = as_html(label)
        frame = f'<rect class="band b{i % 2}" x="{short(left)}" y="0" width="{short(right - left)}" height="{HEIGHT - BOTTOM}"/>'
        wide = len(label) * _LETTER + 8 < right - left
        written = f'<text class="phase" x="{short(left + 5)}" y="15">{said}</text>' if wide else ""
        took = units.format_seconds(rounds[-1].end_s - rounds[0].start_s)
        yield f"<g><title>{said}: {took}</title>{frame}{written}</g>"


def _grid(scale: Scale) -> Iterable[str]:
    for size in scale.sizes.ticks(6, _size_unit(scale.sizes.high)):
        y, label = scale.y(size), _size_label(size)
        yield f'<path class="grid" d="M{LEFT} {short(y)}H{WIDTH - RIGHT}"/>'
        yield f'<text class="size" x="{LEFT - 6}" y="{short(y + 4)}">{label}</text>'
    for seconds in scale.since.ticks(10, _time_unit(scale.since.high)):
        # A label in the middle of the last tick would be cut off by the edge.
        label = _time_label(seconds)
        x = min(scale.since.at(seconds), WIDTH - len(label) * _LETTER / 2)
        yield f'<text class="time" x="{short(x)}" y="{HEIGHT - 7}">{label}</text>'


def _size_unit(top: float) -> int:
    return next((unit for unit in (units.GIB, units.MIB, units.KIB) if top >= unit), 1)


def _time_unit(span: float) -> float:
    return next((unit for unit, least in ((3600, 3 * 3600), (60, 180), (1, 1)) if span >= least), 0.001)


# Round values, and so the same few in every drawing.
@functools.lru_cache(1024)
def _size_label(size: float) -> str:
    return _tick(units.format_size(size)) if size else "0"


@functools.lru_cache(1024)
def _time_label(seconds: float) -> str:
    return _tick(units.format_seconds(seconds)) if seconds else "0 s"


def _tick(text: str) -> str:
    """Drop what a round value does not need: "2.00 GiB" becomes "2 GiB", "5 min 00 s" becomes "5 min"."""
    return re.sub(r"\.0+ |(\.\d*?)0+ ", lambda match: f"{match[1] or ''} ", re.sub(" 00 (s|min)$", "", text))


class _Tenths(dict[int, str]):
    """How tenths of the drawing's units are written: a page of thousands of drawings says the same ones again and again."""

    def __missing__(self, tenths: int) -> str:
        written = short(tenths / 10)
        if 0 <= tenths <= 10 * WIDTH:
            self[tenths] = written
        return written


_WRITTEN = _Tenths()


def _path(line: Series, points: Sequence[tuple[float, int]], scale: Scale) -> str:
    # Both axes are linear: two of their places give all, here in tenths, for each point counts on such a page.
    left, bottom = scale.x(0), scale.y(0)
    wide, high = 10 * (scale.x(1) - left), 10 * (scale.y(units.GIB) - bottom) / units.GIB
    left, bottom = 10 * left + 0.5, 10 * bottom + 0.5  # so that what is cut off rounds
    written = _WRITTEN
    drawn = _corners([int(left + wide * t) for t, _ in points], [int(bottom + high * size) for _, size in points])
    path = "M" + "L".join([f"{written[x]} {written[y]}" for x, y in drawn])
    if line.filled:
        path += f"V{HEIGHT - BOTTOM}H{written[drawn[0][0]]}Z"
    return f'<path class="{line.look}" d="{path}"/>'


def _corners(xs: Sequence[int], ys: Sequence[int]) -> list[tuple[int, int]]:
    """Leave out the points in the middle of a stretch that is level to a tenth: most of a model's life is one."""
    points = list(zip(xs, ys, strict=True))
    between = zip(ys, ys[1:], ys[2:], points[1:], strict=False)
    return [points[0], *[point for before, at, after, point in between if not before == at == after], *points[1:][-1:]]


def _peaks(phases: Sequence[Phase], scale: Scale) -> Iterable[str]:
    for phase in phases:
        if phase.ram_peak_bytes is not None:
            left, right, y = scale.x(phase.start_s), scale.x(phase.end_s), scale.y(phase.ram_peak_bytes)
            yield f'<path class="peak" d="M{short(left)} {short(y)}H{short(max(right, left + 2))}"/>'


def _summary(scale: Scale, lines: Sequence[Series]) -> str:
    highest = ", ".join(f"{visible(line.name)} up to {units.format_size(max(line.values))}" for line in lines)
    return f"Memory over {units.format_seconds(scale.since.high)}: {highest or 'not sampled, only the peak of each phase'}"
