"""What the accuracy runs measure here: small models of random weights, each case planned before and run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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

WORK = Workload(prompt_tokens=64, new_tokens=16, repeats=3)
# Where all of it lies in RAM in every default precision, and on the disk as it is stored.
WAYS = (*((precision, "cpu") for precision in DEFAULT_PRECISIONS), ("bf16", "disk"))
# What is run once more with its files on the disk alone: as it may be stored, and so that every weight is cast.
AT_FIRST = (("bf16", "cpu"), ("fp32", "cpu"))


def make_models(directory: Path, names: Iterable[str] = tuple(MODELS)) -> dict[str, Path]:
    """Fetch the default model and make those of random weights; each in a process of its own, for its memory.

    What was made is on the disk at the end: gigabytes that are still written slow down the loads that calibrate, which come first.
    """
    for name in names:
        program = Path(__file__).with_name("synthetic.py")
        subprocess.run([sys.executable, str(program), str(directory), name], check=True, capture_output=True)
    found = {DEFAULT_MODEL: download.fetch(DEFAULT_MODEL), **{name: directory / name for name in names}}
    os.sync()
    return found


def planner_of(name: str, location: Path, here: Machine, constants: Calibration | None = None) -> Planner:
    """Return what plans a model in a directory, by constants of the package or others."""
    spec = model_spec.of_checkpoint(name, str(location), reader.read(location), location)
    return Planner(spec, here, constants=constants)


def run_all(models: dict[str, Path], here: Machine, scratch: Path, ways: Iterable[tuple[str, str]] = WAYS) -> Iterator[Result]:
    """Run every model in every way that is one, its files in the page cache, and some with their files on the disk alone.

    The default model, which calibrates, is run first, in the middle and last: what a machine does in one minute it need not do in
    another. The estimate of a case is made before it runs.
    """
    context = running(here, scratch)
    others = [name for name in models if name != DEFAULT_MODEL]
    half = len(others) // 2
    for name in (DEFAULT_MODEL, *others[:half], DEFAULT_MODEL, *others[half:], DEFAULT_MODEL) if others else models:
        yield from _run_each(name, models[name], context, ways, to_cache)
        if name != DEFAULT_MODEL:
            yield from _run_each(name, models[name], context, AT_FIRST, to_disk)


def _run_each(
    name: str, location: Path, context: RunContext, ways: Iterable[tuple[str, str]], put: Callable[[Path], None]
) -> Iterator[Result]:
    cases = [Case(model=name, precision=precision, placement=placement, workload=WORK) for precision, placement in ways]
    planner = planner_of(name, location, context.machine)
    for plan in planner.plans(cases):
        if plan.verdict.is_good:
            put(location)
            yield run_plan(planner.made_up(plan), location, context)


def to_cache(location: Path) -> None:
    """Read the files of a model: where a system takes back pages that nobody reads, they are in the page cache again."""
    for file in _files(location):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def to_disk(location: Path) -> None:
    """Let the page cache forget the files of a model."""
    for file in _files(location):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(location: Path) -> list[Path]:
    return [file for file in location.rglob("*") if file.is_file()]


def running(here: Machine, scratch: Path) -> RunContext:
    """Return what the cases of a run share."""
    forkserver.warm_up([])
    torch_worker = worker_process.torch_worker
    return RunContext(run="accuracy", machine=here, environment={}, scratch=scratch, worker_main=torch_worker, timeout_s=900)


def run_plan(plan: Plan, location: Path, context: RunContext) -> Result:
    """Run a case once, in a process of its own."""
    weights = sum(file.stat().st_size for file in location.glob("*.safetensors"))
    model = CaseModel(location=location, tokenizer=(location / "tokenizer.json").is_file(), files_bytes=weights)
    run = Run(plan, model, context)
    run.load()
    for _ in range(WORK.repeats):
        run.round()
    return run.finish()
