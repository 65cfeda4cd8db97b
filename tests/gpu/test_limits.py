"""A case under --vram, for real: nothing of it passes the limit, and what is too big for it is out of memory.

Not run on a card yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.records import Outcome, Result
from harness.core.units import GIB
from harness.planning import calibration
from harness.results import store

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def measured(directory: Path, *words: str) -> list[Result]:
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--run-all", "--results", str(directory), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (directory / store.NAME).exists(), done.stdout + done.stderr
    found, problems = store.Store(directory).read()
    assert not problems
    return found


@pytest.mark.parametrize("placement", ["direct", "auto"])
def test_a_case_lives_within_its_vram(tmp_path: Path, placement: str) -> None:
    words = ("--precision", "bf16", "--placement", placement, "--vram", "2GiB", "--vram", "3GiB")
    for result in measured(tmp_path, *words):
        assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
        limit = result.case.vram_bytes
        assert limit in (2 * GIB, 3 * GIB)
        assert [gpu.limit_bytes for gpu in result.machine.gpus] == [limit] * len(result.machine.gpus)
        assert result.metrics["vram_peak_bytes"] < limit
        assert result.metrics.get("vram_process_peak_bytes", 0) <= limit


def test_what_needs_more_than_its_vram_is_out_of_memory(tmp_path: Path) -> None:
    (result,) = measured(tmp_path, "--precision", "fp32", "--placement", "direct", "--vram", "768MiB")
    assert result.outcome is Outcome.OOM
    assert result.why is not None
    assert "memory" in result.why


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_a_card_that_the_plan_does_not_use_gets_no_context() -> None:
    code = """
import torch
from harness.worker import model

model.cap_vram(2 << 30, (0,), 0)
held = torch.ones(1 << 20, device=0)
model.reset_vram_peaks()
model.vram_peaks()
model.synchronize()
print(*(torch._C._cuda_hasPrimaryContext(index) for index in range(torch.cuda.device_count())))
"""
    first, *others = printed(code).split()
    assert first == "True"
    if not others:
        pytest.skip("there is one card")
    assert set(others) == {"False"}


def test_accelerate_finds_free_what_a_context_leaves() -> None:
    code = """
from accelerate.utils import get_max_memory
from harness.machine import nvml

with nvml.lent() as library:
    free = nvml.ask(library, "nvmlDeviceGetMemoryInfo", nvml.visible(library)[0]).free
print(free - get_max_memory()[0])
"""
    context = calibration.default()["gpu_context_bytes"]
    assert context.low <= int(printed(code)) <= context.high
