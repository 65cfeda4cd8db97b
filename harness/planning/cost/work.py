"""What a case does, counted: bytes that a token reads, operations that it starts, and what loading reads, copies and quantizes."""

from __future__ import annotations

import math
from functools import lru_cache

from harness.architecture.skeleton import Skeleton
from harness.core.methods.cpu_kernels import CPU_METHODS, UNPACKED_IN
from harness.core.quantizers import SCHEMES, UNPACKINGS
from harness.core.records import Machine, Record
from harness.planning.calibration import device_of
from harness.planning.cost import memory
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory, turned_weights
from harness.planning.cost.kernel_launches import Operations
from harness.planning.cost.memory import WeightFormat
from harness.planning.device_map.experts import blocks_of_experts


class TokenWork(Record, frozen=True, kw_only=True):
    """What a case does, counted."""

    device: str  #: as `calibration.device_of` names it
    precision: str
    like: str | None  #: names the constants of what is quantized
    dtype: str
    read: dict[str, float]  #: bytes by tier that one token reads
    mapped: float  #: of those in RAM, pages of files
    operations: Operations
    starts: float = 0.0  #: operations that a GPU starts for a quantized Linear beyond the constant
    stored: str | None = None  #: names the constant of what a GPU starts for a Linear whose weights are stored packed
    attended: float = 0.0  #: bytes of keys and values that a token attends to, once for each head that asks
    scored: float = 0.0  #: operations of attention among the tokens of the prompt
    seen: float = 0.0  #: operations of the vision tower on the images of the prompt
    parameters: int  #: that a token is multiplied with
    tensors: int  #: to open while loading
    checkpoint_bytes: int  #: to read from the disk
    unpacked: int  #: weights made from the blocks of a GGUF while loading
    vocabulary: int  #: strings in the metadata of a GGUF, read one by one
    copied_bytes: int  #: made in RAM while loading
    written: int  #: bytes written into the offload folder while loading
    quantized: int  #: weights quantized while loading
    to_gpu_bytes: int
    anew: int  #: weights that are unpacked for each token
    width: int = 0  #: elements that an operation beside the products has of each token
    brought: float = 0.0  #: tensors that a token brings from the disk, each by opening its file
    cast: float = 0.0  #: bytes made of them in RAM, where files hold another dtype
    turned: int = 0  #: weights in Conv1D that are multiplied as they are, inputs by outputs
    handed_over: int = 0  #: times that a token goes from the GPU to experts in RAM or back
    experts_in_ram: float = 0.0  #: the share of the blocks with experts whose experts are there


# Measured of bitsandbytes' 4-bit weights; it stands for gptqmodel's of any width, which it unpacks by integers of torch as well.
_UNPACKED = "int4_unpacked"


def count_work(footprint: Footprint, precision: str, machine: Machine) -> TokenWork:
    """Count what a case does: bytes to read, weights to multiply, tensors to open."""
    inventory, in_ram, gguf, work = footprint.inventory, footprint.sums.get("cpu"), footprint.spec.gguf, footprint.workload
    moved = _moved_of_cache(footprint)
    unpacks = not footprint.gpus and inventory.quantizable > 0 and _unpacks_for_products(footprint, machine)
    like = constants_like(footprint.fmt) if _is_quantized(inventory) else None
    return TokenWork(
        device=device_of(footprint.weights),
        precision=precision,
        like=_UNPACKED if unpacks else like,
        dtype=footprint.fmt.dtype,
        read={
            # Tiers in the order of the dicts: in that of a set the last digit of a sum would differ from run to run.
            tier: footprint.read.get(tier, 0.0) + moved.get(tier, 0)
            for tier in {**footprint.read, **(moved if footprint.processes == 1 else {})}
        },
        mapped=in_ram.viewed_used if in_ram else 0.0,
        operations=inventory.operations,
        starts=SCHEMES[footprint.fmt.quantizer].starts if footprint.fmt.quantizer else 0.0,
        stored=_stored(footprint.fmt),
        attended=footprint.fmt.element_bytes * work.batch * _asked(footprint.skeleton, work.cached_tokens),
        scored=2.0 * work.batch * work.prompt_tokens * _asked(footprint.skeleton, work.prompt_tokens / 2),  # each sees half
        seen=work.images * work.batch * footprint.spec.image.flops if footprint.spec.image else 0.0,
        parameters=inventory.parameters,
        tensors=inventory.tensors,
        checkpoint_bytes=footprint.spec.checkpoint_bytes,
        unpacked=sum(gguf.elements) if gguf and not footprint.fmt.packed_bits else 0,
        vocabulary=gguf.strings if gguf else 0,
        copied_bytes=int(in_ram.made) if in_ram else 0,
        written=footprint.written,
        quantized=int(sum(sums.quantized for sums in footprint.sums.values()) / 2),
        anew=inventory.quantizable if unpacks or footprint.fmt.unpacking else 0,
        width=footprint.skeleton.hidden_size,
        brought=footprint.sums["disk"].tensors if "disk" in footprint.weights else 0.0,
        cast=footprint.cast_each_token,
        turned=0 if footprint.gpus or footprint.fmt.quantizer else turned_weights(inventory),
        handed_over=2 * len(footprint.loading.experts_in_ram),
        experts_in_ram=_share_of_experts(footprint),
        to_gpu_bytes=sum(footprint.weights[gpu] for gpu in footprint.gpus),
    )


