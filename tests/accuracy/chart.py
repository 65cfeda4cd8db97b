"""Predicted against measured as one SVG: both axes logarithmic, a band of 10 % around the diagonal, a colour a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from harness.core.records import Record

SIDE, MARGIN = 460, 56
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe-Ito


class Pair(Record, frozen=True, kw_only=True):
    """One case: what was estimated and what was measured, both more than 0, of one figure."""

    case: str
    figure: str
    estimated: float
    measured: float


def write(path: Path, pairs: Sequence[Pair], unit: str, scale: float) -> None:
    """Draw the pairs, divided by `scale`, which makes `unit`."""
    values = [value / scale for pair in pairs for value in (pair.estimated, pair.measured)]
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05

    def at(value: float) -> float:
        return MARGIN + (math.log10(value / scale) - low) / (high - low) * (SIDE - 2 * MARGIN)

    figures = list(dict.fromkeys(pair.figure for pair in pairs))
    ends = [10**low * scale, 10**high * scale]
    height = SIDE + 20 * len(figures)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{SIDE}" height="{height}" fill="#fff"/>',
        _band(at, ends),
        *_axes(at, low, high, scale),
        *(_point(pair, at, COLOURS[figures.index(pair.figure) % len(COLOURS)]) for pair in pairs),
        *(
            f'<text x="{MARGIN}" y="{SIDE + 20 * row}" fill="{COLOURS[row % len(COLOURS)]}">● {escape(figure)}</text>'
            for row, figure in enumerate(figures)
        ),
        f'<text x="{SIDE / 2}" y="{SIDE - 16}" text-anchor="middle">measured, {unit}</text>',
        f'<text transform="translate(14 {SIDE / 2}) rotate(-90)" text-anchor="middle">estimated, {unit}</text>',
        "</svg>\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _band(at: Callable[[float], float], ends: Sequence[float]) -> str:
    corners = [(ends[0], 0.9), (ends[1], 0.9), (ends[1], 1.1), (ends[0], 1.1)]
    points = " ".join(f"{at(value):.1f},{SIDE - at(value * share):.1f}" for value, share in corners)
    return f'<polygon points="{points}" fill="#0072b2" fill-opacity="0.12"><title>within 10 %</title></polygon>'


def _axes(at: Callable[[float], float], low: float, high: float, scale: float) -> Iterable[str]:
    end = SIDE - MARGIN
    yield f'<path d="M{MARGIN} {MARGIN}V{end}H{end}" fill="none" stroke="#555"/>'
    yield f'<path d="M{MARGIN} {end}L{end} {MARGIN}" stroke="#999" stroke-dasharray="4 4"/>'
    for power in range(math.floor(low), math.ceil(high) + 1):
        for step in (1, 2, 5):
            value = step * 10.0**power
            if low <= math.log10(value) <= high:
                place = at(value * scale)
                yield f'<text x="{place:.1f}" y="{end + 16}" text-anchor="middle">{value:g}</text>'
                yield f'<text x="{MARGIN - 6}" y="{SIDE - place + 4:.1f}" text-anchor="end">{value:g}</text>'


def _point(pair: Pair, at: Callable[[float], float], colour: str) -> str:
    title = escape(f"{pair.case}: {pair.figure}, estimated / measured {pair.estimated / pair.measured:.2f}")
    place = f'cx="{at(pair.measured):.1f}" cy="{SIDE - at(pair.estimated):.1f}"'
    return f'<circle {place} r="4" fill="{colour}" fill-opacity="0.7"><title>{title}</title></circle>'
