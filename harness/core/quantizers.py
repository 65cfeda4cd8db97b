"""SCHEMES: what a quantizer leaves of the weights of a Linear when it quantizes on loading. Pure arithmetic on shapes.

UNPACKINGS: what the layers of `harness.models` take to multiply with weights that are stored packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.core.records import Record

# bitsandbytes: one float32 scale for 64 weights of nf4 or fp4, one for each output of LLM.int8, 16 float32 of code book a module.
# Nested, the scales are bytes, with a float32 for 256 of them, one for the module, and a code book of their own of 256 float32.
NF4_BLOCK = 64
NF4_CODE_BYTES = 64
NESTED_BLOCK = 256
NESTED_CODE_BYTES = 1024
# torchao: a float32 scale and a byte of zero point for each output in int8; in int4 a scale and a zero of 16 bits for each group.
TORCHAO_GROUP = 64
# On a card its inputs are padded, to whole tiles of the kernel (torchao 0.18: int4_tile_packed_to_4d_tensor.py).
TORCHAO_TILE = 1024
# quanto: a scale of the dtype for each output in int8, a scale and a shift for each group in int4, and two float32 a module.
QUANTO_GROUP, QUANTO_LEAST = 128, 32
QUANTO_MODULE_BYTES = 8
FP8_BLOCK = 128

# (outputs, inputs, bytes of the dtype) -> bytes
Size = Callable[[int, int, int], int]


class Scheme(Record, frozen=True, kw_only=True):
    """One row of the table."""

    size: Size  #: counts the bytes of a weight
    counted: float  #: what transformers counts for an element when it infers a device map
    like: str  #: the constants of speed and heap that were measured for it (`data/calibration.toml`)
    library: str  #: the constants of its import
    conv1d: bool = False  #: GPT-2's Conv1D is quantized as well as Linear
    derived: bool = False  #: and what is derived from Linear
    experts: bool = False  #: the stacked experts of a mixture are quantized as well
    traced: bool = False  #: what its kernels allocate on a card is known (`harness.worker.trace`)
    adapted: bool = False  #: adapters that peft puts on top are measured here
    packs_weight: bool = False  #: it packs the weight of a module where it is, for whoever multiplies by it without its module
    as_packed: bool = False  #: its kernels take no 16-bit copy of a weight
    rows: int = 1  #: on a processor the outputs must be a multiple of it
    fused: tuple[int, int] = (1, 1)  #: ... and outputs and inputs, where the processor multiplies the weights as they are
    starts: float = 0.0  #: operations that a GPU starts for a product beyond those of what it is like
    flat: bool = False  #: on a processor it multiplies rows of tokens, and nothing of more dimensions than a batch of them
    # How many 16-bit copies of a weight are on a GPU, beside what stays, while it is quantized there (`worker.trace.load`), and how
    # many more of a Conv1D, which is transposed first.
    in_flight: float = 2.0
    padded: int = 1  #: inputs are filled up to a multiple of it, on a GPU
    turned: float = 0.0


def _int8(outputs: int, inputs: int, _: int) -> int:
    return outputs * inputs + 4 * outputs


def _nf4(outputs: int, inputs: int, _: int) -> int:
    elements = outputs * inputs
    return -(-elements // 2) + 4 * -(-elements // NF4_BLOCK) + NF4_CODE_BYTES


def _nested(outputs: int, inputs: int, _: int) -> int:
    elements = outputs * inputs
    blocks = -(-elements // NF4_BLOCK)
    return -(-elements // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + NESTED_CODE_BYTES + NF4_CODE_BYTES


def _torchao_int8(outputs: int, inputs: int, _: int) -> int:
    return outputs * inputs + 5 * outputs


def _torchao_int4(outputs: int, inputs: int, width: int) -> int:
    whole = inputs if inputs % TORCHAO_GROUP else -(-inputs // TORCHAO_TILE) * TORCHAO_TILE
    return _torchao_int4_on_cpu(outputs, whole, width)


def _torchao_int4_on_cpu(outputs: int, inputs: int, width: int) -> int:
    if inputs % TORCHAO_GROUP:  # left as it is
        return outputs * inputs * width
    return outputs * inputs // 2 + 2 * width * outputs * (inputs // TORCHAO_GROUP)


def _quanto_int8(outputs: int, inputs: int, width: int) -> int:
    return outputs * inputs + width * outputs + QUANTO_MODULE_BYTES


def _quanto_int4(outputs: int, inputs: int, width: int) -> int:
    return outputs * inputs // 2 + 2 * width * outputs * (inputs // quanto_group(inputs)) + QUANTO_MODULE_BYTES


def quanto_group(inputs: int) -> int:
    """Return how many weights share a scale in quanto's int4: 128, or less where that does not divide the inputs, or a row."""
    group = QUANTO_GROUP
    while inputs % group and group > QUANTO_LEAST:
        group -= QUANTO_LEAST
    return group if inputs > QUANTO_GROUP and inputs % group == 0 else inputs


