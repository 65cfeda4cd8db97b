"""What a case costs: bytes by tier and seconds, as an Estimate with intervals.

What a term means:

- weights: bytes in memory, tensor by tensor, where the device map puts them (`memory.module_bytes`)
- KV cache: at the end of the workload, where the layers run
- activations: the most that a forward pass takes beside the two
- overhead: the process itself: CUDA context and what the allocator keeps; in the RAM the imports, the tokenizer, the heap
- load peak: the most while loading; in the RAM the pages of the file count where copies are made from them
"""

from __future__ import annotations

from harness.architecture import skeleton
from harness.architecture.model_spec import ModelSpec
from harness.core.dtypes import DTYPE_BYTES
from harness.core.methods.method import Method
from harness.core.precisions import Precision
from harness.core.quantizers import SCHEMES
from harness.core.records import Estimate, Machine, Tier, TierEstimate
from harness.planning.calibration import Calibration
from harness.planning.cost.footprint import Footprint, TierTerms
from harness.planning.cost.memory import WeightFormat
from harness.planning.cost.speed import Timing, seconds, timings_of
from harness.planning.cost.work import count_work

# By how much the weights of a model may differ that was planned from tensors alone, and of one whose skeleton is known.
ROUGH_SHARE, KNOWN_SHARE = 0.10, 0.005


def weight_format(precision: Precision, dtype: str, spec: ModelSpec, *, on_cards: bool = True) -> WeightFormat:
    """Return the format of a model's weights in a precision: a quantized checkpoint stays so, except a GGUF that is unpacked."""
    if not spec.keeps_packed(precision):
        beside = spec.packed.beside_bytes(dtype) if spec.packed is not None and spec.packed.keeps_beside else 0
        taken = sum(weight.elements * count for weight, count in spec.skeleton.tally if weight.quantizes) if beside else 0
        scheme = precision.scheme if on_cards else precision.scheme_on_cpu or precision.scheme
        quantizer = scheme if spec.stored_as is None else None
        unpacked = spec.packed if spec.packed is not None and spec.packed.filled_in == dtype else None
        filled = unpacked.filled if unpacked is not None else None
        return WeightFormat(dtype=dtype, quantizer=quantizer, beside_bits=8 * beside / max(taken, 1), filled=filled)
    if spec.gguf is not None:
        return WeightFormat(dtype=dtype, packed_bits=spec.gguf.packed_bits, packed_experts=True, packed_embeddings=True)
    assert spec.packed is not None
    method = spec.packed.method
    assert method is not None
    bits, experts = packed_bits(spec, dtype)
    return WeightFormat(
        dtype=dtype,
        packed_bits=bits,
        packed_linears=method.packs_linears,
        packed_tables=spec.packed_tables,
        counted_as=_counted_as(method, precision),
        counted_names=spec.packed.counted,
        counted_bits=None if method.counts_scales else spec.packed.bits,
        wide_bias=method.wide_bias,
        in_blocks=method.blocks,
        margin=method.margin,
        packed_experts=experts,
        unpacking=spec.packed.precision if spec.packed.own else None,
    )


def _counted_as(method: Method, precision: Precision) -> str | None:
    """Return the row of SCHEMES by which transformers counts stored weights for a device map, None if by what they take.

    A format that no precision makes is counted as what the method's package makes otherwise.
    """
    if method.counted is None or precision.scheme is not None:
        return precision.scheme if method.counted is not None else None
    return next((name for name, row in SCHEMES.items() if (row.library, row.counted) == (method.name, method.counted)), None)


