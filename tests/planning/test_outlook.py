"""What a plan says to who watches: how the KV cache grows, and what takes less of a tier."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.records import Case, Plan, Workload
from harness.core.units import GIB
from harness.live.headroom import planned_kv
from harness.machine.gpus import profile
from harness.measure.beacon import Announced, Outlook
from harness.planning.outlook import kv_growth, lighter
from harness.planning.planner import Planner
from tests.support import builders, small_models

WORK = Workload(prompt_tokens=20, new_tokens=4, batch=2)


# Full attention; sliding windows of eight tokens in every second layer; a state of fixed size.
@pytest.mark.parametrize(("kind", "given"), [("llama", {}), ("gemma2", {"sliding_window": 8}), ("mamba", {})])
def test_between_its_knots_the_cache_grows_evenly(tmp_path: Path, kind: str, given: dict[str, int]) -> None:
    small_models.save(kind, tmp_path, **given)
    spec = read_spec(resolve.resolve(str(tmp_path)))
    planner = Planner(spec, builders.machine(), here=False)
    case = Case(model=spec.name, precision="bf16", placement="cpu", workload=WORK)
    planner.plan(case)
    footprint = planner.footprints[case.id]
    knots = kv_growth(footprint, spec.context_length)
    said = Announced(case=case.id, workload=WORK, outlook=Outlook(kv=knots))
    for tokens in (1, 5, 8, 9, 17, 23, 24, 57):
        exact = footprint.with_workload(replace(WORK, prompt_tokens=tokens, new_tokens=1)).kv
        assert {tier: planned_kv(said, tier, tokens) for tier in knots} == exact


def test_a_static_cache_is_whole_from_the_start(tmp_path: Path) -> None:
    small_models.save("llama", tmp_path)
    planner = Planner(read_spec(resolve.resolve(str(tmp_path))), builders.machine(), here=False)
    case = Case(model="tiny", precision="bf16", placement="cpu", workload=WORK, kv="static")
    planner.plan(case)
    sizes = {size for _, size in kv_growth(planner.footprints[case.id], 512)["cpu"]}
    assert sizes == {planner.footprints[case.id].kv["cpu"]}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Ways of one model on a card of 24 GiB, by precision, placement and KV cache."""
    planner = Planner(read_spec(resolve.resolve("qwen2.5-7b-instruct")), profile(["RTX 4090"], ram=64 * GIB), here=False)
    work = Workload(prompt_tokens=4096, new_tokens=64)
    ways = [("bf16", "direct", "dynamic"), ("int4", "direct", "dynamic"), ("bf16", "direct", "fp8"), ("bf16", "cpu", "dynamic")]
    cases = [
        Case(model="qwen2.5-7b-instruct", precision=precision, placement=placement, kv=kv, workload=work)
        for precision, placement, kv in ways
    ]
    return {one.case.way: one for one in planner.plans(cases)}


def test_what_takes_less_of_a_tier_is_named_by_the_one_thing_that_is_different(plans: dict[str, Plan]) -> None:
    found = lighter(plans["bf16/direct"], list(plans.values()))
    assert found["gpu:0"].startswith("Try --precision int4 or --placement cpu")
    assert "cpu" not in lighter(plans["bf16/direct"], [plans["bf16/cpu"]])  # which takes more of the RAM


def test_nothing_is_named_that_takes_more_or_is_different_in_two_things(plans: dict[str, Plan]) -> None:
    assert "gpu:0" not in lighter(plans["int4/direct"], [plans["bf16/direct"], plans["int4/direct"], plans["bf16/cpu"]])