def _fp8(outputs: int, inputs: int, width: int) -> int:
    if outputs % FP8_BLOCK or inputs % FP8_BLOCK:  # left as it is
        return outputs * inputs * width
    return outputs * inputs + 4 * (outputs // FP8_BLOCK) * (inputs // FP8_BLOCK)


# What the 4-bit rows of bitsandbytes share.
_BNB_4BIT: Mapping[str, Any] = {
    "counted": 0.5,
    "like": "int4",
    "library": "bitsandbytes",
    "conv1d": True,
    "traced": True,
    "adapted": True,
    "packs_weight": True,
    "turned": 1,
    "fused": (32, NF4_BLOCK),  # bitsandbytes 0.50: functional.py, _convert_weight_packed_for_cpu
}

# What the rows of torchao share.
_TORCHAO: Mapping[str, Any] = {"library": "torchao", "derived": True}

SCHEMES: Mapping[str, Scheme] = {
    # LLM.int8 of bitsandbytes, and the kernels of fp8 quantize their input as they go (transformers 5.24,
    # integrations/finegrained_fp8.py, fp8_linear).
    "int8": Scheme(
        size=_int8,
        counted=1,
        like="int8",
        library="bitsandbytes",
        conv1d=True,
        traced=True,
        adapted=True,
        packs_weight=True,
        as_packed=True,
        flat=True,
        in_flight=2,
    ),
    "int4": Scheme(size=_nf4, in_flight=1, **_BNB_4BIT),
    "fp4": Scheme(size=_nf4, in_flight=1, **_BNB_4BIT),
    # Scales are unpacked and moved by their mean before each product (bitsandbytes 0.50: functional.py, gemv_4bit).
    "nf4-dq": Scheme(size=_nested, starts=2, in_flight=1 + 4 / NF4_BLOCK, **_BNB_4BIT),
    # torchao 0.18 rounds in float32; to 4 bits it packs integers of 32 bits, beside what is padded.
    "torchao-int8": Scheme(size=_torchao_int8, counted=1, like="torchao_int8", in_flight=4.5, **_TORCHAO),
    "torchao-int8-dynamic": Scheme(size=_torchao_int8, counted=1, like="torchao_dynamic", in_flight=4.5, **_TORCHAO),
    "torchao-int4": Scheme(
        size=_torchao_int4, counted=0.5, like="torchao_int4", rows=16, in_flight=5.72, padded=TORCHAO_TILE, **_TORCHAO
    ),
    "torchao-int4-on-cpu": Scheme(size=_torchao_int4_on_cpu, counted=0.5, like="torchao_int4", rows=16, **_TORCHAO),
    "quanto-int8": Scheme(size=_quanto_int8, counted=1, like="quanto_int8", library="quanto", derived=True, in_flight=3),
    # Read in quanto 0.2.7, TinyGemmPackedTensor.pack, where integers of 32 bits are packed; its class takes no fake tensor.
    "quanto-int4": Scheme(
        size=_quanto_int4, counted=0.5, like="quanto_int4", library="quanto", derived=True, rows=16, in_flight=5.25
    ),
    "fp8": Scheme(
        size=_fp8,
        counted=1,
        like="int8",
        library="bitsandbytes",
        experts=True,
        traced=True,
        packs_weight=True,
        as_packed=True,
        in_flight=7,
    ),
}


class Unpacking(Record, frozen=True, kw_only=True):
    """One row of the table, by the row of PRECISIONS that a checkpoint is: how a layer unpacks its weight for every product.

    `like` names the constants of speed that were measured for it (`data/calibration.toml`). An element of a block takes at most
    `cpu_bytes` or `gpu_bytes` at once in 16 bits, and beside the blocks every weight of the layer `beside`: zeros and scales of its
    groups.
    """

    like: str
    cpu_bytes: float
    gpu_bytes: float
    beside: float = 0.0

    def temporary_bytes(self, elements: int, device: str, tokens: int) -> int:
        """Return the most that a layer of this many weights takes at once beside its input and product."""
        block = min(elements, block_elements(device, tokens))
        return int(block * (self.cpu_bytes if device == "cpu" else self.gpu_bytes) + elements * self.beside)


class ProductTime(Record, frozen=True, kw_only=True):
    """The seconds of one product of `rows` tokens by a layer whose weights are stored packed, as a worker timed it here."""

    precision: str  #: the row of UNPACKINGS
    rows: int
    elements: int  #: weights of the layer
    held_bytes: int  #: that it takes in memory
    seconds: float
    disturbed: bool = False  #: whether others were at work meanwhile


# MOSS was published in groups of 128, whose zeros and scales are there in 32 bits.
_GROUP_BYTES = 8 / 128

UNPACKINGS: Mapping[str, Unpacking] = {
    "gptq-int8": Unpacking(like="moss_int8", cpu_bytes=8, gpu_bytes=6, beside=_GROUP_BYTES),
    "gptq-int4": Unpacking(like="moss_int4", cpu_bytes=8, gpu_bytes=6, beside=_GROUP_BYTES),
    "chatglm-int8": Unpacking(like="chatglm_int8", cpu_bytes=6, gpu_bytes=2),
    "chatglm-int4": Unpacking(like="chatglm_int4", cpu_bytes=6, gpu_bytes=3),
}

# 1 MiB in float32: what is unpacked stays in the cache of a core. Each adds to every sum of a prompt, which takes larger ones.
_CPU_BLOCK, _CPU_BLOCK_AT_MOST = 1 << 18, 1 << 22
# A GPU starts an operation for each step of a block: few large ones.
_GPU_BLOCK = 1 << 25


def block_elements(device: str, tokens: int) -> int:
    """Return how many weights are unpacked at once to multiply this many tokens with, on a "cpu" or anything else."""
    return min(_CPU_BLOCK * max(tokens, 1), _CPU_BLOCK_AT_MOST) if device == "cpu" else _GPU_BLOCK
