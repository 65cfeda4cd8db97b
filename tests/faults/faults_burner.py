"""A foreign process in the middle of a measurement.

Run by `tox run -e faults` on a quiet machine. Whether a run that is to be quiet really was is measured in another way than the
harness does it: by adding up what each other process has used. A run that somebody disturbed is repeated.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil
import pytest

from harness.catalog import download
from harness.checkpoint import reader
from harness.core.options import DEFAULT_MODEL
from harness.core.records import Case, Interference, Plan, Result, Workload
from harness.machine import probe
from harness.planning.feasibility import decide
from harness.run import forkserver, worker_process
from harness.run.case_result import CaseModel, RunContext
from harness.run.runner import Run
from tests.support.reporting import Figure

RUNS, MOST_ATTEMPTS = 20, 60
WORK = Workload(prompt_tokens=16, new_tokens=6, repeats=5)
QUIET_S = 0.05  # what the daemons of an idle system may use during a run


class Bench(NamedTuple):
    """What all runs share."""

    plan: Plan
    model: CaseModel
    context: RunContext


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    location = download.fetch(DEFAULT_MODEL)
    forkserver.warm_up(["transformers.models.llama.modeling_llama"])
    with TemporaryDirectory(prefix="burner-") as scratch:
        context = RunContext(
            run="burner",
            machine=probe.probe(),
            environment=probe.versions(),
            scratch=Path(scratch),
            worker_main=worker_process.torch_worker,
            timeout_s=600,
        )
        case = Case(model=DEFAULT_MODEL, precision="bf16", placement="cpu", workload=WORK)
        yield Bench(decide(case, context.machine, reader.read(location)), CaseModel(location=location), context)


@contextmanager
def burner() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burning:
        try:
            yield
        finally:
            burning.kill()


def run_case(bench: Bench, in_the_middle: Callable[[], object]) -> Result:
    """Measure a case; half-way through its third warm round something happens."""
    run = Run(bench.plan, bench.model, bench.context)
    try:
        run.round()
        half_s = run.round().total_s / 2
        threading.Timer(half_s, in_the_middle).start()
        while len(run.warm) < WORK.repeats:
            run.round()
    finally:
        result = run.finish()
    return result


def used_by_others() -> float:
    """Add up the CPU seconds of all processes but this one and what it started, with those that they have waited for."""
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    total = 0.0
    for other in psutil.process_iter():
        if other.pid not in ours:
            try:
                total += sum(other.cpu_times()[:4])
            except psutil.Error:
                continue
    return total


def warm(result: Result) -> list[Interference]:
    return [window for window in result.interference if window.phase == "warm"]


def test_a_burner_is_flagged(bench: Bench, figures: list[Figure]) -> None:
    flagged, shares, slower = 0, [], []
    for _ in range(RUNS):
        with ExitStack() as burning:
            result = run_case(bench, lambda burning=burning: burning.enter_context(burner()))  # type: ignore[misc]
        flagged += "decode_tok_s" in result.noisy and any(window.why for window in warm(result))
        shares += [window.others_cores or 0.0 for window in warm(result)[WORK.repeats // 2 + 1 :]]
        speeds = result.samples["decode_tok_s"]
        slower.append(speeds[1] / speeds[-1])
    figures.append(Figure(what="runs with a burner that are flagged", rows=RUNS, found=f"{flagged} of {RUNS}", wanted="all"))
    found = f"{min(shares):.2f} to {max(shares):.2f}, median {statistics.median(shares):.2f}"
    figures.append(Figure(what="cores that others used in rounds beside it", rows=len(shares), found=found, wanted="above 0.05"))
    found = f"x {statistics.median(slower):.1f}"
    figures.append(Figure(what="how much slower the last round decodes", rows=RUNS, found=found, wanted=""))
    assert flagged == RUNS


def test_a_quiet_run_is_not(bench: Bench, figures: list[Figure]) -> None:
    quiet: list[Result] = []
    attempts = 0
    while len(quiet) < RUNS and attempts < MOST_ATTEMPTS:
        attempts += 1
        before_s = used_by_others()
        result = run_case(bench, lambda: None)
        if used_by_others() - before_s <= QUIET_S:
            quiet.append(result)
    flagged = [result.noisy for result in quiet if any(window.why for window in result.interference)]
    shares = [window.others_cores or 0.0 for result in quiet for window in result.interference if window.phase != "load"]
    found = f"{len(flagged)} of {len(quiet)}"
    figures.append(Figure(what="quiet runs that are flagged", rows=len(quiet), found=found, wanted="none"))
    if shares:
        found = f"median {statistics.median(shares):.3f}, highest {max(shares):.3f}"
        figures.append(Figure(what="cores that others used in their rounds", rows=len(shares), found=found, wanted="below 0.05"))
    what = "runs that others on this machine disturbed, repeated"
    figures.append(Figure(what=what, rows=attempts, found=str(attempts - len(quiet)), wanted=""))
    assert len(quiet) == RUNS, f"this machine is too busy to tell: {len(quiet)} of {attempts} runs were quiet"
    assert not flagged
