"""Planned load peaks against transformers' own loader, on ten hollow checkpoints of full size.

    pytest -s -o python_files=oracle_*.py tests/oracle/oracle_loads.py

Each is loaded twice where threads copy ahead of the loader: one tensor after the other, the least, and all before the first is set,
the most, which is what the plan asks for. Nothing but headers is read, so the files take no disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture import model_spec
from harness.catalog import shipped
from harness.checkpoint import reader
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, TierEstimate, Workload
from harness.core.units import GIB, MIB
from harness.machine.gpus import profile
from harness.planning import calibration
from harness.planning.planner import Planner
from harness.worker.trace.load import Cards, LoadPeak, trace_load
from tests.support import hollow
from tests.support.reporting import Figure, Section, table

MACHINE = profile(["2000GiB"], ram=4000 * GIB)
SHARE, SLACK = 0.02, 64 * MIB
CONTEXT = int(sum(calibration.default()[name].best for name in ("gpu_context_bytes", "gpu_workspace_bytes")))


class Checkpoint(NamedTuple):
    """A model of the catalog, how its hollow files hold it, and in which precisions it is loaded."""

    model: str
    what: str
    precisions: tuple[str, ...] = ("bf16", "int8", "int4")
    config: dict[str, Any] = {}
    files: dict[str, Any] = {}


CHECKPOINTS = (
    Checkpoint("llama-3.1-8b-instruct", "plain", ("bf16", "int8", "int4", "nf4-dq", "fp8")),
    Checkpoint("qwen2.5-7b-instruct", "plain, biases"),
    Checkpoint("gemma-2-2b-it", "tied head"),
    Checkpoint("gemma-3-4b-it", "tied head, stored all the same", files={"repeats_head": True}),
    Checkpoint("stablelm-tuned-alpha-7b", "fp32 in .bin", ("fp16", "int8", "int4"), files={"dtype": "float32", "ending": "bin"}),
    Checkpoint("phi-2", "fp32 cast", files={"dtype": "float32"}),
    Checkpoint("chatglm2-6b", "query, key and value split", files={"dtype": "float16"}),
    Checkpoint("mixtral-8x7b-instruct-v0.1", "experts stacked, w1 to w3", ("bf16", "int8", "int4", "fp8")),
    Checkpoint("qwen3-30b-a3b", "experts stacked, gate and up first", ("bf16", "int8", "int4", "fp8")),
    Checkpoint("deepseek-v2-lite-chat", "experts stacked, some layers dense"),
)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def planned(folder: Path, precision: str) -> TierEstimate:
    spec = model_spec.of_checkpoint(folder.name, str(folder), reader.read(folder), folder)
    case = Case(model=spec.name, precision=precision, placement=PLACEMENTS["direct"].name, workload=Workload(new_tokens=1, batch=1))
    found = Planner(spec, MACHINE, here=False).plan(case).estimate
    assert found is not None
    return found.tiers["gpu:0"]


def traced(folder: Path, precision: str) -> tuple[LoadPeak, LoadPeak]:
    """Load one tensor after the other, and with threads far ahead where there are any."""
    cards = Cards(capability="9.0")
    (alone,) = trace_load(folder, precision, {"": 0}, cards)
    if PRECISIONS[precision].quantizes:
        return alone, alone
    (ahead,) = trace_load(folder, precision, {"": 0}, cards, ahead=True)
    return alone, ahead


def test_load_peaks(tmp_path: Path, figures: list[Figure], section: Section) -> None:
    rows, off = [], list[tuple[float, float]]()
    for one in CHECKPOINTS:
        config = {**shipped.catalog()[shipped.hub_id(one.model)].config, **one.config}
        folder = hollow.write(tmp_path / one.model, config, **one.files)
        for precision in one.precisions:
            alone, ahead = traced(folder, precision)
            tier = planned(folder, precision)
            given = tier.load_peak_bytes - CONTEXT
            off.append((abs(given - ahead.peak_bytes), ahead.peak_bytes))
            over = [f"{size / MIB:,.1f}" for size in (alone.over_bytes, ahead.over_bytes, given - tier.weights_bytes)]
            rows.append([one.model, one.what, precision, f"{alone.held_bytes / GIB:.3f}", *over])
    share, nbytes = max(miss / peak for miss, peak in off), max(miss for miss, _ in off)
    what = "load peaks of ten hollow checkpoints against transformers' loader: largest error, as a share and in bytes"
    figures.append(Figure(what=what, found=f"{share:.4%}, {nbytes / MIB:.2f} MiB", wanted="2 % or 64 MiB", rows=len(off)))
    heads = ["model", "files", "precision", "weights, GiB", "over, one by one, MiB", "over, threads ahead", "over, planned"]
    section.notes.append("\n".join(table(heads, rows)))
    assert all(miss <= max(SHARE * peak, SLACK) for miss, peak in off)
