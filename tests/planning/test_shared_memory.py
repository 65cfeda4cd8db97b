"""GPUs that have no memory but the machine's: one budget for what lies in them and in the RAM, and no "cpu" to spill to.

Not verified on such a machine: what accelerate lists there is asked of accelerate, with a torch that says it has such a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from harness.core.records import Machine, Verdict
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning.device_map import tiers
from harness.planning.verdict import pooled
from tests.planning.test_cost import case, planner

SPARK = profile(["GB10"], ram=24 * GIB)
# The same sizes twice over, as a card of its own beside as much RAM.
CARD = replace(SPARK, tiers=(replace(SPARK.gpus[0], shared=False), *SPARK.tiers[1:]))


def listed_by_accelerate(monkeypatch: pytest.MonkeyPatch, *, integrated: bool) -> set[object]:
    modeling = pytest.importorskip("accelerate.utils.modeling")
    cuda = SimpleNamespace(
        device_count=lambda: 1,
        mem_get_info=lambda _: (20 * GIB, 24 * GIB),
        get_device_properties=lambda _: SimpleNamespace(is_integrated=integrated),
    )

    def tensor(*_: Any, **__: Any) -> None:
        """Begin on the GPU."""

    monkeypatch.setattr(modeling, "torch", SimpleNamespace(cuda=cuda, tensor=tensor))
    return set(modeling.get_max_memory())


@pytest.mark.parametrize("machine", [SPARK, CARD], ids=["shared", "a card"])
def test_what_may_be_filled_is_what_accelerate_lists(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    listed = listed_by_accelerate(monkeypatch, integrated=machine.shares_ram)
    assert {tiers.device(tier.name) for tier in tiers.fillable(machine)} == listed


@pytest.mark.parametrize("placement", ["auto", "recommended", "dispatch"])
def test_what_does_not_fit_spills_to_the_disk(placement: str) -> None:
    shared, own = (planner(machine=machine).plan(case(f"fp32/{placement}")) for machine in (SPARK, CARD))
    assert isinstance(shared.device_map, dict)
    assert isinstance(own.device_map, dict)
    assert set(shared.device_map.values()) == {"gpu:0", "disk"}
    assert "cpu" in {*own.device_map.values()}


def test_a_limit_leaves_the_ram_out_as_well() -> None:
    small = replace(SPARK, tiers=(replace(SPARK.gpus[0], limit_bytes=8 * GIB), *SPARK.tiers[1:]))
    assert set(planner(machine=small).plan(case("bf16/auto")).max_memory or {}) == {"gpu:0"}


def test_both_count_on_one_budget() -> None:
    """16 GB of weights on the GPU, copied there from as many in RAM: more than there is once, and not more than there is twice."""
    shared, own = (planner(machine=machine).plan(case("bf16/ram-to-gpu")) for machine in (SPARK, CARD))
    assert (shared.verdict, own.verdict) == (Verdict.TOO_BIG, Verdict.FITS)
    assert (shared.why or "").startswith("too big for the memory that gpu:0 and cpu share: needs ")
    assert planner(machine=SPARK).plan(case("bf16/direct")).verdict is Verdict.FITS


def test_the_budget_is_the_sum_of_what_each_needs() -> None:
    expected = planner(machine=SPARK).plan(case("bf16/direct")).estimate
    assert expected is not None
    both = pooled(expected.tiers, SPARK)["cpu"]
    gpu, cpu = expected.tiers["gpu:0"], expected.tiers["cpu"]
    assert both.needed_bytes == gpu.needed_bytes + cpu.needed_bytes
    assert both.anon_bytes == gpu.needed_bytes + cpu.anon_bytes
    assert both.capacity_bytes == cpu.capacity_bytes
    assert pooled(expected.tiers, CARD) == expected.tiers


def test_the_recommended_map_leaves_the_process_its_ram() -> None:
    planning = planner(machine=SPARK)
    plan = planning.plan(case("fp32/recommended"))
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.estimate is not None
    both = pooled(plan.estimate.tiers, SPARK)["cpu"]
    assert both.needed_high_bytes <= (both.capacity_bytes or 0)


def test_the_longest_context_counts_on_one_budget() -> None:
    tight = profile(["GB10"], ram=17 * GIB)
    own = replace(tight, tiers=(replace(tight.gpus[0], shared=False), *tight.tiers[1:]))
    contexts = []
    for machine in (tight, own):
        planning = planner(machine=machine)
        contexts.append(planning.max_context(planning.plan(case("bf16/direct"))) or 0)
    assert contexts[0] < contexts[1]
