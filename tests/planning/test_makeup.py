"""How an estimate is made up of the constants agrees with what the cost model says when a constant changes."""

from __future__ import annotations

import math

import msgspec
import pytest

from harness.architecture import model_spec
from harness.catalog import resolve
from harness.core.records import Case, Makeup
from harness.planning.calibrating.evidence import FIGURES
from harness.planning.calibrating.fit import predicted
from harness.planning.calibration import default
from harness.planning.cost.makeup import makeup
from harness.planning.planner import Planner
from tests.support import builders

MACHINES = {"cpu": builders.machine(), "direct": builders.machine(builders.gpu())}
CASES = [("bf16", "cpu"), ("fp32", "cpu"), ("int8", "cpu"), ("int4", "cpu"), ("bf16", "direct"), ("int4", "direct")]


@pytest.fixture(scope="module")
def spec() -> model_spec.ModelSpec:
    return model_spec.read_spec(resolve.resolve("codegen-350m-mono"))


@pytest.mark.parametrize(("precision", "placement"), CASES)
@pytest.mark.parametrize("times", [0.8, 1.25])
def test_a_changed_constant_changes_the_figures_as_the_makeup_says(
    spec: model_spec.ModelSpec, precision: str, placement: str, times: float
) -> None:
    machine = MACHINES[placement]
    planner = Planner(spec, machine, here=False)
    one = planner.plan(Case(model=spec.name, precision=precision, placement=placement))
    footprint, names = planner.footprints[one.case.id], planner.used(one)
    found = makeup(footprint, precision, machine, default(), names)
    assert found.keys() <= FIGURES.keys()
    for name in {name for figure in found.values() for name in figure.parts}:
        changed = msgspec.structs.replace(default()[name], best=default()[name].best * times)
        base = msgspec.structs.replace(default(), constants={**default().constants, name: changed})
        whole = {figure: each.whole for figure, each in makeup(footprint, precision, machine, base, ()).items()}
        said = {figure: predicted(each, {name: math.log(times)}) for figure, each in found.items()}
        assert whole == pytest.approx(said, rel=0.02), name  # bytes are whole numbers, and a GPU waits for the longer of two


def test_a_plan_that_is_to_be_measured_says_how_it_is_made_up(spec: model_spec.ModelSpec) -> None:
    planner = Planner(spec, MACHINES["direct"], here=False)
    one = planner.plan(Case(model=spec.name, precision="bf16", placement="direct"))
    assert one.estimate is not None
    assert not one.estimate.makeup
    made = planner.made_up(one).estimate
    assert made is not None
    assert made.makeup.keys() == {name for name, figure in FIGURES.items() if figure.metric}
    assert made.makeup["vram_allocated_bytes"].whole == one.estimate.tiers["gpu:0"].allocated_bytes
    assert made.makeup["vram_process_bytes"].parts["gpu_context_bytes"] == pytest.approx(450e6, rel=0.01)


def test_a_context_that_was_measured_is_no_constant(spec: model_spec.ModelSpec) -> None:
    card = msgspec.structs.replace(builders.gpu(), context_bytes=520_000_000)
    planner = Planner(spec, builders.machine(card), here=False)
    made = planner.made_up(planner.plan(Case(model=spec.name, precision="bf16", placement="direct"))).estimate
    assert made is not None
    assert isinstance(made.makeup["vram_process_bytes"], Makeup)
    assert "gpu_context_bytes" not in made.makeup["vram_process_bytes"].parts