def packed_bits(spec: ModelSpec, dtype: str) -> tuple[float, bool]:
    """Return bits per quantized weight, scales and zeros included, and whether stacked experts are quantized as well.

    From the headers if they were read: the experts are if the files are too small for them in 16 bits. Else part by part, as its
    layout has them, or from the scheme.
    """
    packed = spec.packed
    assert packed is not None
    saved = [(w, w.elements * count) for w, count in spec.skeleton.tally if not w.tied_to and w.tensor.kind != "unsaved"]
    linears = packed.method is None or packed.method.packs_linears
    tables = spec.packed_tables
    quantized = sum(elements for weight, elements in saved if (linears and weight.quantizes) or weight.path in tables)
    experts = sum(elements for weight, elements in saved if skeleton.is_stacked(weight))
    width = DTYPE_BYTES[packed.rest or dtype]
    plain = width * (sum(elements for _, elements in saved) - quantized)
    if spec.tensor_bytes is None and linears and quantized and packed.layout is not None and packed.layout.parts:
        held = sum(skeleton.packed_weight_bytes(one, packed) * count for one, count in spec.skeleton.tally if one.quantizes)
        return 8.0 * held / quantized, bool(experts)
    if spec.tensor_bytes is None or not quantized + experts:
        group = 32 if not linears else packed.group
        return packed.bits + ((8 if not linears else 16 + packed.bits) / group if group else 0.0), bool(experts)
    if experts and spec.tensor_bytes < plain:
        plain, quantized = plain - width * experts, quantized + experts
    else:
        experts = 0
    held = spec.tensor_bytes + packed.float_growth(dtype) - plain
    return max(8.0 * held / max(quantized, 1), 1.0), bool(experts)


def timings(footprint: Footprint, precision: str, machine: Machine) -> list[Timing]:
    """Return how long a case takes, at each end of the intervals."""
    return timings_of(count_work(footprint, precision, machine), footprint.workload, machine, footprint.calibration)


def estimate(footprint: Footprint, precision: str, machine: Machine) -> Estimate:
    """Return what a case is expected to need, tier by tier, and how fast it runs."""
    return estimate_timed(footprint, timings(footprint, precision, machine), machine)


def estimate_timed(footprint: Footprint, timed: list[Timing], machine: Machine) -> Estimate:
    """Return the same of a case whose `timings` are known."""
    spent = seconds(timed)
    return Estimate(
        tiers=memory(footprint, machine),
        load_s=spent.load_s,
        first_token_s=spent.first_token_s,
        decode_tok_s=spent.decode_tok_s,
        ready_s=spent.ready_s,
        bound_by=spent.bound_by,
        corrections={name: found.factor for name, found in footprint.calibration.fitted.items()},
        constants=footprint.calibration.digest,
    )


def memory(footprint: Footprint, machine: Machine) -> dict[str, TierEstimate]:
    """Return the bytes that a case is expected to need, by tier."""
    return {name: memory_of(name, footprint, machine) for name in footprint.taking_part}


def memory_of(name: str, footprint: Footprint, machine: Machine) -> TierEstimate:
    """Return the bytes that a case is expected to need of one tier that takes part."""
    return _tier(footprint.terms_of(name), machine.tier(name), footprint)


def beside_weights(terms: TierTerms) -> float:
    """Return the most that generating needs of a tier beside its weights and the KV cache."""
    return terms.overhead.high + terms.fragments.high + terms.heap.high + terms.libraries.high + terms.activation.high


def _tier(terms: TierTerms, tier: Tier | None, footprint: Footprint) -> TierEstimate:
    rough = ROUGH_SHARE if footprint.spec.rough else KNOWN_SHARE
    capacity = tier.capacity_bytes if tier else None
    if tier is not None and tier.kind == "cpu":
        return _ram(terms, tier, rough, footprint.calibration)
    run, load = terms.weights + terms.kv + terms.activation.best, terms.weights + terms.loading.best
    needed = max(run + terms.fragments.best, load) + terms.overhead.best
    runs_high = terms.kv + terms.activation.high
    most = max(runs_high + terms.fragments.high, terms.loading.high) + terms.weights * (1 + rough) + terms.overhead.high
    best = _with_cached(max(run + terms.cached.best, load) + terms.overhead.best, needed, capacity)
    low = terms.weights * (1 - rough) + terms.kv + terms.activation.low + terms.fragments.low + terms.overhead.low
    high = max(runs_high + terms.cached.high, terms.loading.high) + terms.weights * (1 + rough) + terms.overhead.high
    needs = (terms.written, terms.written) if tier is not None and tier.kind == "disk" else (needed, max(most, needed))
    return TierEstimate(
        weights_bytes=terms.weights,
        kv_bytes=terms.kv,
        activation_bytes=int(terms.activation.best),
        overhead_bytes=int(terms.overhead.best + terms.fragments.best),
        allocated_bytes=int(run),
        peak_bytes=int(best),
        load_peak_bytes=int(load + terms.overhead.best),
        low_bytes=int(min(low, best)),
        high_bytes=int(max(high, best)),
        capacity_bytes=capacity,
        needed_bytes=int(needs[0]),
        needed_high_bytes=int(needs[1]),
        needed_low_bytes=int(min(needs[0], low)),
    )


