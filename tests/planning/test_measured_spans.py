"""What a measured machine leaves open of a time: less than all constants at their ends, and no less than runs differ by."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
from msgspec.structs import replace

from harness.architecture import model_spec
from harness.catalog import resolve
from harness.core.records import Case, Estimate, Span
from harness.planning.calibrating.evidence import FIGURES
from harness.planning.calibration import NINETY, Calibration, Fitted, default
from harness.planning.planner import Planner
from tests.support import builders

SPEC = model_spec.read_spec(resolve.resolve("codegen-350m-mono"))
ONE = Fitted(factor=1.0, results=1, cases=1)
FIGURE = {"load_s": "load_s", "first_token_s": "first_token_s", "token_s": "decode_tok_s"}


def measured(*names: str, exact: Collection[str] = ()) -> Calibration:
    """Constants of the package as if results had confirmed some of them; `exact` ones have no interval."""
    constants = dict(default().constants)
    for name in exact:
        constants[name] = replace(constants[name], low=constants[name].best, high=constants[name].best)
    return replace(default(), constants=constants, fitted=dict.fromkeys(names, ONE))


def planned(constants: Calibration, *, on_gpu: bool = False, native: bool | None = None) -> Estimate:
    machine = replace(builders.machine(*([builders.gpu()] if on_gpu else [])), avx512_bf16=native)
    planner = Planner(SPEC, machine, constants=constants, here=False)
    found = planner.plan(Case(model=SPEC.name, precision="bf16", placement="direct" if on_gpu else "cpu")).estimate
    assert found is not None
    return found


def width(one: Span) -> float:
    return one.high / one.low


@pytest.mark.parametrize("figure", FIGURE.values())
def test_parts_of_a_measured_machine_are_not_all_off_to_one_side(figure: str) -> None:
    before, after = (getattr(planned(measured(*names)), figure) for names in ((), ("cpu_s_per_operation",)))
    assert after.best == before.best
    assert before.low < after.low < after.best < after.high < before.high
    assert width(after) < 0.9 * width(before)


@pytest.mark.parametrize(("figure", "field"), FIGURE.items())
def test_runs_differ_where_every_constant_is_known(figure: str, field: str) -> None:
    """The files are in the page cache or on the disk: that no constant says."""
    exact = measured("cpu_s_per_operation", exact=default().constants)
    noise = math.exp(NINETY * FIGURES[figure].noise)
    span = getattr(planned(exact), field)
    assert span.best / span.low == pytest.approx(noise, rel=1e-6) if field != "load_s" else span.best / span.low >= noise
    assert span.high / span.best >= noise * (1 - 1e-9)


def test_what_was_measured_of_a_processor_says_nothing_of_a_card() -> None:
    assert planned(measured("cpu_s_per_operation"), on_gpu=True).load_s == planned(measured(), on_gpu=True).load_s
    assert width(planned(measured("gpu_bandwidth_share"), on_gpu=True).load_s) < width(planned(measured(), on_gpu=True).load_s)


def test_a_processor_that_multiplies_bfloat16_reads_a_prompt_sooner() -> None:
    unknown, lacks, has = (planned(measured(), native=native).first_token_s for native in (None, False, True))
    assert unknown == lacks
    assert has.best < 0.9 * lacks.best
    assert width(has) < width(lacks)
