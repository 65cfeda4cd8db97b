"""Axes of drawings: from values to places, the round values that are marked on them, and how their numbers are written.

Pages draw their charts by this and not by Altair with vl-convert, for three reasons that tests/bench/bench_charts.py measures and
reports/bench.md shows. Time: those of a page of 500 results would take 8 s, more than 1 s of it for memory against speed and
measured against predicted alone, where all of the page may take 1 s and our own charts take 0.1 s. Size: 4.8 MB, where the page may
have 2 MB and our own have 0.75 MB. Accessibility: a drawing of the library's has one width and shrinks as a whole, on a telephone
to letters of 5 pixels; ours stretches between letters and marks that keep their size. What is drawn once and for one width, the
charts of reports/accuracy.md, is drawn by Altair.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import msgspec

from harness.core import units

_ROUNDING = 1e-9  # of a step: an end that is round is marked, whatever a division makes of it


class Axis(msgspec.Struct, frozen=True, gc=False):
    """Lays the values from `low` to `high` between two places of a drawing; by their logarithms if `log`, then `low` is above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value; values beyond the ends lie beyond the places."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self, about: int, unit: float = 1) -> list[float]:
        """Choose about this many round values: steps of 1, 2 or 5 times a power of ten in `unit`s; powers of ten if `log`."""
        return _log_ticks(self.low, self.high, about) if self.log else _ticks(self.low, self.high, unit, about)


def rounded(low: float, high: float, about: int, unit: float = 1, least: float = 0.0) -> tuple[float, float]:
    """Return round ends about these values, about as many steps apart; at least `least`, however near each other they are."""
    middle, half = (low + high) / 2, max(high - low, least) / 2
    low, high = (max(0.0, middle - half), middle + half) if low >= 0 else (middle - half, middle + half)
    ends, step = (0.0, 0.0), 0.0
    while step != (step := _step(low, high, unit, about)):  # wider ends may ask for wider steps
        ends = low, high = math.floor(low / step + _ROUNDING) * step, math.ceil(high / step - _ROUNDING) * step
    return ends


def _ticks(low: float, high: float, unit: float, about: int) -> list[float]:
    step = _step(low, high, unit, about)
    return [step * i for i in range(math.ceil(low / step - _ROUNDING), math.floor(high / step + _ROUNDING) + 1)]


def _step(low: float, high: float, unit: float, about: int) -> float:
    rough = (high - low) / unit / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - _ROUNDING)) * unit


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [value for power in powers for factor in factors if low <= (value := factor * 10.0**power) <= high]
        if len(found) <= about:
            return found
    return found[:: math.ceil(len(found) / about)]


def short(value: float) -> str:
    """Write a number of the drawing: a tenth is finer than a screen shows."""
    return f"{value:.1f}".removesuffix(".0")


def percent(share: float) -> str:
    """Write a share of a drawing's width, without the sign: a tenth of a percent is finer than a screen shows."""
    return short(100 * share)


def is_drawable(value: float) -> bool:
    """Tell whether an axis can hold a value that is above 0: larger ones are never measured."""
    return 1e-18 < value < 1e18


def tick_texts(axis: Axis, values: Sequence[float]) -> list[str]:
    """Write the values of ticks with as few decimals as they need, on a linear axis all with as many: 0.5 1.0 1.5, 0.3 1 3."""
    texts = [_short_text(value) for value in values]
    most = max((len(text.partition(".")[2]) for text in texts), default=0)
    return texts if axis.log else [f"{value:,.{most}f}" for value in values]


def _short_text(value: float) -> str:
    text = units.significant(value, 6)
    return text.rstrip("0").rstrip(".") if "." in text else text


def text_width(text: str, letter: float) -> float:
    """Guess the width of a text from that of a letter; those of East Asia take about twice as much."""
    return letter * sum(1.8 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
