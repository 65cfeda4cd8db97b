"""What a case costs: bytes by tier and seconds, as an Estimate with intervals.

What a term means:

- weights: bytes as held, tensor by tensor, where the device map puts them (`memory_cost.weight_bytes`)
- KV cache: at the end of the workload, where the layers run
- activations: the most that a forward pass holds beside the two
- overhead: the process itself: CUDA context and what the allocator keeps; in the RAM the imports, the tokenizer, the heap
- load peak: the most while loading; in the RAM the pages of the file count where copies are made from them
"""

from __future__ import annotations

from harness.architecture import skeleton
from harness.architecture.model_spec import ModelSpec
from harness.core.families import GGUF
from harness.core.precisions import Precision
from harness.core.quantizers import SCHEMES, UNPACKINGS
from harness.core.records import Estimate, Machine, Tier, TierEstimate
from harness.planning.calibration import Calibration, device_of
from harness.planning.cost.footprint import Footprint, TierTerms
from harness.planning.cost.memory import WeightFormat
from harness.planning.cost.speed import TokenWork, seconds

# By how much the weights of a model may differ that was planned from tensors alone, and of one whose skeleton is known.
ROUGH_SHARE, KNOWN_SHARE = 0.10, 0.005
# How often a token passes over the cache: transformers appends by copying it (read, write), then attention reads it.
_CACHE_PASSES = 3


def kept(precision: Precision, dtype: str, spec: ModelSpec) -> WeightFormat:
    """Say how this precision holds this model: one that is quantized already stays so, but for a GGUF file that is unpacked."""
    if spec.gguf is not None:
        bits = spec.gguf.packed_bits if precision.requires_checkpoint == GGUF.title else None
        return WeightFormat(dtype=dtype, packed_bits=bits, packed_experts=bits is not None, packed_embeddings=bits is not None)
    if spec.packed is not None and not spec.packed.unpacks:
        bits, experts = packed_bits(spec)
        own = spec.packed.precision if spec.unpacks_itself else None
        return WeightFormat(dtype=dtype, packed_bits=bits, packed_experts=experts, unpacking=own)
    return WeightFormat(dtype=dtype, quantizer=precision.scheme)


def packed_bits(spec: ModelSpec) -> tuple[float, bool]:
    """Return bits per quantized weight, scales and zeros included, and whether stacked experts are quantized as well.

    From the headers where they were read: the experts are if the files are too small to hold them in 16 bits. Else from the scheme.
    """
    packed = spec.packed
    assert packed is not None
    held = [(w, w.elements * count) for w, count in spec.skeleton.tally if not w.tied_to and w.tensor.kind != "unsaved"]
    quantized = sum(elements for weight, elements in held if weight.quantizes)
    experts = sum(elements for weight, elements in held if skeleton.is_stacked(weight))
    plain = 2 * (sum(elements for _, elements in held) - quantized)
    if spec.tensor_bytes is None or not quantized + experts:
        return packed.bits + ((16 + packed.bits) / packed.group if packed.group else 0.0), bool(experts)
    if experts and spec.tensor_bytes < plain:
        plain, quantized = plain - 2 * experts, quantized + experts
    else:
        experts = 0
    return max(8.0 * (spec.tensor_bytes - plain) / max(quantized, 1), 1.0), bool(experts)


def estimate(count: Footprint, precision: str, machine: Machine) -> Estimate:
    """Return what a case is expected to need, tier by tier, and how fast it runs."""
    tiers = memory(count, machine)
    spent = seconds(effort(count, precision), count.work, machine, count.calibration)
    return Estimate(
        tiers=tiers,
        load_s=spent.load_s,
        first_token_s=spent.first_token_s,
        decode_tok_s=spent.decode_tok_s,
        corrections=spent.corrections,
        fixed_token_s=spent.fixed_token_s,
        constants=count.calibration.digest,
    )


def memory(count: Footprint, machine: Machine) -> dict[str, TierEstimate]:
    """Return the bytes that a case is expected to need, by tier."""
    return {name: _tier(parts, machine.tier(name), count) for name, parts in count.parts().items()}


def beside_weights(parts: TierTerms) -> float:
    """Return the most that generating needs of a tier beside its weights and the KV cache."""
    return parts.overhead.high + parts.heap.high + parts.libraries.high + parts.activation.high


def effort(count: Footprint, precision: str) -> TokenWork:
    """Count what a case does: bytes to read, weights to multiply, tensors to open."""
    inventory, here, gguf = count.inventory, count.sums.get("cpu"), count.spec.gguf
    return TokenWork(
        device=device_of(count.weights),
        precision=precision,
        like=like(count.held),
        dtype=count.held.dtype,
        read={
            # Tiers in the order of the dicts: in that of a set the last digit of a sum would differ from run to run.
            tier: count.read.get(tier, 0.0) + _CACHE_PASSES * count.kv.get(tier, 0)
            for tier in {**count.read, **(count.kv if count.shared == 1 else {})}
        },
        mapped=here.viewed_used if here else 0.0,
        operations=inventory.operations,
        parameters=inventory.parameters,
        tensors=inventory.tensors,
        checkpoint_bytes=count.spec.checkpoint_bytes,
        unpacked=sum(gguf.elements) if gguf and not count.held.packed_bits else 0,
        vocabulary=gguf.strings if gguf else 0,
        copied_bytes=int(here.made) if here else 0,
        written=count.written,
        quantized=int(sum(sums.quantized for sums in count.sums.values()) / 2),
        anew=inventory.unpacked_anew,
        to_gpu_bytes=sum(count.weights[gpu] for gpu in count.gpus),
    )