def _moved_of_cache(footprint: Footprint) -> dict[str, float]:
    """Return the bytes of the KV cache that a token moves, by tier: what is kept in RAM goes over the link, to and fro."""
    form = footprint.kv_form
    if form.in_ram and footprint.gpus:
        return {"cpu": 2.0 * footprint.kv["cpu"]}
    return {tier: size * form.moved_per_byte for tier, size in footprint.kv.items()}


@lru_cache(maxsize=32)  # every case of a model asks for the same
def _asked(skeleton: Skeleton, seen: float) -> float:
    """Return the elements of keys and values that a token attends to among `seen` tokens, counted once for each query head."""
    widths = [
        (skeleton.heads * (kind.key_dim + kind.value_dim) if kind.expanded is None else kind.expanded) if kind.heads else 0
        for kind in skeleton.attention
    ]
    tokens = [min(seen, kind.window or seen) for kind in skeleton.attention]
    layers = map(skeleton.layers.count, range(len(skeleton.attention)))
    return float(sum(map(math.prod, zip(layers, widths, tokens, strict=True))))


def _stored(fmt: WeightFormat) -> str | None:
    """Name the kernels that multiply by weights which are stored packed; None if none are, or layers of ours do."""
    if fmt.packed_bits is None or fmt.unpacking:
        return None
    return "fp8" if fmt.in_blocks else "stored_int8" if fmt.packed_bits > 6 else "stored_int4"


def _share_of_experts(footprint: Footprint) -> float:
    in_ram = len(footprint.loading.experts_in_ram)
    return in_ram / len(blocks_of_experts(footprint.skeleton)) if in_ram else 0.0


def _is_quantized(inventory: Inventory) -> bool:
    """Say whether the format leaves any weight in fewer bits: a scheme may take none, as the classes of the modules are."""
    scheme = inventory.fmt.quantizer
    if scheme is None:
        return inventory.fmt.unpacking is None or inventory.quantizable > 0
    return memory.narrows_any(inventory.skeleton, scheme)


def _unpacks_for_products(footprint: Footprint, machine: Machine) -> bool:
    """Say whether the 4-bit products of a library unpack their weights each time, on a processor."""
    fmt, packed = footprint.fmt, footprint.spec.packed
    if packed is not None and packed.name in CPU_METHODS and packed.stored_by is not None:
        return bool(fmt.packed_bits) and fmt.dtype in UNPACKED_IN
    return multiplies_4bit_in_ram(fmt) and machine.fuses_4bit is False


def multiplies_4bit_in_ram(fmt: WeightFormat) -> bool:
    """Say whether bitsandbytes' 4-bit product runs in the RAM, where no GPU takes part."""
    return fmt.quantizer is not None and SCHEMES[fmt.quantizer].like == "int4"


def constants_like(fmt: WeightFormat) -> str | None:
    """Name the constants of speed that were measured for a weight format; None if nothing is quantized."""
    if fmt.unpacking:
        return UNPACKINGS[fmt.unpacking].like
    if fmt.packed_bits:
        return "int8" if fmt.packed_bits > 6 else "int4"
    return SCHEMES[fmt.quantizer].like if fmt.quantizer else None
