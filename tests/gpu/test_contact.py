"""The first contact: torch and NVML speak of the same cards in the same order, and a forked worker can use them.

Not run on a card yet.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from harness.machine import accelerators, nvml, probe
from harness.planning.calibration import default
from tests.gpu.contact import ROOT, Contact

pytestmark = pytest.mark.gpu


def printed(code: str) -> str:
    """Run code in a Python of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_torch_can_use_the_cards() -> None:
    machine = probe.probe()
    assert accelerators.problem(machine, accelerators.torch_build(), accelerators.ask_torch()) is None


def test_torch_and_nvml_agree_on_the_cards(contact: Contact) -> None:
    seen = accelerators.ask_torch()
    assert [card.name for card in seen.cards] == [gpu.model for gpu in contact.machine.gpus]
    if any(card.uuid is None for card in seen.cards):
        pytest.skip("this torch does not tell the UUIDs of cards")
    with nvml.lent() as library:
        uuids = [str(nvml.ask(library, "nvmlDeviceGetUUID", card)).removeprefix("GPU-") for card in nvml.visible_gpus(library)]
    assert [card.uuid for card in seen.cards] == uuids


def test_both_see_the_same_memory_and_capability(contact: Contact) -> None:
    """What the driver keeps from programs is less than a tenth."""
    for gpu, card in zip(contact.machine.gpus, accelerators.ask_torch().cards, strict=True):
        assert gpu.total_bytes == pytest.approx(card.total_bytes, rel=0.1)
        assert card.architecture == f"sm_{(gpu.compute_capability or '').replace('.', '')}"


def test_the_card_is_known_by_its_name(contact: Contact) -> None:
    """Its bandwidth is that of its row in gpus.json."""
    unknown = [f"{gpu.model}, {gpu.total_bytes} bytes" for gpu in contact.machine.gpus if not gpu.bytes_per_s]
    if unknown:
        pytest.skip(f"no row of harness/data/gpus.json is called so, and a constant stands for its bandwidth: {unknown}")


PRELOADED = """
import ctypes, multiprocessing
from harness.run import forkserver, worker_process

def begun(answer):
    driver = ctypes.CDLL("libcuda.so.1")
    answer.send(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())))

def use(answer):
    import torch
    answer.send(float(torch.ones(8, device=0).sum()))

if __name__ == "__main__":
    forkserver.warm_up()
    context = multiprocessing.get_context("forkserver")
    for ask in (begun, use):
        mine, other = context.Pipe()
        child = context.Process(target=ask, args=(other,))
        child.start()
        print(mine.recv() if mine.poll(60) else "no answer")
        child.join()
"""


def test_the_fork_server_has_not_begun_on_cuda_and_its_children_can(
    contact: Contact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """3 is CUDA_ERROR_NOT_INITIALIZED: a child inherits what was begun before the fork, and then cannot use the card."""
    assert contact.machine.gpus
    script = tmp_path_factory.mktemp("fork") / "preloaded.py"
    script.write_text(PRELOADED, encoding="utf-8")
    env = ROOT.as_posix()
    done = subprocess.run([sys.executable, str(script)], cwd=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["3", "8.0"], done.stdout + done.stderr[-2000:]


MEASURED = """
import json, torch
from harness.machine import nvml
from harness.worker import accelerators

with nvml.lent() as library:
    context = accelerators.begin(library, nvml.visible_gpus(library), 0)
one = torch.ones(2048, 2048, device=0, dtype=torch.bfloat16)
before = torch.cuda.memory_allocated()
two = one @ one
torch.cuda.synchronize()
workspace = torch.cuda.memory_allocated() - before - two.nbytes
print(json.dumps({"context": context, "workspace": workspace}))
"""


def test_context_and_workspace_lie_in_their_intervals(contact: Contact) -> None:
    assert contact.machine.gpus
    found = json.loads(printed(MEASURED))
    workspace = default()["gpu_workspace_bytes"]
    assert workspace.low <= found["workspace"] <= workspace.high, found
    if found["context"] is None:
        pytest.skip("NVML does not tell what is free of this card, so the context was not measured")
    context = default()["gpu_context_bytes"]
    assert context.low <= found["context"] <= context.high, found
