"""Charts as inline SVG: memory over time, a bar against a capacity, a strip of the blocks of a model.

Colours come from the style sheet by class, so that they follow the page into the dark and onto paper.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from harness import units
from harness.case import Phase, Timeline
from harness.report.axes import Axis, short
from harness.report.text import visible

POINTS = 400
WIDTH, HEIGHT = 720, 216
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 24, 24
# What a letter of a phase's label takes, in the units of the drawing.
_LETTER = 6.5
_MOST_BYTES = 1 << 80
_BLOCK = re.compile(r"(.*?)(\d+)((?:\.\D*)?)")


@dataclass(frozen=True)
class Series:
    """One line of the chart. `look` is its class in the style sheet."""

    name: str
    look: str
    values: Sequence[int]
    filled: bool = False


@dataclass(frozen=True)
class Scale:
    """From seconds and bytes to the drawing; the axis of time begins at `start`."""

    start: float
    since: Axis
    sizes: Axis

    def x(self, seconds: float) -> float:
        return self.since.at(seconds - self.start)

    def y(self, size: float) -> float:
        return self.sizes.at(size)


@dataclass(frozen=True)
class Group:
    """Consecutive modules of a device map that lie in one tier."""

    modules: str
    count: int
    tier: str

    @property
    def look(self) -> str:
        """The class of the tier's kind: gpu, cpu or disk."""
        return self.tier if self.tier in ("cpu", "disk", "meta") else "gpu"


def timeline(samples: Timeline | None, phases: Sequence[Phase], *, points: int = POINTS) -> Markup | None:
    """Draw memory over time with the phases as bands and their exact peaks as dashes; None where nothing recorded can be drawn."""
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
    title = Markup("<title>{}</title>").format(_summary(scale, lines))
    opening = Markup('<svg class="timeline" role="img" viewBox="0 0 {} {}">').format(WIDTH, HEIGHT)
    return opening + title + Markup("").join(body) + Markup("</svg>")


