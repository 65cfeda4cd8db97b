"""What a case needs of the memory that decides: the one measure by which every surface judges, ranks, filters and draws.

Of the RAM it is what the verdict of a plan counts: anonymous memory, which the kernel cannot drop, and the pages of files that
every token reads. All that was resident beside it, pages that are gone a second later included, is another figure
(`ram_peak_bytes`). Of a card it is what the process held, its CUDA context included.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from harness.core.records import Estimate, Loaded, Phase, Record, Result, Span, TierEstimate
from harness.core.units import format_size
from harness.measure.aggregate import GENERATING

RAM, VRAM = "ram_needed_bytes", "vram_process_peak_bytes"


class MemoryNeed(Record, frozen=True, kw_only=True):
    """Bytes needed in one tier, under the metric `key`; `how` says what they were derived from where that was not measured."""

    tier: str
    key: str
    bytes: float
    how: str = ""


def need_of(result: Result) -> MemoryNeed | None:
    """Return what a case was measured to need of the memory that decides: VRAM if it used some, else RAM; None if nothing was."""
    found = result.metrics
    if found.get(VRAM):
        return MemoryNeed(tier=_fullest_gpu(result), key=VRAM, bytes=found[VRAM])
    if found.get("vram_peak_bytes"):
        context = _context_bytes(result)
        more = f"and {format_size(context)} for the CUDA context" if context else "without the CUDA context, which is not known"
        return MemoryNeed(
            tier=_fullest_gpu(result), key=VRAM, bytes=found["vram_peak_bytes"] + context, how=f"what torch allocated, {more}"
        )
    ram = ram_needed(result)
    return MemoryNeed(tier="cpu", key=RAM, bytes=ram) if ram else None


def _fullest_gpu(result: Result) -> str:
    peaks = [(size, tier) for phase in result.phases for tier, size in phase.vram_peak_bytes.items()]
    return max(peaks)[1] if peaks else next((gpu.name for gpu in result.machine.gpus), "gpu:0")


def _context_bytes(result: Result) -> int:
    """Return what a CUDA context takes: as it was measured on the card, else what the plan allows beside what torch hands out."""
    measured = [gpu.context_bytes for gpu in result.machine.gpus if gpu.context_bytes]
    tiers = result.estimate.tiers if result.estimate else {}
    return max(measured or [tier.overhead_bytes for name, tier in tiers.items() if name not in ("cpu", "disk")], default=0)


def ram_needed(result: Result) -> float | None:
    """Return the RAM that a case needs; of a result that knows no pages of files, all that was resident."""
    stored = result.metrics.get(RAM)
    if stored is not None:
        return stored
    resident, anonymous = result.metrics.get("ram_peak_bytes"), result.metrics.get("ram_anon_peak_bytes")
    if resident is None or anonymous is None:
        return resident
    if result.loaded and result.loaded.mapped_bytes is not None:
        return _by_phases(result.phases, result.loaded)
    ram = result.estimate.tiers.get("cpu") if result.estimate else None
    return min(resident, anonymous + ram.needed_bytes - ram.anon_bytes) if ram and ram.needed_bytes else resident


def _by_phases(phases: Iterable[Phase], loaded: Loaded) -> float | None:
    """Add to the anonymous memory of each phase the pages that it keeps: libraries, and weights once they are read for tokens."""
    sizes = []
    for phase in phases:
        if phase.name in GENERATING and phase.ram_anon_bytes is not None:
            pages = (loaded.library_bytes or 0) + (0 if phase.name == "load" else loaded.mapped_bytes or 0)
            whole = phase.ram_anon_bytes + pages
            sizes.append(whole if phase.ram_peak_bytes is None else min(whole, max(phase.ram_peak_bytes, phase.ram_anon_bytes)))
    return float(max(sizes)) if sizes else None


def completed(result: Result) -> Result:
    """Return a result with the RAM that it needs, and no phase whose anonymous memory is more than all that was resident.

    The worker's own high-water mark misses what the processes that it starts take, which the samples from outside have.
    """
    phases = [_whole(phase) for phase in result.phases]
    metrics, counted = dict(result.metrics), [phase.ram_peak_bytes for phase in phases if phase.name in GENERATING]
    if "ram_peak_bytes" in metrics:
        metrics["ram_peak_bytes"] = max([metrics["ram_peak_bytes"], *(size for size in counted if size is not None)])
    needed = ram_needed(replace(result, phases=phases, metrics=metrics))
    return replace(result, phases=phases, metrics=metrics if needed is None else metrics | {RAM: needed})


def _whole(phase: Phase) -> Phase:
    if phase.ram_peak_bytes is None or phase.ram_anon_bytes is None or phase.ram_anon_bytes <= phase.ram_peak_bytes:
        return phase
    return replace(phase, ram_peak_bytes=phase.ram_anon_bytes)


def predicted_need(tier: TierEstimate) -> Span:
    """Return what a plan expects a tier to have to hold: what its verdict compares with the capacity, with the interval of it.

    Older plans kept no lower end, which then lies as far below as the upper one is above, or only the peak of all that is resident.
    """
    if not tier.needed_bytes:
        most = max(tier.peak_bytes, tier.load_peak_bytes)
        return Span(low=min(tier.low_bytes, most), best=most, high=max(tier.high_bytes, most))
    best, high = tier.needed_bytes, max(tier.needed_high_bytes, tier.needed_bytes)
    return Span(low=tier.needed_low_bytes or max(2 * best - high, 0), best=best, high=high)


def scarcest(estimate: Estimate | None) -> tuple[str, TierEstimate] | None:
    """Return the tier that a plan leaves least of, by its name; None if no capacity is known."""
    tiers = estimate.tiers.items() if estimate else ()
    known = [(predicted_need(tier).best / tier.capacity_bytes, name, tier) for name, tier in tiers if tier.capacity_bytes]
    return max(known, key=lambda entry: entry[0])[1:] if known else None
