"""Axes: values keep their order and their distances, and what is marked on them is round."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.page.axes import Axis, percent, rounded, short, text_width, tick_texts

POSITIVE = st.floats(1e-12, 1e15)


def test_a_linear_axis_keeps_distances_and_a_logarithmic_one_ratios() -> None:
    linear, log = Axis(low=0, high=8, start=100, end=0), Axis(low=1, high=100, start=0, end=50, log=True)
    assert [linear.at(value) for value in (0, 2, 8, 16)] == [100, 75, 0, -100]
    assert [log.at(value) for value in (1, 10, 100)] == pytest.approx([0, 25, 50])


@given(POSITIVE, st.floats(1.001, 1e9), st.booleans(), st.integers(2, 12))
def test_ticks_are_round_lie_on_the_axis_and_are_about_as_many_as_asked(low: float, times: float, is_log: bool, about: int) -> None:
    axis = Axis(low=low, high=low * times, start=0, end=1, log=is_log)
    ticks = axis.ticks(about)
    assert len(ticks) <= about + 1
    assert ticks == sorted(set(ticks))
    assert all(-1e-6 <= axis.at(tick) <= 1 + 1e-6 for tick in ticks)
    if is_log:
        assert all(f"{tick:.6e}".startswith(("1.0", "2.0", "3.0", "5.0")) for tick in ticks)
    else:
        assert len(ticks) >= about / 3 - 1
        assert all(step == pytest.approx(ticks[1] - ticks[0]) for step in (after - before for before, after in pairwise(ticks)))


@given(POSITIVE, st.floats(0, 1e3), st.floats(0.01, 1), st.integers(2, 12))
def test_ends_are_round_hold_the_values_and_span_what_they_must(low: float, times: float, share: float, about: int) -> None:
    high, least = low * (1 + times), low * share
    start, end = rounded(low, high, about, least=least)
    assert 0 <= start <= low * (1 + 1e-9)
    assert end >= high * (1 - 1e-9)
    assert end - start >= min(least, low + least / 2) * (1 - 1e-9)
    ticks = Axis(low=start, high=end, start=0, end=1).ticks(about)
    assert all(any(math.isclose(one, tick, abs_tol=end * 1e-9) for tick in ticks) for one in (start, end)) or len(ticks) >= 2


@pytest.mark.parametrize(
    ("is_log", "values", "texts"),
    [
        (False, [0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        (False, [0.8, 1.0, 1.2000000000000002], ["0.8", "1.0", "1.2"]),
        (False, [12.86, 12.88, 12.9], ["12.86", "12.88", "12.90"]),
        (False, [0.0, 5000.0], ["0", "5,000"]),
        (True, [0.3, 1.0, 3.0, 10.0], ["0.3", "1", "3", "10"]),
    ],
)
def test_ticks_are_written_with_the_decimals_they_need(is_log: bool, values: list[float], texts: list[str]) -> None:
    assert tick_texts(Axis(low=0.1, high=100, start=0, end=1, log=is_log), values) == texts


def test_numbers_of_a_drawing_are_short() -> None:
    assert [short(12.34), short(12.0), percent(1 / 3), percent(0.5)] == ["12.3", "12", "33.3", "50"]


def test_letters_of_east_asia_are_wide() -> None:
    assert text_width("int4", 7) == 28
    assert text_width("模型", 7) > 1.5 * text_width("ab", 7)
    assert math.isclose(text_width("", 7), 0)
