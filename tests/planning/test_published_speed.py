"""Planned speeds against published ones: two cards, two hosts, one set of constants. Coverage and width count together."""

from __future__ import annotations

import pytest

from harness.core.records import Span
from tests.support.published import SEEN, Speed, interval_score, median_error, median_width, published_speeds, share_inside


def row(low: float, best: float, high: float, measured: float = 10.0) -> Speed:
    planned = Span(low=low, best=best, high=high)
    return Speed(card="A100 80GB", model="m", quantization="BF16", prompt=1, measured=measured, planned=planned)


def test_models_that_the_constants_have_not_seen() -> None:
    held_out = [one for one in published_speeds() if one.model not in SEEN]
    assert len(held_out) > 100
    assert median_error(held_out) < 0.15
    assert share_inside(held_out) >= 0.9
    assert median_width(held_out) <= 2.5


@pytest.mark.parametrize("card", ["A100 80GB", "H20"])
def test_each_host_in_bf16(card: str) -> None:
    """What starts the operations decides at short prompts: 11 microseconds each beside the A100, 6.4 beside the H20."""
    short = [one for one in published_speeds() if (one.card, one.quantization, one.prompt) == (card, "BF16", 1)]
    assert len(short) >= 3
    assert all(abs(one.error) < 0.1 for one in short)


def test_the_score_punishes_what_is_wide_and_what_is_missed() -> None:
    assert interval_score([row(5, 10, 20)]) == pytest.approx(4)
    assert interval_score([row(9, 10, 11)]) < interval_score([row(5, 10, 20)])
    assert interval_score([row(11, 12, 13)]) > interval_score([row(9, 12, 13)])
