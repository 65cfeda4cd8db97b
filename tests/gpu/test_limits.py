"""A case under --vram, for real: nothing of it passes the limit, and what is too big for it is out of memory.

Not run on a card yet.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.core.records import Outcome
from harness.core.units import GIB, MIB
from harness.machine import nvml
from harness.planning import calibration
from tests.gpu.contact import ROOT, Contact, ended_well, explain
from tests.gpu.test_contact import printed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("placement", ["direct", "auto"])
def test_a_case_lives_within_its_vram(contact: Contact, placement: str) -> None:
    for result in contact.cases("--precision", "bf16", "--placement", placement, "--vram", "2GiB", "--vram", "3GiB", "--run-all"):
        ended_well(result)
        limit = result.case.vram_bytes
        assert limit in (2 * GIB, 3 * GIB)
        assert [gpu.limit_bytes for gpu in result.machine.gpus] == [limit] * len(result.machine.gpus)
        assert result.metrics["vram_peak_bytes"] < limit
        assert result.metrics.get("vram_process_peak_bytes", 0) <= limit


def test_what_needs_more_than_its_vram_is_out_of_memory(contact: Contact) -> None:
    result = contact.case("fp32", "direct", "--vram", "1GiB", "--run-all")
    assert result.outcome is Outcome.OOM, explain(result)
    assert result.why is not None
    assert "memory" in result.why


def test_a_card_that_the_plan_does_not_use_gets_no_context(contact: Contact) -> None:
    if len(contact.machine.gpus) < 2:
        pytest.skip("there is one card")
    code = """
import torch
from harness.worker import accelerators, model

model.cap_vram(2 << 30, (0,), 0)
held = torch.ones(1 << 20, device=0)
accelerators.reset_vram_peaks()
accelerators.vram_peaks()
model.synchronize()
print(*(torch._C._cuda_hasPrimaryContext(index) for index in range(torch.cuda.device_count())))
"""
    first, *others = printed(code).split()
    assert first == "True"
    assert set(others) == {"False"}


def test_accelerate_finds_free_what_a_context_leaves(contact: Contact) -> None:
    code = """
from accelerate.utils import get_max_memory
from harness.machine import nvml

with nvml.lent() as library:
    free = nvml.ask(library, "nvmlDeviceGetMemoryInfo", nvml.visible_gpus(library)[0]).free
print(free - get_max_memory()[0])
"""
    if contact.machine.shares_ram:
        pytest.skip("NVML does not tell what is free of a card that shares the RAM")
    context = calibration.default()["gpu_context_bytes"]
    assert context.low - 64 * MIB <= int(printed(code)) <= context.high


def cards_seen(visible: str) -> int:
    """Return how many cards the probe sees where CUDA_VISIBLE_DEVICES is this."""
    code = "from harness.machine import probe; print(len(probe.probe().gpus))"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_cards_are_hidden_and_chosen_as_cuda_does(contact: Contact) -> None:
    assert contact.machine.gpus
    with nvml.lent() as library:
        uuid = str(nvml.ask(library, "nvmlDeviceGetUUID", nvml.visible_gpus(library)[0]))
    assert [cards_seen(visible) for visible in ("", "0", uuid)] == [0, 1, 1]
