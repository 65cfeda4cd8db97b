"""Tensor parallelism by nccl, for real: a process for each GPU, measured as one case. Needs two GPUs.

Not run on cards yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.records import Outcome, Result
from harness.core.units import GIB
from harness.machine import probe
from harness.results import store
from tests.support import small_models

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiers() -> list[str]:
    found = [gpu.name for gpu in probe.probe().gpus]
    if len(found) not in (2, 4, 8):
        pytest.skip("needs 2, 4 or 8 GPUs, which share the heads of the model evenly")
    return found


def measured(directory: Path, *words: str) -> dict[str, Result]:
    heads = {"num_key_value_heads": 8, "vocab_size": 48000, "hidden_size": 1024}
    small_models.save("llama", directory / "llama", **heads)
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--results", str(directory), "--model", str(directory / "llama")]
    done = subprocess.run([*command, "--precision", "bf16", *words], cwd=ROOT, capture_output=True, text=True)
    assert (directory / store.NAME).exists(), done.stdout + done.stderr
    found, problems = store.Store(directory).read()
    assert not problems
    return {result.case.placement: result for result in found}


def test_each_gpu_holds_its_part(tmp_path: Path, tiers: list[str]) -> None:
    found = measured(tmp_path, "--placement", "direct", "--placement", "tp")
    one, all_of_them = found["direct"], found["tp"]
    assert all_of_them.outcome is Outcome.OK, f"{all_of_them.why}\n{all_of_them.log_tail}"
    assert set(all_of_them.checks.values()) == {"ok"}
    assert one.loaded is not None
    assert all_of_them.loaded is not None
    part = one.loaded.tier_bytes["gpu:0"] / len(tiers)
    assert sorted(all_of_them.loaded.tier_bytes) == tiers
    assert list(all_of_them.loaded.tier_bytes.values()) == pytest.approx([part] * len(tiers), rel=0.05)
    assert part < all_of_them.metrics["vram_peak_bytes"] < one.metrics["vram_peak_bytes"]
    load = next(phase for phase in all_of_them.phases if phase.name == "load")
    assert sorted(tier for tier, size in load.vram_peak_bytes.items() if size) == tiers


def test_each_gpu_has_its_limit(tmp_path: Path, tiers: list[str]) -> None:
    result = measured(tmp_path, "--placement", "tp", "--vram", "4GiB")["tp"]
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert result.metrics.get("vram_process_peak_bytes", 0) <= 4 * GIB
    assert len(tiers) == len(result.machine.gpus)