def decimate(times: Sequence[float], values: Sequence[int], limit: int) -> list[tuple[float, int]]:
    """Thin a series to at most `limit` points: the ends stay, and every stretch between keeps its highest point."""
    pairs = list(zip(times, values, strict=False))
    if len(pairs) <= limit:
        return pairs
    inner, stretches = pairs[1:-1], max(limit - 2, 1)
    edges = [len(inner) * i // stretches for i in range(stretches + 1)]
    highest = [max(inner[low:high], key=lambda pair: pair[1]) for low, high in itertools.pairwise(edges) if high > low]
    return [pairs[0], *highest, pairs[-1]]


def bar(size: float, capacity: float, *, firm: float | None = None, predicted: bool = False) -> Markup:
    """Draw `size` against `capacity`, `firm` being the part of it that must fit.

    A size beyond the capacity fills the bar; a tick then stands where the capacity ends.
    """
    full = max(size, capacity, 1)
    parts = [_rect("track", 100), _rect("guess" if predicted else "all", 100 * size / full)]
    if firm is not None:
        parts.append(_rect("firm", 100 * min(firm, size) / full))
    if size > capacity:
        parts.append(Markup('<path class="limit" d="M{0} -2V10"/>').format(short(100 * capacity / full)))
    opening = Markup('<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">')
    return opening + Markup("").join(parts) + Markup("</svg>")


def groups(device_map: Mapping[str, str]) -> list[Group]:
    """Collapse the consecutive blocks of a device map: model.layers.0 to 14 on cpu become one group."""
    found: list[Group] = []
    for (prefix, suffix, tier), run in itertools.groupby(device_map.items(), key=_place):
        names = [name for name, _ in run]
        numbers = [match[2] for name in names if (match := _BLOCK.fullmatch(name))]
        if prefix is None or len(numbers) < 2:
            found += [Group(modules=name or "the whole model", count=1, tier=tier) for name in names]
        else:
            found.append(Group(modules=f"{prefix}{numbers[0]}-{numbers[-1]}{suffix}", count=len(names), tier=tier))
    return found


def strip(found: Sequence[Group]) -> Markup:
    """Draw groups side by side, as wide as they have modules, coloured by the kind of tier."""
    total, at, parts = sum(group.count for group in found) or 1, 0.0, []
    for group in found:
        width = 100 * group.count / total
        title = f"{visible(group.modules)}: {visible(group.tier)}"
        cell = '<rect class="t-{}" x="{}" width="{}" height="8"><title>{}</title></rect>'
        parts.append(Markup(cell).format(group.look, short(at), short(width), title))
        at += width
    opening = Markup('<svg class="strip" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">')
    return opening + Markup("").join(parts) + Markup("</svg>")


def _place(item: tuple[str, str]) -> tuple[str | None, str, str]:
    match = _BLOCK.fullmatch(item[0])
    return (match[1], match[3], item[1]) if match else (None, "", item[1])


def series(samples: Timeline) -> list[Series]:
    ram = [Series("RAM", "ram", samples.ram_bytes, True), Series("anonymous RAM", "anon", samples.ram_anon_bytes, True)]
    vram = [Series(tier, f"vram{i % 3}", values) for i, (tier, values) in enumerate(samples.vram_bytes.items())]
    return [line for line in ram + vram if line.values and len(line.values) == len(samples.t_s)]


def _scale(times: Sequence[float], phases: Sequence[Phase], lines: Sequence[Series]) -> Scale | None:
    """Fit a drawing to times and sizes; None for those that lead out of the numbers, which nobody measures."""
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


def _bands(phases: Sequence[Phase], scale: Scale) -> Iterable[Markup]:
    band = '<g><title>{}</title><rect class="band b{}" x="{}" y="0" width="{}" height="{}"/>{}</g>'
    for i, (name, run) in enumerate(itertools.groupby(phases, key=lambda phase: phase.name)):
        rounds = list(run)
        left, right = scale.x(rounds[0].start_s), scale.x(rounds[-1].end_s)
        label = visible(name) + (f" ×{len(rounds)}" if len(rounds) > 1 else "")
        title = f"{label}: {units.format_seconds(rounds[-1].end_s - rounds[0].start_s)}"
        written = Markup('<text class="phase" x="{}" y="15">{}</text>').format(short(left + 5), label)
        shown = written if len(label) * _LETTER + 8 < right - left else Markup("")
        yield Markup(band).format(title, i % 2, short(left), short(right - left), HEIGHT - BOTTOM, shown)


def _grid(scale: Scale) -> Iterable[Markup]:
    for size in scale.sizes.ticks(6, _size_unit(scale.sizes.high)):
        mark = '<path class="grid" d="M{} {y}H{}"/><text class="size" x="{}" y="{}">{}</text>'
        y, label = scale.y(size), _tick(units.format_size(size)) if size else "0"
        yield Markup(mark).format(LEFT, WIDTH - RIGHT, LEFT - 6, short(y + 4), label, y=short(y))
    for seconds in scale.since.ticks(10, _time_unit(scale.since.high)):
        label = _tick(units.format_seconds(seconds)) if seconds else "0 s"
        x = short(scale.x(scale.start + seconds))
        yield Markup('<text class="time" x="{}" y="{}">{}</text>').format(x, HEIGHT - 7, label)


def _size_unit(top: float) -> int:
    return next((unit for unit in (units.GIB, units.MIB, units.KIB) if top >= unit), 1)


def _time_unit(span: float) -> float:
    return next((unit for unit, least in ((3600, 3 * 3600), (60, 180), (1, 1)) if span >= least), 0.001)


def _tick(text: str) -> str:
    """Drop what a round value does not need: "2.00 GiB" becomes "2 GiB", "5 min 00 s" becomes "5 min"."""
    return re.sub(r"\.0+ |(\.\d*?)0+ ", lambda match: f"{match[1] or ''} ", re.sub(" 00 (s|min)$", "", text))


def _path(line: Series, points: Sequence[tuple[float, int]], scale: Scale) -> Markup:
    drawn = _without_flat([(short(scale.x(t)), short(scale.y(size))) for t, size in points])
    path = "M" + "L".join(f"{x} {y}" for x, y in drawn)
    if line.filled:
        path += f"V{HEIGHT - BOTTOM}H{drawn[0][0]}Z"
    return Markup('<path class="{}" d="{}"/>').format(line.look, path)


def _without_flat(points: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out the points in the middle of a level stretch: most of a model's life is one."""
    last = len(points) - 1
    return [point for i, point in enumerate(points) if i in (0, last) or not (points[i - 1][1] == point[1] == points[i + 1][1])]


def _peaks(phases: Sequence[Phase], scale: Scale) -> Iterable[Markup]:
    for phase in phases:
        if phase.ram_peak_bytes is not None:
            left, right, y = scale.x(phase.start_s), scale.x(phase.end_s), scale.y(phase.ram_peak_bytes)
            yield Markup('<path class="peak" d="M{} {}H{}"/>').format(short(left), short(y), short(max(right, left + 2)))


def _summary(scale: Scale, lines: Sequence[Series]) -> str:
    highest = ", ".join(f"{visible(line.name)} up to {units.format_size(max(line.values))}" for line in lines)
    return f"Memory over {units.format_seconds(scale.since.high)}: {highest or 'no samples, only the peaks of the phases'}"


def _rect(look: str, width: float) -> Markup:
    return Markup('<rect class="{}" width="{}" height="8"/>').format(look, short(width))
