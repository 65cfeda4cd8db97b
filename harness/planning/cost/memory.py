"""Bytes of a model in memory: weights by tensor, KV cache by layer, activations by phase. Pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

from msgspec.structs import replace

from harness.architecture.skeleton import Attention, Block, Module, ParameterSpec, Skeleton, Weight, is_stacked, reads_text
from harness.core.attention import KV_FORMS, KvForm
from harness.core.dtypes import DTYPE_BYTES
from harness.core.families import FAMILIES
from harness.core.methods.config import CountedByName
from harness.core.quantizers import SCHEMES
from harness.core.records import USUAL_KV, Record, Workload

# Classes derived from torch's Linear: some quantizers take them for one, others take exactly Linear.
DERIVED_LINEARS = frozenset(("FalconLinear",))
# What GELU's formula in Python keeps at once beside its input, in widths of the MLP: gelu_new of these classes.
_PLAIN_GELU = ("codegen", "gptj", "gpt2", "gpt_neo", "phi")
PLAIN_GELU = frozenset((*_PLAIN_GELU, *(name for name, family in FAMILIES.items() if family.plain_gelu)))


class WeightFormat(Record, frozen=True, kw_only=True):
    """The format in which a case keeps its weights in memory."""

    dtype: str  #: of what is not quantized
    quantizer: str | None = None  #: the row of SCHEMES that quantizes while loading
    packed_bits: float | None = None  #: bits a weight, scales included, of a checkpoint that is quantized already
    beside_bits: float = 0.0  #: of scales that stay beside a Linear weight in 16 bits, for each of its elements
    filled: tuple[int, int] | None = None  #: outputs and inputs whose multiples its Linear weights fill, a view being what is used
    packed_linears: bool = True  #: whether its Linear weights are quantized
    packed_experts: bool = False  #: whether its stacked experts are quantized too
    packed_embeddings: bool = False  #: whether its embedding and head are quantized too
    packed_tables: frozenset[str] = frozenset()  #: which of them are, where not both may be
    counted_as: str | None = None  #: the row of SCHEMES by which transformers counts what is packed; None: by its own bytes
    counted_names: CountedByName | None = None  #: which tensors it counts so, if names decide it
    counted_bits: float | None = None  #: bits a weight by which it counts instead, where scales do not
    wide_bias: bool = False  #: whether the biases of packed experts are in float32
    margin: bool = False  #: whether transformers keeps a tenth of the memory free for what is packed
    in_blocks: bool = False  #: whether a scale is for a block of outputs x inputs, whose product has kernels of its own
    unpacking: str | None = None  #: the row of UNPACKINGS, if layers of `harness.models` run it

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


def module_bytes(module: Module, fmt: WeightFormat) -> dict[str, int]:
    """Return the bytes of every tensor in a module by path, tied ones 0, buffers included.

    What a scheme quantizes takes its own bytes. Biases, norms, embeddings, the head and mostly stacked experts keep the dtype.
    """
    return {
        weight.path: 0 if weight.tied_to else _tensor_bytes(weight, fmt, inside.block)
        for inside in module.inside
        for weight in inside.weights
    }


def _tensor_bytes(weight: Weight, fmt: WeightFormat, owner: Block) -> int:
    tensor, elements = weight.tensor, weight.elements
    if fmt.packed_bits is not None and is_packed(weight, fmt, owner):
        return int(elements * fmt.packed_bits / 8)
    if fmt.wide_bias and "experts" in weight.path and tensor.name.endswith("_bias"):
        return elements * 4
    if not narrows(weight, fmt.quantizer, owner) or fmt.quantizer is None:
        if fmt.filled is not None and weight.quantizes and len(tensor.shape) == 2:
            elements = math.prod(-(-side // by) * by for side, by in zip(tensor.shape, fmt.filled, strict=True))
        return elements * _width(tensor, fmt.dtype) + (int(elements * fmt.beside_bits / 8) if weight.quantizes else 0)
    *experts, outputs, inputs = reversed(tensor.shape) if owner.linear == "conv1d" else tensor.shape
    return math.prod(experts) * SCHEMES[fmt.quantizer].size(outputs, inputs, fmt.element_bytes)


def is_taken(weight: Weight, quantizer: str | None) -> bool:
    """Say whether a scheme quantizes a weight while loading: a Linear, or with some the experts that are stacked."""
    return quantizer is not None and (weight.quantizes or (SCHEMES[quantizer].experts and is_stacked(weight)))


def narrows(weight: Weight, quantizer: str | None, owner: Block) -> bool:
    """Say whether a scheme quantizes a weight of this block: all take Linear.

    Some take GPT-2's Conv1D, what is derived of Linear, or the stacked experts of a layer as well.
    """
    if quantizer is None:
        return False
    if is_stacked(weight):
        return SCHEMES[quantizer].experts
    if owner.class_name in DERIVED_LINEARS:
        return SCHEMES[quantizer].derived and len(weight.tensor.shape) == 2
    return weight.quantizes and (owner.linear != "conv1d" or SCHEMES[quantizer].conv1d)


@lru_cache(maxsize=32)  # every case asks for the same
def narrows_any(skeleton: Skeleton, quantizer: str) -> bool:
    """Say whether a scheme quantizes any weight of a model."""
    inside = (part for kind in skeleton.kinds for part in kind.inside)
    return any(narrows(weight, quantizer, part.block) for part in inside for weight in part.weights)


def counted_bytes(module: Module, fmt: WeightFormat) -> dict[str, int]:
    """Return the bytes by which transformers counts every tensor of a module for a device map, where it is packed."""
    sizes = module_bytes(module, fmt)
    if fmt.counted_bits is None:
        return sizes
    packed = ((w, inside.block) for inside in module.walk() for w in inside.weights if not w.tied_to)
    return sizes | {w.path: int(w.elements * fmt.counted_bits / 8) for w, owner in packed if is_packed(w, fmt, owner)}


def is_packed(weight: Weight, fmt: WeightFormat, owner: Block) -> bool:
    """Say whether a weight is quantized in a checkpoint that is quantized already."""
    if (fmt.packed_linears and weight.quantizes) or (fmt.packed_experts and is_stacked(weight)) or weight.path in fmt.packed_tables:
        return True
    looks_up = "Embedding" in owner.class_name or owner.linear is not None
    return fmt.packed_embeddings and looks_up and len(weight.tensor.shape) == 2


def _width(tensor: ParameterSpec, dtype: str) -> int:
    if tensor.dtype is not None:
        return DTYPE_BYTES.get(tensor.dtype, 4)
    in_fp32 = (tensor.fp32 == "half" and dtype in ("float16", "bfloat16")) or (tensor.fp32 == "fp16" and dtype == "float16")
    return 4 if in_fp32 else DTYPE_BYTES[dtype]


def kv_bytes(skeleton: Skeleton, tokens: int, batch: int, element_bytes: int, windows: bool = True) -> list[int]:
    """Return the bytes of the KV cache of each layer after `tokens` tokens: sliding windows keep no more than their window.

    Without `windows` they keep all: what a cache takes before it cuts.
    """
    by_kind = [(_elements(kind, tokens, windows) * element_bytes + _beside(kind)) * batch for kind in skeleton.attention]
    return [by_kind[kind] for kind in skeleton.layers]


def _elements(kind: Attention, tokens: int, windows: bool = True) -> int:
    cached = min(tokens, kind.window) if kind.window and windows else tokens
    return kind.per_token * cached + kind.state


def _beside(kind: Attention) -> int:
    return kind.float32_state * DTYPE_BYTES["float32"]


def kept_kv_bytes(skeleton: Skeleton, workload: Workload, element_bytes: int, form: KvForm) -> list[int]:
    """Return the bytes of the KV cache of each layer at the end of a workload, as a form keeps it."""
    cached, new = workload.cached_tokens, workload.new_tokens - 1
    kept = [
        round(form.kept_bytes(_elements(kind, cached) * workload.batch, cached, new, element_bytes))
        + _beside(kind) * workload.batch
        for kind in skeleton.attention
    ]
    return [kept[kind] for kind in skeleton.layers]


def kv_beside(skeleton: Skeleton, workload: Workload, element_bytes: int, form: KvForm) -> tuple[int, int]:
    """Return the bytes that a form adds to what is computed: while the prompt is read, and in a step.

    Both are beside the cache at the end, in place of one that grows in the dtype: keys and values of the layer that reads the
    prompt are there in the dtype as well, and a step makes them anew from what is kept.
    """
    if not form.is_quantized:
        return 0, 0
    prompt = max((_elements(kind, workload.prompt_tokens) for kind in skeleton.attention), default=0) * workload.batch
    most = max((_elements(kind, workload.cached_tokens) for kind in skeleton.attention), default=0) * workload.batch
    usual, kept = (
        sum(kept_kv_bytes(skeleton, workload, element_bytes, one))
        - sum(kept_kv_bytes(skeleton, replace(workload, new_tokens=1), element_bytes, one))
        for one in (KV_FORMS[USUAL_KV], form)
    )  # by how much each grows after the prompt
    return prompt * element_bytes + usual - kept, int(most * form.temporary_bytes)


def read_per_token(skeleton: Skeleton, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes by path that one token reads: not the rows of an embedding, nor what sees; of experts those chosen.

    Like `sizes`, of the tensors in the first piece of each kind.
    """
    return dict(_read(skeleton, sizes))


def _read(skeleton: Skeleton, sizes: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    shared = set(skeleton.tied.values())
    chosen = skeleton.experts_per_token / skeleton.experts if skeleton.experts else 1.0
    for module in (module for kind in skeleton.kinds for module in kind.inside):
        embedding = "Embedding" in module.block.class_name and "Rotary" not in module.block.class_name
        for weight in module.weights:
            if embedding and weight.path not in shared:
                continue
            if not reads_text(weight.path):
                yield weight.path, 0.0
                continue
            stacked = skeleton.experts and len(weight.tensor.shape) == 3
            among = ".experts." in f".{weight.path}."
            yield weight.path, sizes[weight.path] * (chosen if stacked or among else 1.0)
