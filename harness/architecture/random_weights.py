"""What the tensors of a synthetic checkpoint hold: numbers of sane scale, in pieces of bounded size.

Weights are generated once, some megabytes, and repeated from place to place: their values do not matter to memory or speed, as long
as nothing overflows and next to no activation is above 6, from where LLM.int8() multiplies in 16 bits what trained models have in
at most 7 of their columns (Dettmers and others, 2022, section 4). Those of a packed layout have the spread of plain ones once they
are unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256

from harness.checkpoint.formats.tensor_writer import TensorToWrite
from harness.checkpoint.quantization import Packed
from harness.core.dtypes import DTYPE_BYTES
from harness.core.methods.layouts import Holds

_PIECE_BYTES = 16 << 20
_STEP_BYTES = 4096  # where a tensor begins in the pool is a multiple of this
_STD = 0.02  # the usual initializer_range: activations neither vanish nor overflow float16
# What norms are scaled by: where they stand behind the layers (OLMo 2), 256 of them add up to numbers of deviation 1.
NORM_SCALE = 1 / 16
_SEED = 20230314
FILLING = f"{_STD} {NORM_SCALE} {_SEED}"  # what tells this filling from another


def contents(tensor: TensorToWrite, packed: Packed | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor: one number for scales of norms, zeros for biases, masks that let all pass, else random weights.

    They follow from its name, or from that of the tensor that it repeats: transformers 5 ties only what is equal in the files. Of a
    checkpoint that is `packed`, parts of packed weights hold what their layout says.
    """
    holds = packed.layout.holds(tensor.name, tensor.dtype) if packed and packed.layout else None
    if packed is None or holds is None:
        pool = _pool(tensor.dtype, _filling(tensor))
    elif holds == "order":
        yield _order(tensor, packed.group)
        return
    else:
        pool = _packed_pool(holds, packed.bits)
    left = tensor.bytes
    begin = int.from_bytes(sha256((tensor.repeats or tensor.name).encode()).digest()[:4], "big") * _STEP_BYTES % len(pool)
    while left:
        piece = pool[begin : begin + left]
        yield piece
        left, begin = left - len(piece), 0


def _filling(tensor: TensorToWrite) -> str:
    if tensor.dtype == "bool":
        return "mask"
    if len(tensor.shape) > 1:
        return "weights"
    return "zeros" if tensor.name.endswith("bias") else "scales"


@lru_cache(maxsize=8)
def _pool(dtype: str, filling: str) -> memoryview:
    """Make the bytes that tensors are filled from: normal numbers of mean 0 and deviation _STD, or one number all over."""
    import numpy as np

    width = DTYPE_BYTES[dtype]
    count = _PIECE_BYTES // width
    if filling == "mask":
        return memoryview(np.ones(count, dtype=np.bool_).tobytes())
    if filling == "weights":
        values = np.random.default_rng(_SEED).standard_normal(count, dtype=np.float32) * np.float32(_STD)
    else:
        values = np.full(count, NORM_SCALE if filling == "scales" else 0, dtype=np.float32)
    if dtype == "bfloat16":
        return memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return memoryview(values.astype(np.dtype(dtype)).tobytes())


@lru_cache(maxsize=4)
def _packed_pool(holds: Holds, bits: int) -> memoryview:
    """Make the bytes that parts of packed weights are filled from.

    Integers are uniform over all but the lowest that `bits` (4 or 8) can say, so that their mean is 0: from -7 to 7, or from
    -127 to 127. The deviation of n consecutive numbers is sqrt((n^2 - 1) / 12); their scale makes _STD of it.
    """
    import numpy as np

    middle, each = 1 << (bits - 1), 8 // bits
    if holds == "scales":
        deviation = math.sqrt(((2 * middle - 1) ** 2 - 1) / 12)
        return memoryview(np.full(_PIECE_BYTES // 2, _STD / deviation, dtype=np.float16).tobytes())
    if holds in ("fields", "signed"):
        fields = np.random.default_rng(_SEED).integers(1, 2 * middle, size=(each, _PIECE_BYTES), dtype=np.uint8)
    else:
        fields = np.full((each, _PIECE_BYTES), middle - (holds == "middle-1"), dtype=np.uint8)
    if holds == "signed":
        fields ^= np.uint8(middle)  # two's complement of the distance to the middle
    joined = fields[0]
    for index in range(1, each):
        joined |= fields[index] << np.uint8(index * bits)
    return memoryview(joined.tobytes())


def _order(tensor: TensorToWrite, group: int) -> memoryview:
    """Return the group of each input, one after the other."""
    import numpy as np

    inputs = np.arange(math.prod(tensor.shape), dtype=np.int32)
    return memoryview((inputs // group if group else inputs * 0).tobytes())
