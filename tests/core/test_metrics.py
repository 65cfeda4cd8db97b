"""The table of figures: what is promised is there, and everything in it can be shown."""

from __future__ import annotations

import msgspec
import pytest

from harness.core.metrics import FORMATTERS, METRICS, format_metric
from harness.core.records import Result
from tests.support.builders import GOLDEN

# The contract of results.jsonl (design, section 10): scripts and CI read these.
PROMISED = (
    "load_s first_token_s ready_s prefill_tok_s decode_tok_s token_p50_s token_p95_s ram_peak_bytes ram_anon_peak_bytes "
    "vram_peak_bytes vram_process_peak_bytes load_ram_peak_bytes load_vram_peak_bytes disk_bytes energy_j perplexity "
    "top1_agreement kl answers_correct"
)


@pytest.mark.parametrize("key", PROMISED.split())
def test_every_promised_metric_is_there(key: str) -> None:
    assert key in METRICS


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_says_what_it_is(key: str) -> None:
    metric = METRICS[key]
    assert metric.label
    assert metric.how
    assert metric.better in ("lower", "higher")


@pytest.mark.parametrize("key", METRICS)
def test_the_unit_is_the_one_in_the_name(key: str) -> None:
    named = {"_bytes": "bytes", "_tok_s": "tok_s", "_s": "s", "_j": "j"}
    ending = next((end for end in named if key.endswith(end)), None)
    unit = METRICS[key].unit
    assert unit == named[ending] if ending else unit in ("ratio", "share", "count")


@pytest.mark.parametrize("key", METRICS)
@pytest.mark.parametrize("value", [0.0, 1e-4, 1.0, 1234.5, 3e11])
def test_every_metric_formats(key: str, value: float) -> None:
    text = format_metric(key, value)
    assert any(character.isdigit() for character in text)
    assert "e+" not in text
    assert "e-" not in text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("load_s", 31.7, "31.7 s"),
        ("token_p50_s", 0.082, "82.0 ms"),
        ("decode_tok_s", 12.2, "12.2 tokens/s"),
        ("vram_peak_bytes", 5572720066, "5.19 GiB"),
        ("energy_j", 388.2, "388 J"),
        ("top1_agreement", 0.931, "93.1 %"),
        ("perplexity", 8.4, "8.40"),
        ("answers_correct", 9.0, "9"),
    ],
)
def test_metrics_read_as_people_say_them(key: str, value: float, text: str) -> None:
    assert format_metric(key, value) == text


def test_speeds_are_better_high_and_costs_low() -> None:
    assert {METRICS[key].better for key in METRICS if METRICS[key].unit == "tok_s"} == {"higher"}
    assert {METRICS[key].better for key in METRICS if METRICS[key].unit in ("s", "bytes", "j")} == {"lower"}


def test_no_formatter_stands_idle() -> None:
    assert {metric.unit for metric in METRICS.values()} == set(FORMATTERS)


def test_every_metric_of_an_old_result_can_still_be_shown() -> None:
    stored = {key for line in GOLDEN.read_bytes().splitlines() for key in msgspec.json.decode(line, type=Result).metrics}
    assert stored <= METRICS.keys()