def like(held: WeightFormat) -> str | None:
    """Name the constants of speed that were measured for what is held; None where nothing is quantized."""
    if held.unpacking:
        return UNPACKINGS[held.unpacking].like
    if held.packed_bits:
        return "int8" if held.packed_bits > 6 else "int4"
    return SCHEMES[held.quantizer].like if held.quantizer else None


def _tier(parts: TierTerms, tier: Tier | None, count: Footprint) -> TierEstimate:
    rough = ROUGH_SHARE if count.spec.rough else KNOWN_SHARE
    capacity = tier.capacity_bytes if tier else None
    if tier is not None and tier.kind == "cpu":
        return _ram(parts, tier, rough, count.calibration)
    run = parts.weights + parts.kv + parts.activation.best
    best = max(run, parts.weights + parts.loading.best) + parts.overhead.best
    low = parts.weights * (1 - rough) + parts.kv + parts.activation.low + parts.overhead.low
    high = max(parts.kv + parts.activation.high, parts.loading.high) + parts.weights * (1 + rough) + parts.overhead.high
    needed = (parts.written, parts.written) if tier is not None and tier.kind == "disk" else (best, max(high, best))
    return TierEstimate(
        weights_bytes=parts.weights,
        kv_bytes=parts.kv,
        activation_bytes=int(parts.activation.best),
        overhead_bytes=int(parts.overhead.best),
        allocated_bytes=int(run),
        peak_bytes=int(best),
        load_peak_bytes=int(parts.weights + parts.loading.best + parts.overhead.best),
        low_bytes=int(min(low, best)),
        high_bytes=int(max(high, best)),
        capacity_bytes=capacity,
        needed_bytes=int(needed[0]),
        needed_high_bytes=int(needed[1]),
    )


def _ram(parts: TierTerms, tier: Tier, rough: float, calibration: Calibration) -> TierEstimate:
    """Put the terms of the RAM together: the anonymous part, and with it pages of files, once loading and once generating."""
    capacity = tier.capacity_bytes
    kept, writing = calibration["ram_resident_share"], calibration["ram_resident_share_writing"]
    low, best, high = (_moments(parts, end, rough) for end in ("low", "best", "high"))
    # What is written to the disk comes last, and fills the RAM as well.
    most = kept.high if tier.limit_bytes is None else 1.0  # more becomes free as others' pages of files go, but not of a limit
    load_peak = _resident(best["load"] - parts.rewritten, best["load_anon"], capacity, kept.best)
    if parts.rewritten:
        load_peak = max(load_peak, _resident(best["load"], best["load_anon"], capacity, writing.best))
    return TierEstimate(
        weights_bytes=parts.weights,
        kv_bytes=parts.kv,
        activation_bytes=int(parts.activation.best + parts.brought),
        overhead_bytes=int(parts.overhead.best + parts.heap.best + parts.libraries.best),
        allocated_bytes=int(parts.weights + parts.kv + parts.activation.best + parts.brought),
        peak_bytes=max(load_peak, _resident(best["run"], best["needed"], capacity, kept.best)),
        load_peak_bytes=load_peak,
        low_bytes=_resident(max(low["load_anon"], low["run"]), low["needed"], capacity, kept.low),
        high_bytes=_resident(max(high["load"], high["run"]), high["needed"], capacity, most),
        capacity_bytes=capacity,
        anon_bytes=int(max(best["load_anon"], best["run_anon"])),
        load_anon_bytes=int(best["load_anon"]),
        needed_bytes=int(best["needed"]),
        needed_high_bytes=int(high["needed"]),
    )


def _resident(size: float, needed: float, capacity: int | None, kept: float) -> int:
    """Return what stays resident: where memory is short the kernel drops pages of files, down to what is needed."""
    return int(size if capacity is None else min(size, max(needed, capacity * kept)))


def _moments(parts: TierTerms, end: str, rough: float) -> dict[str, float]:
    """Return the RAM at one end of the intervals: while loading and generating, all of it and the anonymous part."""
    overhead, heap, libraries, activation = (
        float(getattr(part, end)) for part in (parts.overhead, parts.heap, parts.libraries, parts.activation)
    )
    doubt = {"low": 1 - rough, "best": 1.0, "high": 1 + rough}[end]
    # The first pages that every token reads may go again before the last come from the disk.
    brought = 0 if end == "low" else parts.brought
    held = overhead + parts.copied * doubt + heap
    load_anon, run_anon = held + parts.loading.best * doubt, held + parts.kv + activation
    return {
        "load_anon": load_anon,
        "run_anon": run_anon,
        "load": load_anon + libraries * 0.95 + parts.loading_mapped * doubt,
        "run": run_anon + libraries + float(getattr(parts.mapped, end)) * doubt + brought,
        # The file may be dropped while copies are made of it, but not the pages that every token reads.
        "needed": max(load_anon, run_anon + parts.read * doubt + brought) + libraries,
    }
