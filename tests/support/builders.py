"""Records for tests, whole and small: each takes what the test is about and fills in the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.architecture.skeleton import Skeleton
from harness.core.records import Case, Loaded, Machine, Outcome, Result, Tier, Verdict, Workload
from harness.core.units import GIB
from harness.planning.cost import memory
from harness.planning.cost.memory import WeightFormat

GOLDEN = Path(__file__).parents[1] / "data/results-v1.jsonl"


def gpu(index: int = 0, *, compute_capability: str | None = "8.6", free_bytes: int | None = 11 * GIB) -> Tier:
    return Tier(
        name=f"gpu:{index}",
        kind="gpu",
        total_bytes=12 * GIB,
        free_bytes=free_bytes,
        model="RTX 3060",
        compute_capability=compute_capability,
    )


def machine(*gpus: Tier, ram_bytes: int | None = 16 * GIB) -> Machine:
    """A machine with these cards, RAM that is all free, and a disk."""
    cpu = Tier(name="cpu", kind="cpu", total_bytes=ram_bytes, free_bytes=ram_bytes)
    return Machine(name="a machine", tiers=(*gpus, cpu, Tier(name="disk", kind="disk")))


def case(precision: str = "bf16", placement: str = "cpu", *, model: str = "tiny", **workload: int) -> Case:
    return Case(model=model, precision=precision, placement=placement, workload=Workload(**workload))


def result(of: Case | None = None, **changes: Any) -> Result:
    """The result of a case that worked."""
    of = of or case()
    given: dict[str, Any] = {
        "id": of.id,
        "run": "20261124T080000Z-abc123",
        "at": "2026-11-24T08:00:00Z",
        "case": of,
        "weights": "real",
        "machine": machine(),
        "verdict": Verdict.UNKNOWN,
        "outcome": Outcome.OK,
        "stage": "done",
    }
    return Result(**given | changes)


def loaded(
    linear: dict[str, int] | None = None, tiers: dict[str, int] | None = None, device_map: dict[str, str] | None = None
) -> Loaded:
    """What was loaded: bytes of Linear weights by dtype, bytes of all parameters by tier."""
    linear = {"bfloat16": 1000} if linear is None else linear
    return Loaded(
        model_class="TinyForCausalLM",
        dtype_bytes={**linear, "float32": linear.get("float32", 0) + 8},
        linear_dtype_bytes=linear,
        tier_bytes={"cpu": 1008} if tiers is None else tiers,
        device_map=device_map or {"": "cpu"},
    )


def weight_bytes(skeleton: Skeleton, fmt: WeightFormat) -> dict[str, int]:
    """Return the bytes of every tensor of a model by path, as the planner counts them."""
    return memory.module_bytes(skeleton.root, fmt)
