"""What the accuracy runs measure here: small models of random weights, each case planned before and run once in its own process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.architecture import model_spec
from harness.catalog import download
from harness.checkpoint import reader
from harness.core.options import DEFAULT_MODEL
from harness.core.precisions import DEFAULT_PRECISIONS
from harness.core.records import Case, Machine, Plan, Result, Workload
from harness.planning.calibration import Calibration
from harness.planning.planner import Planner
from harness.run import forkserver, worker_process
from harness.run.case_result import CaseModel, RunContext
from harness.run.runner import Run
from tests.accuracy.synthetic import MODELS

WORK = Workload(prompt_tokens=64, new_tokens=16, repeats=2)
# Where all of it lies in RAM in every default precision, and on the disk as it is stored.
WAYS = (*((precision, "cpu") for precision in DEFAULT_PRECISIONS), ("bf16", "disk"))


def make_models(directory: Path, names: Iterable[str] = tuple(MODELS)) -> dict[str, Path]:
    """Fetch the default model and make those of random weights; each in a process of its own, for its memory."""
    for name in names:
        program = Path(__file__).with_name("synthetic.py")
        subprocess.run([sys.executable, str(program), str(directory), name], check=True, capture_output=True)
    return {DEFAULT_MODEL: download.fetch(DEFAULT_MODEL), **{name: directory / name for name in names}}


def planner_of(name: str, location: Path, here: Machine, constants: Calibration | None = None) -> Planner:
    """Return what plans a model in a directory, by constants of the package or others."""
    spec = model_spec.of_checkpoint(name, str(location), reader.read(location), location)
    return Planner(spec, here, constants=constants)


def run_all(models: dict[str, Path], here: Machine, scratch: Path, ways: Iterable[tuple[str, str]] = WAYS) -> Iterator[Result]:
    """Run every model in every way that is one; the estimate is made before."""
    context = running(here, scratch)
    for name, location in models.items():
        cases = [Case(model=name, precision=precision, placement=placement, workload=WORK) for precision, placement in ways]
        planner = planner_of(name, location, here)
        for plan in planner.plans(cases):
            if plan.verdict.is_good:
                yield run_plan(planner.made_up(plan), location, context)


def running(here: Machine, scratch: Path) -> RunContext:
    """Return what the cases of a run share."""
    forkserver.warm_up([])
    torch_worker = worker_process.torch_worker
    return RunContext(run="accuracy", machine=here, environment={}, scratch=scratch, worker_main=torch_worker, timeout_s=900)


def run_plan(plan: Plan, location: Path, context: RunContext) -> Result:
    """Run a case once, in a process of its own."""
    run = Run(plan, CaseModel(location=location, tokenizer=(location / "tokenizer.json").is_file()), context)
    run.load()
    for _ in range(WORK.repeats):
        run.round()
    return run.finish()
