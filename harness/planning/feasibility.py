"""Cases x machine -> plans, by the tables alone: what can work here, and the limits to load with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.core.attention import modules_for
from harness.core.methods.packages import how_to_install, lacking
from harness.core.placements import PLACEMENTS, Placement
from harness.core.precisions import PRECISIONS, Precision
from harness.core.records import Case, Machine, Plan, Tier, Verdict
from harness.core.units import exact_size, format_size
from harness.planning.code import Destination, loading_code
from harness.planning.device_map.max_memory import Sizes, Stock, max_memory

if TYPE_CHECKING:
    from harness.checkpoint.reader import Checkpoint


def gate(
    case: Case,
    machine: Machine,
    here: bool = True,
    placement: Placement | None = None,
    precision: Precision | None = None,
) -> tuple[Verdict, str] | None:
    """Return the verdict and reason of a case that cannot run, from the tables alone; None if it may.

    What cannot work anywhere is invalid; what this machine or its packages lack is unavailable. `here` is False for a machine that
    was only described: what is installed on this one says nothing about it. `placement` and `precision` stand for the rows of those
    names.
    """
    precision = precision or PRECISIONS[case.precision]
    placement = placement or row_on(machine, PLACEMENTS[case.placement], precision)
    if precision.unsupported:
        return Verdict.INVALID, precision.unsupported
    # Without a GPU what may use one lies in RAM alone.
    for trait in placement.traits if machine.gpus or placement.needs_gpu else (*placement.traits, "ram"):
        if trait in precision.incompatible:
            return Verdict.INVALID, precision.incompatible[trait]
    if placement.lacks_gpus(len(machine.gpus)):
        return Verdict.UNAVAILABLE, placement.on_fewer or machine.gpu_problem or "no NVIDIA GPU detected"
    if machine.gpu_problem and _takes_apples_gpu(placement, machine):
        return Verdict.UNAVAILABLE, machine.gpu_problem
    if beyond := _beyond(case, machine):
        return Verdict.UNAVAILABLE, beyond
    missing = lacking(precision.needs) if here else ()
    if missing:
        return Verdict.UNAVAILABLE, _needs(missing, precision.extra)
    missing = lacking(modules_for(case.kv, case.attention)) if here else ()
    if missing:
        return Verdict.UNAVAILABLE, _needs(missing)
    return _too_old(precision, placement, machine)


def row_on(machine: Machine, placement: Placement, precision: Precision) -> Placement:
    """Return a row of the table as it loads a precision on a machine: on which GPU, and what leaves the GPUs by which map."""
    on_gpu = placement.on(machine.main_gpu)
    return on_gpu.mapped(len(machine.gpus)) if precision.off_gpu is not None else on_gpu


def dtype_on(machine: Machine, placement: Placement, precision: Precision) -> str:
    """Return the dtype that a precision asks for where a placement computes: on its GPU, or on the processor."""
    if placement.devices[0] == "gpu" and machine.gpus:
        return precision.dtype_on(machine.gpus[placement.gpu].compute_capability)
    return precision.dtype_on_cpu(beside_gpu=bool(machine.gpus))


def has_avx512_bf16(machine: Machine) -> bool | None:
    """Say whether gptqmodel takes its kernel for AVX512_BF16, which is for Linux alone; None if that is not known."""
    return machine.avx512_bf16 if (machine.system or "Linux").startswith("Linux") else False


def _needs(missing: Sequence[str], extra: str | None = None) -> str:
    what = "needs the packages" if len(missing) > 1 else "needs the package"
    return f"{what} {how_to_install(missing, extra)}"


def _takes_apples_gpu(placement: Placement, machine: Machine) -> bool:
    """Say whether accelerate would load on Apple's GPU, which nothing hides: its get_max_memory has "mps" instead of "cpu"."""
    return (machine.system or "").startswith("Darwin") and placement.device_map == "auto" and placement.limits is None


def _beyond(case: Case, machine: Machine) -> str | None:
    """Say why a limit cannot be emulated here: there must be at least as much memory, else the result is of another size."""
    if case.vram_bytes is not None and not machine.gpus:
        return f"--vram {exact_size(case.vram_bytes)} limits a GPU, and {machine.gpu_problem or 'no NVIDIA GPU was detected'}"
    for tier in machine.tiers:
        option, limit = {"gpu": ("--vram", case.vram_bytes), "cpu": ("--ram", case.ram_bytes)}.get(tier.kind, ("", None))
        there = tier.total_bytes if tier.free_bytes is None else tier.free_bytes
        if limit is not None and there is not None and limit > there:
            return f"{option} {exact_size(limit)} is more than {tier.name} has free, {format_size(there)}"
    return None


def _too_old(precision: Precision, placement: Placement, machine: Machine) -> tuple[Verdict, str] | None:
    if placement.devices[0] != "gpu" or not machine.gpus:
        return None
    least = precision.min_compute_capability
    for gpu in _used(placement, machine):
        if gpu.compute_capability is not None and float(gpu.compute_capability) < least:
            have = f"{gpu.model or gpu.name} has {gpu.compute_capability}"
            return Verdict.UNAVAILABLE, f"{precision.name} needs compute capability {least}, and {have}"
    return None


def _used(placement: Placement, machine: Machine) -> Sequence[Tier]:
    """Return the GPUs that a placement may put weights on."""
    if placement.first_gpu_only:
        return machine.gpus[placement.gpu : placement.gpu + 1]
    if isinstance(placement.device_map, Mapping):
        return [gpu for number, gpu in enumerate(machine.gpus) if number in placement.device_map.values()]
    return machine.gpus


def decide(case: Case, machine: Machine, checkpoint: Checkpoint | None) -> Plan:
    """Plan one case from the tables. A case that needs sizes has no code without a checkpoint, nor one whose map is computed."""
    refused = gate(case, machine)
    if refused:
        return Plan(case=case, verdict=refused[0], why=refused[1])
    precision = PRECISIONS[case.precision]
    placement = row_on(machine, PLACEMENTS[case.placement], precision)
    on_gpu, dtype = placement.devices[0] == "gpu" and machine.gpus, dtype_on(machine, placement, precision)
    if placement.prints_map or (placement.limits and checkpoint is None):
        return Plan(case=case, verdict=Verdict.UNKNOWN)
    limits = max_memory(placement, machine, lambda: Sizes(checkpoint or Stock([]), dtype))
    return Plan(
        case=case,
        verdict=Verdict.UNKNOWN,
        code=loading_code(precision, placement, dtype, Destination(max_memory=limits, on_gpu=bool(on_gpu))),
        max_memory=limits,
    )
