"""What a plan is about, in a line each: the model, the machine, and what is assumed of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from harness.architecture.model_spec import ModelSpec
from harness.core.records import Machine, Plan, Tier
from harness.core.units import format_bandwidth, format_count, format_gib
from harness.machine import headroom
from harness.planning import calibration
from harness.planning.choice.recommend import Recommendation


def model_line(spec: ModelSpec) -> str:
    """Name a model and its size."""
    context = f", context {spec.context_length:,}" if spec.context_length else ""
    return f"{spec.name}: {format_count(spec.skeleton.parameters)} parameters, {len(spec.skeleton.layers)} blocks{context}"


def machine_line(machine: Machine) -> str:
    """Name the memories of a machine, with what is free and how fast they are; equal GPUs once."""
    said = Counter(_tier_line(tier) for tier in machine.tiers if tier.kind in ("gpu", "cpu"))
    return "   ".join(f"{count} x {line}" if count > 1 else line for line, count in said.items())


def _tier_line(tier: Tier) -> str:
    name = "RAM" if tier.kind == "cpu" else tier.model or "GPU"
    speed = f", {format_bandwidth(tier.bytes_per_s)}" if tier.bytes_per_s else ""
    free = f"{format_gib(tier.capacity_bytes)} GiB free" if tier.capacity_bytes is not None else "size unknown"
    total = tier.total_bytes or 0
    left = headroom.system_bytes(total) if tier.kind == "cpu" and tier.total_bytes else 0
    if left and tier.free_bytes == total - left:  # of a machine that is only described
        free = f"{free} of {format_gib(total)}, {format_gib(left)} left to the system"
    return f"{name}: {free}{speed}"


def taken_for_granted(machine: Machine) -> str:
    """Say what the times assume of a machine that is described: what was not said of its parts, and speeds of which nothing was."""
    lacking = {tier.kind for tier in machine.tiers if not tier.bytes_per_s and (tier.total_bytes or tier.kind == "disk")}
    unknown = _unknown_speeds(lacking)
    ways = [way for kind, way in (("cpu", "--ram '32GiB DDR4-3200 x2'"), ("disk", "--disk nvme")) if kind in lacking]
    more = f"; {' and '.join(ways)} {'narrow these' if len(ways) > 1 else 'narrows that'}" if ways else ""
    said = [*machine.assumed, *unknown]
    return f"Times assume {', '.join(said)}{more}." if said else ""


def assumed(machine: Machine) -> str:
    """Say which bandwidths the times assume until RAM and disk of this machine are measured; planning measures nothing."""
    unmeasured = {tier.kind for tier in machine.tiers if not tier.bytes_per_s}
    if any(tier.is_under_load for tier in machine.tiers if tier.kind == "cpu"):
        return "The speed of the RAM was measured while other programs worked: fitmatrix hardware measures it again."
    if "cpu" not in unmeasured:  # a disk alone may be one that cannot be measured
        return ""
    return f"Times assume {', '.join(_unknown_speeds(unmeasured))}, not measured yet: fitmatrix hardware measures once (1 to 3 s)."


def _unknown_speeds(kinds: Iterable[str]) -> list[str]:
    """Return the speeds that are assumed for RAM and disk where only their size was given."""
    known, lacking = calibration.default(), set(kinds)
    return [
        f"{name} at {format_bandwidth(found.low)} to {format_bandwidth(found.high)}"
        for kind, name, found in (("cpu", "RAM", known["ram_bytes_per_s"]), ("disk", "disk", known["disk_bytes_per_s"]))
        if kind in lacking
    ]


def by_formulas(recommendation: Recommendation) -> str:
    """Say of a model that nobody has traced for these cards that its activations are by formulas, and how to have it traced."""
    footprints = recommendation.planner.footprints
    pairs = [(one.case, footprints[one.case.id]) for one in recommendation.plans if one.case.id in footprints]
    on_gpu = [(case, footprint.on_gpu) for case, footprint in pairs if footprint.gpus]
    lacking = [case for case, found in on_gpu if found.lacks_trace]
    if not lacking or any(found.precision and not found.lacks_trace for _, found in on_gpu):
        return ""
    case = lacking[0].way
    return f"Activations on the GPU are computed by formulas; --explain {case} traces the model, once for each precision."


def word(one: Plan) -> str:
    """Return the verdict as people read it."""
    return one.verdict.value.replace("_", " ")
