"""`pytest cases/` on cards that are not there: the libraries' own code places, counts and computes, on tiny models, with values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.records import Outcome, Result
from harness.results import store
from tests.support import small_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is lent as it lies in libc10.so")

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
SHORT = ("--precision", "bf16", "--repeats", "1", "--prompt-tokens", "16", "--new-tokens", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    small_models.save("llama", folder, num_hidden_layers=6, vocab_size=512, hidden_size=64, intermediate_size=172)
    return folder


def run(cards: str, model: Path, results: Path, *words: str, room: int | None = None) -> dict[str, Result]:
    """Run cases on cards such as "2x8", two of 8 GiB, and return their results by placement."""
    path = os.pathsep.join([str(SITE), str(ROOT)])
    env = {**os.environ, "FAKE_CARDS": cards, "PYTHONPATH": path, **({"FAKE_ROOM": str(room)} if room else {})}
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--model", str(model), "--results", str(results), *SHORT, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    assert (results / store.NAME).exists(), done.stdout + done.stderr
    found, problems = store.Store(results).read()
    assert not problems
    return {result.case.placement: result for result in found}


def peak(result: Result, phase: str) -> int:
    """Return the most bytes that a phase had on the first card."""
    return max(one.vram_peak_bytes.get("gpu:0", 0) for one in result.phases if one.name == phase)


@pytest.fixture(scope="module")
def on_one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    words = [word for name in ("direct", "ram-to-gpu", "auto", "dispatch", "gpu+cpu", "disk") for word in ("--placement", name)]
    return run("1x8", model, tmp_path_factory.mktemp("one"), *words)


@pytest.fixture(scope="module")
def on_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run("2x8", model, tmp_path_factory.mktemp("two"), "--placement", "auto", "--placement", "balanced_low_0")


@pytest.mark.parametrize(
    ("placement", "tiers"),
    [
        ("direct", {"gpu:0"}),
        ("ram-to-gpu", {"gpu:0"}),
        ("auto", {"gpu:0"}),
        ("dispatch", {"gpu:0"}),
        ("gpu+cpu", {"gpu:0", "cpu"}),
        ("disk", {"gpu:0", "cpu", "disk"}),
    ],
)
def test_every_placement_of_one_card_loads_where_it_says(on_one: dict[str, Result], placement: str, tiers: set[str]) -> None:
    result = on_one[placement]
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert set(result.checks.values()) == {"ok"}
    assert result.loaded is not None
    assert {tier for tier, size in result.loaded.tier_bytes.items() if size} == tiers
    assert result.metrics["vram_peak_bytes"] >= result.loaded.tier_bytes["gpu:0"]


@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu", "auto", "dispatch"])
def test_what_lies_on_the_card_is_what_was_planned(on_one: dict[str, Result], placement: str) -> None:
    result = on_one[placement]
    assert result.estimate is not None
    assert result.loaded is not None
    planned = result.estimate.tiers["gpu:0"]
    assert result.loaded.tier_bytes["gpu:0"] == pytest.approx(planned.weights_bytes, rel=0.002)
    assert result.metrics["vram_peak_bytes"] == pytest.approx(planned.allocated_bytes, rel=0.1)


def test_two_cards_share_the_model_as_planned(on_two: dict[str, Result]) -> None:
    """Both hold about half; the one that is kept free holds nothing, but accelerate began on it."""
    auto, kept = on_two["auto"], on_two["balanced_low_0"]
    for result in (auto, kept):
        assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
        assert set(result.checks.values()) == {"ok"}
        assert result.estimate is not None
        assert result.loaded is not None
        planned = {tier: one.weights_bytes for tier, one in result.estimate.tiers.items() if one.weights_bytes}
        assert {tier: size for tier, size in result.loaded.tier_bytes.items() if size} == pytest.approx(planned, rel=0.01)
        assert {"gpu:0", "gpu:1"} <= result.estimate.tiers.keys()
    assert set(kept.loaded.tier_bytes if kept.loaded else ()) == {"gpu:1"}
    assert peak(kept, "load") > 0


@pytest.mark.parametrize("phase", ["load", "prefill", "decode"])
def test_too_little_is_out_of_memory_wherever_it_is_found(
    on_one: dict[str, Result], model: Path, tmp_path: Path, phase: str
) -> None:
    """While decoding only the KV cache grows: with one token of prompt and many new ones it is what does not fit."""
    direct, long = on_one["direct"], ("--prompt-tokens", "1", "--new-tokens", "24")
    rooms = {"load": peak(direct, "load") // 2, "prefill": (peak(direct, "load") + peak(direct, "cold")) // 2}
    words = long if phase == "decode" else ()
    if phase == "decode":
        rooms[phase] = peak(run("1x8", model, tmp_path / "whole", "--placement", "direct", *long)["direct"], "cold") - 1024
    result = run("1x8", model, tmp_path / "less", "--placement", "direct", *words, room=rooms[phase])["direct"]
    assert result.outcome is Outcome.OOM, f"{result.outcome} {result.why}\n{result.log_tail}"
    assert (result.loaded is None) == (phase == "load")


def test_a_limit_lets_what_fits_pass_and_shows_on_the_page(model: Path, tmp_path: Path) -> None:
    result = run("1x8", model, tmp_path, "--placement", "direct", "--vram", "2GiB")["direct"]
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert [gpu.limit_bytes for gpu in result.machine.gpus] == [2 << 30]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "A100" in page
    assert "direct" in page
