"""A card that NVML knows and torch cannot use: what a run says, what it leaves out, and under which name it measures the CPU."""

from __future__ import annotations

import os

import pytest

from harness.core.options import RESULTS
from harness.core.records import Outcome, Result, Verdict
from harness.machine.accelerators import torch_build
from harness.results import store
from harness.run import forkserver
from tests.support import runs

PYNVML = '''
"""NVML on a machine with one RTX 4090."""

from types import SimpleNamespace


class NVMLError(Exception):
    pass


def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "580.95.05"
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(card): return "NVIDIA GeForce RTX 4090"
def nvmlDeviceGetMemoryInfo(card): return SimpleNamespace(total=24 << 30, free=23 << 30, used=1 << 30)
def nvmlDeviceGetCudaComputeCapability(card): return (8, 9)


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)

    def refuse(*_):
        raise NVMLError(name)

    return refuse
'''
WITH_A_GPU = ("direct", "ram-to-gpu", "gpu+cpu")
IN_RAM = ("auto", "dispatch", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Result]]:
    """Run a small model in real workers beside a card that NVML knows alone; return the output, and the results by placement."""
    build = torch_build()
    if build is None or build.cuda is not None:
        pytest.skip("needs a torch built for the CPU only")
    folder = runs.folder(tmp_path_factory.mktemp("beside-a-card") / "run", ["tiny"], scripted=False)
    (folder / "stubs").mkdir()
    (folder / "stubs/pynvml.py").write_text(PYNVML, encoding="utf-8")
    words = [word for placement in (*WITH_A_GPU, *IN_RAM) for word in ("--placement", placement)]
    seen = {"PYTHONPATH": os.pathsep.join((str(folder / "stubs"), str(runs.ROOT)))}
    with runs.start(folder, ["tiny"], *words, env=seen) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    results, problems = store.Store(folder / RESULTS).read()
    assert not problems
    return output, {result.case.placement: result for result in results}


def test_what_needs_a_gpu_is_not_here_and_the_cure_is_said(run: tuple[str, dict[str, Result]]) -> None:
    _, results = run
    for placement in WITH_A_GPU:
        result = results[placement]
        assert (result.verdict, result.outcome) == (Verdict.UNAVAILABLE, Outcome.SKIPPED)
        assert "built for the CPU only and cannot use the NVIDIA GeForce RTX 4090: install torch for CUDA" in str(result.why)


def test_no_figure_of_the_cpu_stands_under_the_name_of_a_card(run: tuple[str, dict[str, Result]]) -> None:
    _, results = run
    for placement in IN_RAM:
        result = results[placement]
        assert result.outcome is Outcome.OK, result.why
        assert not result.machine.gpus
        assert "4090" not in result.machine.name
        assert set(result.checks.values()) == {"ok"}
        assert result.estimate is not None
        assert result.loaded is not None
        assert {*result.estimate.tiers} == {"cpu"} == {*result.loaded.tier_bytes}
        assert "vram_peak_bytes" not in result.metrics


def test_the_run_says_it_once_before_the_first_case(run: tuple[str, dict[str, Result]]) -> None:
    output, _ = run
    before_cases = output[: output.index("tiny/bf16/")]
    assert before_cases.count("cannot use the NVIDIA GeForce RTX 4090") == 1


def test_workers_of_such_a_run_see_no_gpu() -> None:
    forkserver.hide_gpus(True)
    try:
        with forkserver.environment():
            hidden = {
                name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
            }
            assert set(hidden.values()) == {""}
            assert os.environ["ONEAPI_DEVICE_SELECTOR"].endswith("!*:gpu")
    finally:
        forkserver.hide_gpus(False)
    with forkserver.environment():
        assert "ONEAPI_DEVICE_SELECTOR" not in os.environ or not os.environ["ONEAPI_DEVICE_SELECTOR"].endswith("!*:gpu")
