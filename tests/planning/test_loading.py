"""What loading takes by what is done: the parts make the whole, and a slow load is told what would make it faster."""

from __future__ import annotations

import pytest
from msgspec import structs

from harness.architecture.model_spec import read_spec
from harness.catalog.resolve import resolve
from harness.core.records import Case, Machine, Plan, Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning.loading import seconds
from harness.planning.planner import Planner

MACHINE = profile(["RTX 3060"], ram=32 * GIB)


def planned(model: str, precision: str, placement: str, machine: Machine = MACHINE) -> tuple[Planner, Plan]:
    spec = read_spec(resolve(model))
    planner = Planner(spec, machine, here=False)
    return planner, planner.plan(Case(model=spec.name, precision=precision, placement=placement, workload=Workload()))


@pytest.mark.parametrize("placement", ["direct", "auto", "cpu", "disk", "gpu+cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "int4", "int8"])
def test_the_phases_are_the_load(precision: str, placement: str) -> None:
    """The estimate of a load lies between that of the page cache and that of the disk, and is one of them at its ends."""
    planner, one = planned("qwen2.5-0.5b-instruct", precision, placement)
    if one.estimate is None:
        pytest.skip(str(one.why))
    time = seconds.timed(planner, one)
    assert time is not None
    assert time.warm_s is not None
    assert sum(time.by_phase.values()) == pytest.approx(time.warm_s.best)
    assert time.cold_s.best == pytest.approx(time.warm_s.best + time.read_s.best)
    assert one.estimate.load_s.low == pytest.approx(time.warm_s.low)
    assert one.estimate.load_s.high == pytest.approx(time.cold_s.high)
    assert time.warm_s.best <= one.estimate.load_s.best <= time.cold_s.best * 1.000001
    assert all(spent > 0 for spent in time.by_phase.values())


@pytest.mark.parametrize(
    ("precision", "placement", "phases"),
    [
        ("bf16", "cpu", set()),
        ("bf16", "direct", {"send to GPU"}),
        ("fp32", "cpu", {"cast"}),
        ("int4", "cpu", {"cast", "quantize"}),
        ("int4", "direct", {"quantize", "send to GPU"}),
    ],
)
def test_each_way_does_what_it_must(precision: str, placement: str, phases: set[str]) -> None:
    time = seconds.timed(*planned("qwen2.5-0.5b-instruct", precision, placement))
    assert time is not None
    assert time.by_phase.keys() == {"start", "open tensors"} | phases


def test_sending_takes_the_weights_over_the_link() -> None:
    planner, one = planned("qwen2.5-0.5b-instruct", "bf16", "direct")
    time = seconds.timed(planner, one)
    assert time is not None
    assert one.estimate is not None
    link = MACHINE.gpus[0].link_bytes_per_s
    assert link is not None
    weights = one.estimate.tiers["gpu:0"].weights_bytes
    assert time.by_phase["send to GPU"] == pytest.approx(weights / (link * planner.constants["link_share"].best), rel=0.01)


def test_files_larger_than_the_ram_are_never_in_it() -> None:
    planner, one = planned("meta-llama-3-70b-instruct", "bf16", "disk")
    time = seconds.timed(planner, one)
    assert time is not None
    assert time.warm_s is None
    assert time.cold_s.best > time.read_s.best > 0


def test_what_is_mapped_is_not_read_while_loading() -> None:
    planner, one = planned("qwen2.5-0.5b-instruct", "bf16", "cpu")
    time = seconds.timed(planner, one)
    assert time is not None
    assert time.read_s.high == 0
    assert "cast" not in time.by_phase


@pytest.mark.parametrize(
    ("precision", "placement", "advice"),
    [
        ("bf16", "direct", "is reading 5.98 GiB from the disk: copy"),
        ("int4", "cpu", "is quantizing: save what you have loaded"),
        ("int8", "cpu", "is quantizing"),
    ],
)
def test_a_slow_load_is_told_what_would_make_it_faster(precision: str, placement: str, advice: str) -> None:
    """A slow disk makes reading the longest, a fast one what the processor does."""
    speed = 1.5e8 if "reading" in advice else 2e10
    tiers = tuple(structs.replace(tier, bytes_per_s=speed) if tier.kind == "disk" else tier for tier in MACHINE.tiers)
    planner, one = planned("llama-3.2-3b-instruct", precision, placement, structs.replace(MACHINE, tiers=tiers))
    assert advice in (seconds.speed_up(planner, one) or "")


def test_a_fast_load_is_left_alone() -> None:
    planner, one = planned("qwen2.5-0.5b-instruct", "bf16", "direct")
    assert seconds.speed_up(planner, one) is None


def test_what_cannot_be_loaded_has_no_phases() -> None:
    planner, one = planned("qwen2.5-0.5b-instruct", "fp8", "cpu")
    assert seconds.timed(planner, one) is None or one.estimate is not None
