"""One real run of the default model: fetched, measured in four cases, stored, rendered, and read in a real browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from selenium import webdriver

from harness.core.records import Outcome, Result, Verdict
from harness.results import store

ROOT = Path(__file__).parents[2]
FAST = ("--prompt-tokens", "32", "--new-tokens", "8", "--repeats", "2", "--calibrate", "never")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    options = ["--precision", "bf16", "--precision", "int4", "--placement", "cpu", "--placement", "disk", *FAST]
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--results", str(directory), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1] == f"page: {directory / 'index.html'}"
    return directory


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Result]:
    found, problems = store.Store(directory).read()
    assert not problems
    return {f"{result.case.precision}/{result.case.placement}": result for result in found}


@pytest.mark.parametrize("case", ["bf16/cpu", "bf16/disk", "int4/cpu"])
def test_measures_everything(results: dict[str, Result], case: str) -> None:
    result = results[case]
    assert result.outcome is Outcome.OK, result.why
    assert set(result.checks.values()) == {"ok"}
    wanted = {"load_s", "first_token_s", "ready_s", "prefill_tok_s", "decode_tok_s", "token_p50_s"}
    wanted |= {"ram_peak_bytes", "ram_anon_peak_bytes", "load_ram_peak_bytes", "perplexity", "answers_correct"}
    assert wanted <= result.metrics.keys()
    assert all(value > 0 for key, value in result.metrics.items() if key != "kl")
    assert 2 <= len(result.samples["decode_tok_s"]) <= 3 * 2  # more rounds where others disturbed it
    assert result.timeline is not None
    assert max(result.timeline.ram_bytes) <= result.metrics["ram_peak_bytes"] * 1.5
    assert result.quality is not None
    assert result.quality.verdict != "broken"


def test_int4_takes_less_than_bf16(results: dict[str, Result]) -> None:
    loaded = [results[case].loaded for case in ("int4/cpu", "bf16/cpu")]
    four, sixteen = (sum(found.linear_dtype_bytes.values()) for found in loaded if found)
    assert four < sixteen / 3


def test_disk_really_uses_the_disk(results: dict[str, Result]) -> None:
    assert results["bf16/disk"].metrics["disk_bytes"] > 0
    # The disk came first, so the RAM is compared with it: the same weights must predict the same tokens.
    assert results["bf16/cpu"].metrics["top1_agreement"] > 0.99


def test_what_cannot_work_is_known_without_loading(results: dict[str, Result]) -> None:
    result = results["int4/disk"]
    assert (result.verdict, result.outcome, result.stage) == (Verdict.INVALID, Outcome.UNSUPPORTED, "plan")
    assert "bitsandbytes" in str(result.why)


def test_page_shows_the_measured_numbers(directory: Path, results: dict[str, Result], browser: webdriver.Chrome) -> None:
    browser.get((directory / "index.html").as_uri())
    shown = {element.get_attribute("value") for element in browser.find_elements("css selector", "data")}
    for result in results.values():
        for key in ("decode_tok_s", "ready_s", "ram_peak_bytes"):
            if key in result.metrics:
                value = result.metrics[key]
                assert shown & {str(value), repr(value), f"{value:.0f}"}, f"{result.id} {key} {value}"
    text = browser.find_element("tag name", "body").text
    assert "smollm2-135m" in text
    assert "unsupported combination" in text


def test_printed_code_loads_the_model(results: dict[str, Result]) -> None:
    """The code of a cell, in a fresh process, as a user would paste it."""
    code = f"{results['bf16/cpu'].code}\nprint(type(model).__name__)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LlamaForCausalLM"
