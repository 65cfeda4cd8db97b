"""What was measured against what was predicted, drawn: a row for each case, with its memory and its speed over the prediction.

The style sheet lays out the rows and folds them on a telephone; the module of axes says why no library draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from markupsafe import Markup, escape

from harness.core.metrics import METRICS
from harness.core.records import Outcome, Span
from harness.core.text import plural
from harness.core.units import format_gib, significant
from harness.report.html import as_html
from harness.report.page.axes import Axis, is_drawable, percent
from harness.report.page.figures import Figure, metric, predictions, surprise
from harness.report.page.tradeoff import name
from harness.report.page.view import Cell

# How far from the prediction is still close.
CLOSE = 0.1
# More rows than these tell nothing that the table does not.
MOST_ROWS = 24
# How many times more or less the axis reaches, and the ratios that are marked on it.
_RANGES: tuple[tuple[float, Mapping[float, str]], ...] = (
    (1.4, {0.8: "−20 %", 1.0: "0", 1.25: "+25 %"}),
    (2.5, {0.5: "÷2", 1.0: "×1", 2.0: "×2"}),
    (5.0, {0.25: "÷4", 0.5: "", 1.0: "×1", 2.0: "", 4.0: "×4"}),
    (10.0, {0.125: "÷8", 0.5: "", 1.0: "×1", 2.0: "", 8.0: "×8"}),
)


class Check(msgspec.Struct, frozen=True, gc=False):
    """One figure of a case against what was expected of it; where the case ran out of memory it needs at least as much."""

    figure: Figure
    expected: Span
    ratio: float  #: how many times the prediction was measured
    at_least: bool = False

    @property
    def is_close(self) -> bool:
        return abs(self.ratio - 1) <= CLOSE

    @property
    def has_held(self) -> bool:
        """Tell whether the interval held what was measured; a prediction without one is held to what is close."""
        return self.expected.low <= self.figure.number <= self.expected.high if self.has_interval else self.is_close

    @property
    def has_interval(self) -> bool:
        return self.expected.low < self.expected.high

    @property
    def look(self) -> str:
        """Name the mark: held or missed by the prediction, or "more" where more may have been needed."""
        return "more" if self.at_least else "held" if self.has_held else "missed"

    @property
    def off(self) -> str:
        """Say how far from the prediction, in percent up to twice or half of it; "≥ " before what may be more."""
        if self.ratio < 0.5:
            text = f"÷{significant(1 / self.ratio, 2)}"
        elif self.ratio > 2:
            text = f"×{significant(self.ratio, 2)}"
        else:
            whole = round(100 * self.ratio - 100)
            text = f"{whole:+d} %".replace("-", "−") if whole else "0 %"
        return f"≥ {text}" if self.at_least else text

    @property
    def measured(self) -> str:
        """Write what was measured, in GiB or tokens/s."""
        return self._write(self.figure.number)

    @property
    def predicted(self) -> str:
        """Write what was predicted, in GiB or tokens/s."""
        return self._write(self.expected.best)

    @property
    def interval(self) -> str:
        """Write the interval of the prediction, in GiB or tokens/s; empty if it has none."""
        ends = (self._write(end) for end in (self.expected.low, self.expected.high))
        return "\N{EN DASH}".join(ends) if self.has_interval else ""

    def _write(self, value: float) -> str:
        return format_gib(value) if METRICS[self.figure.key].unit == "bytes" else significant(value)


class ForecastRow(msgspec.Struct, frozen=True, gc=False):
    """One case, its memory and its speed against the prediction, and whether the plan was wrong about what fits."""

    cell: Cell
    name: str
    memory: Check | None
    speed: Check | None
    surprise: str

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(check for check in (self.memory, self.speed) if check)


@dataclass(frozen=True)
class Forecast:
    """All rows, in numbers for a table, and the farthest off drawn; `ground` lies behind a column of marks, `scale` above it."""

    rows: tuple[ForecastRow, ...]
    numbers: Markup
    drawn: tuple[tuple[ForecastRow, tuple[Markup, Markup]], ...]
    ground: Markup
    scale: Markup
    sentence: str

    @property
    def looks(self) -> set[str]:
        """The marks that are drawn."""
        return {check.look for row, _ in self.drawn for check in row.checks}


def forecast(cells: Iterable[Cell]) -> Forecast | None:
    """Draw how far cases are from their prediction; None if fewer than two have one that can be shown."""
    rows = [row for row in map(_row, cells) if row]
    reaches = [_reach(check) for row in rows for check in row.checks]
    if sum(bool(row.checks) for row in rows) < 2:
        return None
    end, ticks = next((entry for entry in _RANGES if max(reaches) <= entry[0]), _RANGES[-1])
    axis = Axis(low=1 / end, high=end, start=0, end=1, log=True)
    farthest = sorted(rows, key=_distance, reverse=True)[:MOST_ROWS]
    return Forecast(
        rows=tuple(rows),
        numbers=Markup("".join(map(_numbers, rows))),
        drawn=tuple((row, (_mark(row.memory, axis), _mark(row.speed, axis))) for row in farthest),
        ground=_ground(axis, ticks),
        scale=_scale(axis, ticks),
        sentence=_in_words(rows),
    )


def _row(cell: Cell) -> ForecastRow | None:
    result, wrong = cell.result, surprise(cell.result)
    if not result.estimate or not (result.outcome is Outcome.OK or wrong):
        return None
    expected, at_least = predictions(result.estimate), result.outcome is not Outcome.OK
    memory = _check(_memory(cell), expected, at_least) if cell.memory and not cell.memory.predicted else None
    speed = None if at_least else _check(cell.speed, expected)
    return ForecastRow(cell, name(cell), memory, speed, wrong) if memory or speed or wrong else None


def _memory(cell: Cell) -> Figure:
    """Choose the figure to compare: what was measured as the plan predicts it, which of a derived one is what torch allocated."""
    assert cell.memory is not None
    return metric(cell.result, "vram_peak_bytes") if cell.memory.need.derived else cell.memory.need


def _check(figure: Figure, expected: Mapping[str, Span], at_least: bool = False) -> Check | None:
    span, number = expected.get(figure.key), figure.number
    if span is None or not all(map(is_drawable, (number, span.best, span.high))):
        return None
    return Check(figure, span, number / span.best, at_least)


def _reach(check: Check) -> float:
    """Return how many times more or less the axis must reach for a check and its interval."""
    low, high = _ends(check)
    return max(check.ratio, 1 / check.ratio, high, 1 / low)


def _ends(check: Check) -> tuple[float, float]:
    low, high = (max(end / check.expected.best, 1e-9) for end in (check.expected.low, check.expected.high))
    return low, high


def _distance(row: ForecastRow) -> tuple[bool, float]:
    return bool(row.surprise), max((abs(math.log(check.ratio)) for check in row.checks), default=0.0)


def _mark(check: Check | None, axis: Axis) -> Markup:
    """Draw the interval of a prediction as a bar and what was measured as a point on it."""
    if check is None:
        return Markup("<svg/>")
    title = f"{check.figure.text}, predicted {check.predicted}"
    bar = ""
    if check.has_interval:
        low, high = (_inside(end, axis) for end in _ends(check))
        bar = f'<rect x="{percent(low)}%" width="{percent(high - low)}%"/>'
    look = "" if check.look == "held" else f' class="{check.look}"'
    point = f'<circle{look} cx="{percent(_inside(check.ratio, axis))}%"/>'
    return Markup(f'<svg role="img"><title>{escape(title)}</title>{bar}{point}</svg>')


def _inside(ratio: float, axis: Axis) -> float:
    return axis.at(min(max(ratio, axis.low), axis.high))


def _numbers(row: ForecastRow) -> str:
    """Write a row of the table: name, then measured, predicted, interval and how far off of memory and of speed."""
    cells = [_cells(check) for check in (row.memory, row.speed)]
    wrong = f' <b class="bad">{row.surprise}</b>' if row.surprise else ""
    return f'<tr><th scope="row">{as_html(row.name)}{wrong}</th>{"".join(cells)}</tr>\n'


def _cells(check: Check | None) -> str:
    if check is None:
        return "<td></td>" * 4
    return f"<td>{check.measured}</td><td>{check.predicted}</td><td>{check.interval}</td><td>{check.off}</td>"


def _ground(axis: Axis, ticks: Iterable[float]) -> Markup:
    """Draw what is close to the prediction as a band, and the marked ratios as lines."""
    left, right = axis.at(1 - CLOSE), axis.at(1 + CLOSE)
    lines = "".join(f'<line x1="{x}%" x2="{x}%" y2="100%"/>' for x in (percent(axis.at(ratio)) for ratio in ticks))
    return Markup(f'<svg><rect x="{percent(left)}%" width="{percent(right - left)}%"/>{lines}</svg>')


def _scale(axis: Axis, ticks: Mapping[float, str]) -> Markup:
    texts = (f'<text x="{percent(axis.at(ratio))}%" y="12">{text}</text>' for ratio, text in ticks.items() if text)
    return Markup(f"<svg>{''.join(texts)}</svg>")


def _in_words(rows: Sequence[ForecastRow]) -> str:
    wrong = [row.surprise for row in rows]
    kinds = [plural(wrong.count(kind), kind) for kind in ("false fit", "false refusal") if kind in wrong]
    parts = [
        _share_inside("Memory", [row.memory for row in rows]),
        _share_inside("Speed", [row.speed for row in rows]),
        ", ".join(kinds),
    ]
    return " ".join(f"{part}." for part in parts if part)


def _share_inside(what: str, checks: Iterable[Check | None]) -> str:
    known = [check for check in checks if check and not check.at_least]
    if not known:
        return ""
    close, held = sum(check.is_close for check in known), sum(check.has_held for check in known)
    return (
        f"{what}: {close} of {len(known):,} within ±{round(100 * CLOSE)}\N{NO-BREAK SPACE}%, {held:,} inside the predicted interval"
    )