def _with_cached(wanted: float, needed: float, capacity: int | None) -> float:
    """Return what is reserved on a GPU: torch's allocator gives back what it caches before a card is too small."""
    return wanted if capacity is None else min(wanted, max(needed, capacity))


def _ram(terms: TierTerms, tier: Tier, rough: float, calibration: Calibration) -> TierEstimate:
    """Put the terms of the RAM together: the anonymous part, and with it pages of files, once loading and once generating."""
    capacity = tier.capacity_bytes
    resident, writing = calibration["ram_resident_share"], calibration["ram_resident_share_writing"]
    low, best, high = (_moments(terms, end, rough) for end in ("low", "best", "high"))
    # What is written to the disk comes last, and fills the RAM as well.
    most = resident.high if tier.limit_bytes is None else 1.0  # more becomes free as others' pages of files go, but not of a limit
    load_peak = _resident(best["load"] - terms.rewritten, best["load_anon"], capacity, resident.best)
    if terms.rewritten:
        load_peak = max(load_peak, _resident(best["load"], best["load_anon"], capacity, writing.best))
    return TierEstimate(
        weights_bytes=terms.weights,
        kv_bytes=terms.kv,
        activation_bytes=int(terms.activation.best + terms.brought),
        overhead_bytes=int(terms.overhead.best + terms.heap.best + terms.libraries.best),
        allocated_bytes=int(terms.weights + terms.kv + terms.activation.best + terms.brought),
        peak_bytes=max(load_peak, _resident(best["run"], best["needed"], capacity, resident.best)),
        load_peak_bytes=load_peak,
        low_bytes=_resident(max(low["load_anon"], low["run"]), low["needed"], capacity, resident.low),
        high_bytes=_resident(max(high["load"], high["run"]), high["needed"], capacity, most),
        capacity_bytes=capacity,
        anon_bytes=int(max(best["load_anon"], best["run_anon"])),
        load_anon_bytes=int(best["load_anon"]),
        needed_bytes=int(best["needed"]),
        needed_high_bytes=int(high["needed"]),
        needed_low_bytes=int(low["needed"]),
    )


def _resident(size: float, needed: float, capacity: int | None, share: float) -> int:
    """Return what stays resident: where memory is short the kernel drops pages of files, down to what is needed."""
    return int(size if capacity is None else min(size, max(needed, capacity * share)))


def _moments(terms: TierTerms, end: str, rough: float) -> dict[str, float]:
    """Return the RAM at one end of the intervals: while loading and generating, all of it and the anonymous part."""
    overhead, heap, libraries, activation = (
        float(getattr(part, end)) for part in (terms.overhead, terms.heap, terms.libraries, terms.activation)
    )
    doubt = {"low": 1 - rough, "best": 1.0, "high": 1 + rough}[end]
    # The first pages that every token reads may go again before the last come from the disk.
    brought = 0 if end == "low" else terms.brought
    always = overhead + terms.copied * doubt + heap
    load_anon, run_anon = always + terms.loading.best * doubt, always + terms.kv + activation
    return {
        "load_anon": load_anon,
        "run_anon": run_anon,
        "load": load_anon + libraries * 0.95 + terms.loading_mapped * doubt,
        "run": run_anon + libraries + float(getattr(terms.mapped, end)) * doubt + brought,
        # The file may be dropped while copies are made of it, but not the pages that every token reads.
        "needed": max(load_anon, run_anon + terms.read * doubt + brought) + libraries,
    }
