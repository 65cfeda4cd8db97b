"""A slower tier never makes a model faster: over all precisions, and whatever speeds a machine was measured to have."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Machine, Plan, Span, Verdict
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning.choice.recommend import choose_best
from harness.planning.planner import Planner
from tests.support.builders import case

# Bytes per second: from what a busy minute leaves to what no machine has.
SPEEDS = st.floats(1e8, 1e13)
MODELS = ("smollm2-135m", "chatglm-6b", "qwen2.5-7b-instruct", "mixtral-8x7b-instruct-v0.1")


@cache
def spec(name: str) -> ModelSpec:
    return model_spec.read_spec(resolve.resolve(name))


def machine(gpus: Iterable[str], ram: int, speeds: dict[str, float]) -> Machine:
    found = profile(list(gpus), ram=ram, disk=2000 * GIB)
    tiers = tuple(replace(tier, bytes_per_s=speeds[tier.kind], link_bytes_per_s=speeds["link"]) for tier in found.tiers)
    return replace(found, tiers=tiers, cores=8)


def planner(model: str, on: Machine) -> Planner:
    return Planner(spec(model), on, here=False)


def plans(model: str, on: Machine, precision: str, by: Planner | None = None) -> list[Plan]:
    # Experts that stay in RAM are multiplied there, which is faster than bringing them to a GPU.
    rows = (row for row in PLACEMENTS.values() if not row.parallel and not row.experts_in_ram)
    cases = [case(precision, row.name, model=model) for row in rows]
    return [one for one in (by or planner(model, on)).plans(cases) if one.estimate and one.verdict.is_good]


def opened(one: Plan, by: Planner) -> float:
    """Return how many tensors on the disk a token opens, which takes its time however small they are."""
    sums = by.footprints[one.case.id].sums
    return sums["disk"].tensors if "disk" in sums else 0.0


def down_to(one: Plan, kinds: tuple[str, ...]) -> int:
    """Bytes of the weights in these kinds of tiers."""
    assert one.estimate
    return sum(tier.weights_bytes for name, tier in one.estimate.tiers.items() if name.partition(":")[0] in kinds)


def is_slower(slow: Plan, fast: Plan) -> bool:
    """Whether `slow` has no more of the weights in each of the faster tiers, down to all tiers, where both have the same."""
    levels = (("gpu",), ("gpu", "cpu"), ("gpu", "cpu", "disk"))
    held = [(down_to(slow, kinds), down_to(fast, kinds)) for kinds in levels]
    return (held[0][1] > 0) == (held[0][0] > 0) and all(less <= more for less, more in held[:-1]) and held[-1][0] == held[-1][1]


@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    model=st.sampled_from(MODELS),
    gpus=st.sampled_from([(), ("8GiB",), ("24GiB", "24GiB")]),
    ram=st.sampled_from([6 * GIB, 16 * GIB, 128 * GIB]),
    speeds=st.fixed_dictionaries({"gpu": SPEEDS, "cpu": SPEEDS, "disk": SPEEDS, "link": SPEEDS}),
)
@settings(max_examples=12, deadline=None)
def test_a_slower_tier_never_raises_the_best_speed(
    precision: str, model: str, gpus: tuple[str, ...], ram: int, speeds: dict[str, float]
) -> None:
    by = planner(model, machine(gpus, ram, speeds))
    found = plans(model, by.machine, precision, by)
    for slow, fast in permutations(found, 2):
        if is_slower(slow, fast) and opened(slow, by) >= opened(fast, by):
            assert slow.estimate
            assert fast.estimate
            said = f"{slow.case.placement} {slow.estimate.decode_tok_s} {fast.case.placement} {fast.estimate.decode_tok_s}"
            assert slow.estimate.decode_tok_s.best <= fast.estimate.decode_tok_s.best * (1 + 1e-6), said


@pytest.mark.parametrize("ram_bytes_per_s", [1e9, 4e9, 30e9])
def test_what_fits_in_ram_is_not_recommended_from_the_disk(ram_bytes_per_s: float) -> None:
    speeds = {"gpu": 1e12, "link": 1e10, "cpu": ram_bytes_per_s, "disk": 7e9}
    for name in ("smollm2-135m", "chatglm-6b"):
        every = [one for precision in ("fp32", "bf16", "fp16") for one in plans(name, machine((), 128 * GIB, speeds), precision)]
        best = choose_best(every)
        assert best
        assert not down_to(best[0], ("disk",))


def sped(one: Plan, low: float, best: float, high: float) -> Plan:
    assert one.estimate
    return replace(one, estimate=replace(one.estimate, decode_tok_s=Span(low=low, best=best, high=high)), verdict=Verdict.FITS)


@pytest.mark.parametrize(("lead", "chosen"), [(1.04, "cpu"), (2.0, "cpu"), (30.0, "disk")])
def test_the_simpler_placement_wins_inside_the_doubt(lead: float, chosen: str) -> None:
    found = {
        one.case.placement: one
        for one in plans("smollm2-135m", machine((), 8 * GIB, {"cpu": 1e10, "disk": 1e9, "link": 1e9}), "bf16")
    }
    cpu, disk = sped(found["cpu"], 3, 10, 30), sped(found["disk"], 3 * lead, 10 * lead, 30 * lead)
    best = choose_best([disk, cpu])
    assert best
    assert best[0].case.placement == chosen
