"""The programs that `fitmatrix plan --code` prints: each is run as a user would run it, and needs the memory that was estimated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.catalog import download
from harness.core.options import DEFAULT_MODEL
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS
from harness.measure import system_counters

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"
# Enough for an answer; the rest of the workload is the default.
WORKLOAD = ("--new-tokens", "8")
CASES = [
    f"{precision.name}/{placement.name}"
    for precision in map(PRECISIONS.__getitem__, DEFAULT_PRECISIONS)
    for placement in PLACEMENTS.values()
    if not precision.incompatible.keys() & set(placement.traits)
]
# Appended to a program: the most that its process ever had resident, in kB.
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
# How far an estimate may be off where nothing is quantized or passes through the RAM from the disk: what the heap keeps of that
# varies from run to run.
NEAR = 0.15

pytestmark = pytest.mark.skipif(not system_counters.LINUX, reason="VmHWM is Linux's")


def fitmatrix(*arguments: str) -> str:
    command = [sys.executable, "-m", "harness", "plan", DEFAULT_MODEL, *WORKLOAD, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    """Fetch the default model; return its plans for this machine by precision and placement."""
    download.fetch(DEFAULT_MODEL)
    found = json.loads(fitmatrix("--json"))["plans"]
    return {f"{plan['precision']}/{plan['placement']}": plan for plan in found}


def run(program: str, folder: Path) -> tuple[str, int]:
    """Run a program in a fresh process and an empty folder, without the hub; return what it prints and its peak in bytes."""
    path = folder / "program.py"
    path.write_text(program + PEAK, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(path)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, peak = done.stdout.rstrip("\n").rpartition("\n")
    return text, int(peak) * 1024


@pytest.mark.parametrize("case", CASES)
def test_printed_code_runs_in_the_memory_that_was_estimated(case: str, plans: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    if case not in plans:
        pytest.skip("the same as another placement without a GPU")
    plan = plans[case]
    if plan["verdict"] not in ("fits", "tight"):
        pytest.skip(plan["why"])
    said, peak = run(fitmatrix("--code", case), tmp_path)
    expected = plan["tiers"]["cpu"]
    assert expected["low_bytes"] <= peak <= expected["high_bytes"]
    assert said.startswith(PROMPT)
    assert len(said) > len(PROMPT)
    if PRECISIONS[plan["precision"]].quantization is None:
        assert said.startswith(f"{PROMPT} Paris")
        if "offloads_to_cpu" not in PLACEMENTS[plan["placement"]].traits:
            assert peak == pytest.approx(expected["peak_bytes"], rel=NEAR)


def test_what_needs_no_gpu_fits_here(plans: dict[str, dict[str, Any]]) -> None:
    """Else the programs above would be skipped unseen."""
    alone = [name for name in distinct(PLACEMENTS, gpus=0) if not PLACEMENTS[name].needs_gpu]
    plain = [case for case in CASES if case.rpartition("/")[2] in alone]
    assert len(plain) >= 16
    assert {plans[case]["verdict"] for case in plain} <= {"fits", "tight"}
