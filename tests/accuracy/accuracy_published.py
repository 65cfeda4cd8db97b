"""Speeds against published ones: transformers on an A100 and an H20, dense models, one set of constants"""

from __future__ import annotations

from collections.abc import Sequence

from harness.core.units import format_share
from tests.support.published import SEEN, Speed, interval_score, median_error, median_width, published_speeds, share_inside
from tests.support.reporting import Figure

WANTED = "median error 15 %, 90 % inside, width 2.5"


def said(rows: Sequence[Speed]) -> str:
    inside, width, score = format_share(share_inside(rows)), median_width(rows), interval_score(rows)
    return f"median error {format_share(median_error(rows))}, {inside} inside, median width {width:.2f}, interval score {score:.2f}"


def test_published_speeds(figures: list[Figure]) -> None:
    rows = published_speeds()
    held_out = [row for row in rows if row.model not in SEEN]
    kinds = dict.fromkeys((row.card, row.quantization) for row in rows)
    for card, name in kinds:
        chosen = [row for row in rows if (row.card, row.quantization) == (card, name)]
        figures.append(Figure(what=f"tokens/s, {card}, {name}", rows=len(chosen), found=said(chosen), wanted=""))
    figures.append(Figure(what="tokens/s, all", rows=len(rows), found=said(rows), wanted=WANTED))
    figures.append(Figure(what="tokens/s, held-out models", rows=len(held_out), found=said(held_out), wanted=WANTED))
    assert median_error(held_out) < 0.15
    assert share_inside(held_out) >= 0.9
    assert median_width(held_out) <= 2.5
