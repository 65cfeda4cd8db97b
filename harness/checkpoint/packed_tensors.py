"""Which tensors of the files hold packed weights, which lie beside them, and what they hold, by the rows of LAYOUTS."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from harness.core.dtypes import DTYPE_BITS
from harness.core.methods.layouts import LAYOUTS, Layout

if TYPE_CHECKING:
    from harness.checkpoint.formats.safetensors_header import StoredTensor

# Stored beside the weights without being weights: scales, zeros, orders and formats of quantized layers, and buffers.
_BESIDE = (
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format|qzeros|scales|qbiases|g_idx|weight_scale|weight_global_scale|input_global_scale|weight_scale_2"
    r"|weight_scale_inv|activation_scale|weight_shape|weight_zero_point|weight_g_idx|input_scale|input_zero_point|output_scale|output_zero_point"
    r"|bias_scale|bias_zero_point|pre_quant_scale|weight\._scale|weight\._shift|codebooks|k_scale|v_scale|inv_freq|causal_mask|masked_bias"
    r"|position_ids)$|\.quant_state\.|_scales$|\.meta\.(scale|zero)"
)
PACKED_SUFFIXES = (".qweight", ".weight_packed")
_WEIGHTS = (*PACKED_SUFFIXES, ".weight")
FLOATS = ("float16", "bfloat16", "float32")


def is_beside(name: str) -> bool:
    """Say whether a tensor of this name lies beside weights; the pattern is compiled for the first one, and plans ask for none."""
    return re.search(_BESIDE, name) is not None


def count_beside(tensors: Iterable[StoredTensor], narrow: str | None) -> tuple[tuple[str, int], ...]:
    """Return how many elements the files hold beside weights, by dtype; a `narrow` one is that which scales of 8 bits get."""
    counted: Counter[str] = Counter()
    for tensor in tensors:
        if is_beside(tensor.name):
            is_narrow = tensor.name.endswith(".weight_scale") and DTYPE_BITS.get(tensor.dtype) == 8
            counted[narrow if narrow and is_narrow else tensor.dtype] += math.prod(tensor.shape)
    return tuple(counted.items())


def any_packed(stored_by: str | None, tensors: Iterable[StoredTensor]) -> bool:
    """Say whether any weight of the files is packed: by the row of LAYOUTS, or where there is none by its dtype."""
    layout = LAYOUTS.get(stored_by or "")
    return any(_is_packed(layout, tensor) for tensor in tensors)


class StoredDtypes(NamedTuple):
    """What files hold: the dtypes of what is packed, most bytes first, of most of the rest, and the floats of scales."""

    packed: tuple[str, ...]
    rest: str | None
    floats: tuple[int, int]  #: elements and bytes
    scales: str | None  #: the dtype of most of these


def parts_of(layout: Layout | None, tensors: Iterable[StoredTensor], casts: Callable[[str], bool] | None) -> StoredDtypes:
    """Return what files hold; of scales all, or those of wholes of a class that `casts` them.

    Where no row of LAYOUTS says what a part is, integers and floats of 8 bits are taken for packed.
    """
    sizes: Counter[str] = Counter()
    others: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    elements = size = 0
    for tensor in tensors:
        if _is_packed(layout, tensor):
            sizes[tensor.dtype] += tensor.bytes
        elif tensor.dtype in FLOATS and layout is not None and layout.split(tensor.name, tensor.dtype)[1]:
            if casts is None or (tensor.whole_class is not None and casts(tensor.whole_class)):
                elements, size = elements + math.prod(tensor.shape), size + tensor.bytes
                beside[tensor.dtype] += tensor.bytes
        elif tensor.dtype in FLOATS:
            others[tensor.dtype] += tensor.bytes
    held, rest, scales = (tuple(dtype for dtype, _ in counted.most_common()) for counted in (sizes, others, beside))
    return StoredDtypes(held, next(iter(rest), None), (elements, size), next(iter(scales), None))


def _is_packed(layout: Layout | None, tensor: StoredTensor) -> bool:
    if layout is not None:
        return layout.packed(tensor.name, tensor.dtype)
    return tensor.name.endswith(_WEIGHTS) and tensor.dtype.startswith(("int", "uint", "float8")) and len(tensor.shape) > 1
