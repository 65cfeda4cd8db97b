"""Speeds of models that nobody has run here: one model calibrates, the others are predicted"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.records import Machine, Result
from harness.core.units import format_share
from tests.accuracy.chart import Pair
from tests.accuracy.held_out import Forecast, forecasts, mean_error, said, share_within
from tests.support.published import median_width, share_inside
from tests.support.reporting import Figure

WIDTHS = {"cpu": 1.5, "disk": 2.0}
# What is reached so far, and must not get worse: the most mean error, of seconds the most width, and of all the least share inside.
REACHED = {"cpu": 0.25, "disk": 0.25}
WIDEST = {"first_token_s": 7.0, "load_s": 4.7}
INSIDE = 0.85
OTHERS = ("qwen2", "codegen")  # that calibrate in its stead, so that nothing is tuned to the default model


@pytest.fixture(scope="module")
def predicted(results: list[Result], here: Machine, models: dict[str, Path]) -> list[Forecast]:
    return list(forecasts(results, here, models))


@pytest.mark.parametrize("placement", WIDTHS)
def test_tokens_per_s(predicted: list[Forecast], figures: list[Figure], pairs: list[Pair], placement: str) -> None:
    rows = [one for one in predicted if one.figure == "decode_tok_s" and one.placement == placement]
    pairs += [Pair(case=one.case, figure="decode, tokens/s", estimated=one.planned.best, measured=one.measured) for one in rows]
    wanted = f"mean error 8 %, 90 % inside, median width {WIDTHS[placement]}"
    figures.append(Figure(what=f"decode tokens/s, {placement}, held-out models", rows=len(rows), found=said(rows), wanted=wanted))
    assert share_inside(rows) >= 0.9
    assert mean_error(rows) < REACHED[placement]


@pytest.mark.parametrize("figure", ["first_token_s", "load_s"])
def test_seconds(predicted: list[Forecast], figures: list[Figure], figure: str) -> None:
    rows = [one for one in predicted if one.figure == figure]
    found = f"{format_share(share_within(rows, 0.25))} within 25 %, {said(rows)}"
    figures.append(Figure(what=f"{figure}, held-out models", rows=len(rows), found=found, wanted="90 % within 25 %"))
    assert share_inside(rows) >= INSIDE
    assert median_width(rows) < WIDEST[figure]


@pytest.mark.parametrize("calibrates", OTHERS)
def test_another_model_calibrates(
    results: list[Result],
    here: Machine,
    models: dict[str, Path],
    figures: list[Figure],
    calibrates: str,
) -> None:
    rows = [one for one in forecasts(results, here, models, calibrates) if one.figure == "decode_tok_s"]
    figures.append(Figure(what=f"decode tokens/s, calibrated by {calibrates}", rows=len(rows), found=said(rows), wanted=""))
    assert share_inside(rows) >= INSIDE
