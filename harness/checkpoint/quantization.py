"""What is quantized already: how config and tensors say it, how files hold it, and how many weights a packed tensor stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.core.dtypes import DTYPE_BYTES
from harness.core.families import CHATGLM, GGUF, MOSS, family_of
from harness.core.precisions import Precision, row_of
from harness.core.records import Record

if TYPE_CHECKING:
    from harness.checkpoint.formats.safetensors_header import StoredTensor

Sides = tuple[int, ...]

# Stored beside the weights without being weights: scales, zeros, orders and formats of quantized layers, and buffers.
_BESIDE = re.compile(
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format|qzeros|scales|g_idx|weight_scale|weight_scale_2"
    r"|weight_scale_inv|weight_shape|weight_zero_point|weight_g_idx|input_scale|k_scale|v_scale|inv_freq|causal_mask|masked_bias"
    r"|position_ids)$|\.quant_state\.|_scales$"
)
_ATTENTION_MASK = re.compile(r"(attn|attention)\.bias$")
_WORD = 32  # bits of the integers that weights are packed into
_PACKED_SUFFIXES = (".qweight", ".weight_packed")

# quant_method of transformers -> the key in its config that gives the bits
_BITS_KEYS = ("bits", "w_bit", "num_bits", "weight_bits")
# ... that say which modules are packed, where those are not all Linears but the head
_SELECT_KEYS = ("modules_to_not_convert", "modules_in_block_to_quantize", "lm_head")


class Packed(Record, frozen=True, kw_only=True):
    """How a checkpoint is quantized already."""

    title: str  #: "gptq 4-bit, groups of 128" (`describe_quantization`)
    bits: int
    group: int  #: 0: whole columns
    varies: bool = False  #: bits differ from module to module
    selects: bool = False  #: the config names modules that are packed, or that are not
    foreign: bool = False  #: the layout in the files is not one of LAYOUTS
    unpacks: bool = False  #: transformers makes 16-bit weights of it on loading if its kernels are not installed (mxfp4)
    own: bool = False  #: the config says it by keys of the model's family, which `harness.models` reads and no package does

    @property
    def method(self) -> str:
        """The quantizer, by the name that transformers gives it; with bitsandbytes its bits."""
        method = self.title.partition(" ")[0]
        return f"{method}-{self.bits}" if method == "bitsandbytes" else method

    @property
    def layout(self) -> Layout | None:
        """How its weights lie in the files, None if that is not known."""
        return None if self.foreign else LAYOUTS.get(self.method)

    @property
    def precision(self) -> str | None:
        """The row of PRECISIONS that it is, None if there is none, or it is unpacked."""
        row = None if self.unpacks else row_of(self.title)
        return row.name if row else None

    def refusal(self, precision: Precision) -> str | None:
        """Say why it is not held this way, None if it is: it stays what it is, and without a row of its own runs as plain ones."""
        if self.precision is not None and precision.name != self.precision:
            return f"the checkpoint is quantized already ({self.title}): load it with --precision {self.precision}"
        if self.precision is None and (precision.quantizes or precision.requires_checkpoint):
            return f"the checkpoint is quantized already ({self.title}): load it with --precision bf16 or fp16"
        return None


def packed(config: Mapping[str, Any], tensors: Iterable[StoredTensor] = ()) -> Packed | None:
    """Read from a config, and from the tensors where they are known, how weights are quantized already."""
    title = describe_quantization(config, tensors)
    if title is None:
        return None
    bits, group = re.search(r"(\d+)-bit", title), re.search(r"groups of (\d+)", title)
    return Packed(
        title=title,
        bits=int(bits[1]) if bits else 4,
        group=int(group[1]) if group else 0,
        varies=bool((_settings(config) or {}).get("dynamic")),
        selects=any((_settings(config) or {}).get(key) for key in _SELECT_KEYS),
        foreign=_is_foreign(_settings(config) or {}),
        unpacks=title.startswith("mxfp4"),
        own=_settings(config) is None and not title.startswith(GGUF.name),
    )


# What a part of a packed weight holds: integers as unsigned bit fields about a middle, or as signed ones about 0; that middle, or
# one less; what an integer is multiplied by; the group of each input.
Holds = Literal["fields", "signed", "middle", "middle-1", "scales", "order"]


class Part(NamedTuple):
    """A tensor that a packed weight is stored in: its torch dtype, and what it holds."""

    dtype: str
    holds: Holds


class Layout(Record, frozen=True, kw_only=True):
    """One row of LAYOUTS: how a quantizer stores a weight of outputs x inputs."""

    main: str  #: the part with the weights, behind the name of the module
    beside: tuple[str, ...]  #: the parts that help to unpack it
    shapes: Callable[[int, int, int, int], Mapping[str, Sides]]  #: (outputs, inputs, bits, groups) -> the shapes that are fixed
    parts: Mapping[str, Part] = {}  #: what the parts contain, all that a weight needs; empty if not all is known
    bits: tuple[int, ...] = (4, 8)  #: the widths that it has
    integers: bool = False  #: only integers are packed under the name of `main`
    whole: bool = False  #: only whole groups of inputs are packed

    def split(self, name: str, dtype: str) -> tuple[str | None, str]:
        """Return the module that a tensor is a part of, and which part; None for one that is not packed."""
        for part in (self.main, *self.beside):
            if name.endswith(part) and not (part == self.main and self.integers and "int" not in dtype):
                return name.removesuffix(part), part
        return None, ""

    def holds(self, name: str, dtype: str) -> Holds | None:
        """Say what a tensor of this name holds, as a part of a packed weight; None if it is none."""
        part = self.parts.get(self.split(name, dtype)[1])
        return part.holds if part else None

    def stored(self, shape: Sides, bits: int, group: int) -> dict[str, tuple[str, Sides]]:
        """Return the dtype and the shape of every part that a weight of `shape` is stored in."""
        asked = self._shapes(shape, bits, group)
        return {name: (part.dtype, asked[name]) for name, part in self.parts.items()}

    def stored_bytes(self, shape: Sides, bits: int, group: int) -> int:
        """Return the bytes that a weight of `shape` takes in the files, with what stands beside it."""
        stored = self.stored(shape, bits, group).values()
        return sum(math.prod(sides) * DTYPE_BYTES[dtype] for dtype, sides in stored)

    def overhang(self, shape: Sides, bits: int, group: int) -> bool:
        """Say whether a weight of `shape` leaves the last word of a row or column, or the last group, half empty."""
        words = any(side * bits % _WORD for side in shape)
        return words or bool(self.whole and group and shape[1] % group)

    def fault(self, parts: Mapping[str, StoredTensor], shape: Sides, bits: int, group: int) -> tuple[str, Sides] | None:
        """Return a part that is not as a weight of `shape` has it, and how it should be; None if all are."""
        asked = self._shapes(shape, bits, group)
        return next(((part, asked[part]) for part in asked if part in parts and parts[part].shape != asked[part]), None)

    def _shapes(self, shape: Sides, bits: int, group: int) -> Mapping[str, Sides]:
        outputs, inputs = shape
        return self.shapes(outputs, inputs, bits, -(-inputs // group) if group else 1)


def _gptq(outputs: int, inputs: int, bits: int, groups: int) -> Mapping[str, Sides]:
    zeros = (groups, outputs * bits // 32)
    return {".qweight": (inputs * bits // 32, outputs), ".qzeros": zeros, ".scales": (groups, outputs), ".g_idx": (inputs,)}


def _awq(outputs: int, inputs: int, bits: int, groups: int) -> Mapping[str, Sides]:
    width = outputs * bits // 32
    return {".qweight": (inputs, width), ".qzeros": (groups, width), ".scales": (groups, outputs)}


def _chatglm(outputs: int, inputs: int, bits: int, _: int) -> Mapping[str, Sides]:
    return {".weight": (outputs, inputs * bits // 8), ".weight_scale": (outputs,)}


def _nf4(outputs: int, inputs: int, _: int, __: int) -> Mapping[str, Sides]:
    return {".weight": (-(-outputs * inputs // 2), 1)}


def _int8(outputs: int, inputs: int, _: int, __: int) -> Mapping[str, Sides]:
    return {".weight": (outputs, inputs), ".SCB": (outputs,)}


_STATE = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)
_GROUPED = (".qzeros", ".scales", ".g_idx")
# What is known of how quantizers store weights, by `Packed.method`: AutoGPTQ's and MOSS's, AutoAWQ's "gemm", ChatGLM-6B's own,
# bitsandbytes as transformers saves it.
LAYOUTS: Mapping[str, Layout] = {
    "gptq": Layout(
        main=".qweight",
        beside=_GROUPED,
        shapes=_gptq,
        parts={
            ".qweight": Part("int32", "fields"),
            ".qzeros": Part("int32", "middle-1"),
            ".scales": Part("float16", "scales"),
            ".g_idx": Part("int32", "order"),
        },
        bits=(2, 3, 4, 8),
    ),
    "awq": Layout(
        main=".qweight",
        beside=_GROUPED,
        shapes=_awq,
        parts={
            ".qweight": Part("int32", "fields"),
            ".qzeros": Part("int32", "middle"),
            ".scales": Part("float16", "scales"),
        },
        whole=True,
    ),
    "chatglm": Layout(
        main=".weight",
        beside=(".weight_scale",),
        shapes=_chatglm,
        parts={".weight": Part("int8", "signed"), ".weight_scale": Part("float16", "scales")},
        integers=True,
    ),
    "bitsandbytes-4": Layout(
        main=".weight", beside=tuple(f".weight.{part}" for part in _STATE), shapes=_nf4, bits=(4,), integers=True
    ),
    "bitsandbytes-8": Layout(main=".weight", beside=(".SCB", ".weight_format"), shapes=_int8, bits=(8,), integers=True),
}


def describe_quantization(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str | None:
    """Say in a few words how the stored weights are quantized: "gptq 4-bit, groups of 128"; None if they are not."""
    tensors = tuple(tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes:
        from harness.checkpoint.formats.gguf_header import BLOCK_TYPES

        blocks = sorted(dtypes & BLOCK_TYPES)
        if blocks:
            return f"{GGUF.name} " + ", ".join(blocks)
    settings = _settings(config)
    if settings is not None:
        method = settings.get("quant_method")
        words = [method if isinstance(method, str) and method.isprintable() and len(method) <= 40 else "unknown method"]
        words += [_bitsandbytes(settings)] if method == "bitsandbytes" else []
        words += [_torchao(settings)] if method == "torchao" else []
        return _sentence(words, _bits(settings), settings.get("group_size", settings.get("q_group_size")))
    if tensors_tell(config):
        bits = first_packed(tensors)[1] if tensors else bits_said(config)
        return _sentence([MOSS.method], bits, config.get(MOSS.group_key, MOSS.group)) if bits else None
    if _positive(config.get(CHATGLM.bits_key)):
        return _sentence([CHATGLM.method], config[CHATGLM.bits_key], None)
    return None


def tensors_tell(config: Mapping[str, Any]) -> bool:
    """Say whether shapes decide the bits of packed weights, as those of MOSS: one of its published configs is wrong."""
    return _settings(config) is None and (family_of(config) is MOSS or bits_said(config) > 0)


def bits_said(config: Mapping[str, Any]) -> int:
    """Return the bits that a config like MOSS's says its weights are packed in; 0 if it says none, or 32 as of float16."""
    bits = _positive(config.get(MOSS.bits_key))
    return bits if bits < 16 else 0


def first_packed(tensors: Iterable[StoredTensor]) -> tuple[StoredTensor | None, int]:
    """Return the first packed tensor, in GPTQ's layout, and its bits by the shapes beside it; (None, 0) where none is packed."""
    tensors = tuple(tensors)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    packed = (tensor for tensor in tensors if tensor.name.endswith(".qweight"))
    told = ((tensor, _bits_of(tensor.name.removesuffix(".qweight"), shapes)) for tensor in packed)
    return next(((tensor, bits) for tensor, bits in told if bits), (None, 0))


def _bits_of(module: str, shapes: Mapping[str, Sides]) -> int:
    """Return the bits of a module's weights, which its zeros are packed with as well; 0 where the shapes do not tell."""
    zeros, scales = shapes.get(f"{module}.qzeros", ()), shapes.get(f"{module}.scales", ())
    return _positive(zeros[1] * 32 // scales[1]) if len(zeros) == len(scales) == 2 and scales[1] else 0


def weights_in(tensor: StoredTensor, shapes: Mapping[str, Sides], config: Mapping[str, Any]) -> int:
    """Return how many of the model's weights a stored tensor stands for.

    Buffers and what only helps to unpack count 0; packed integers count the weights inside them. `shapes` are those of all
    tensors of the checkpoint: a packed tensor is known by what stands beside it.
    """
    name, elements = tensor.name, math.prod(tensor.shape)
    if _BESIDE.search(name) or tensor.dtype == "bool" or (_ATTENTION_MASK.search(name) and len(tensor.shape) == 4):
        return 0
    if name.endswith(_PACKED_SUFFIXES) and tensor.dtype == "int32":
        said = _bits(_settings(config) or {}) or _positive(config.get(MOSS.bits_key)) or 4
        return elements * 32 // (_bits_of(name.removesuffix(".qweight"), shapes) or said)
    nibbles = (
        tensor.dtype == "uint8" and (f"{name}.absmax" in shapes or f"{name}_scale_2" in shapes or name.endswith("_blocks"))
    ) or (tensor.dtype == "int8" and f"{name}_scale" in shapes and config.get(CHATGLM.bits_key) == 4)
    return elements * 2 if nibbles else elements


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) and settings else None


def _bits(settings: Mapping[str, Any]) -> int:
    """Return the bits of a quantization_config, 0 where it does not say: its own, or those of its first group of layers."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    sources = [settings, weights if isinstance(weights, dict) else {}]
    return next((bits for source in sources for key in _BITS_KEYS if (bits := _positive(source.get(key)))), 0)


def _bitsandbytes(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit") is True:
        return "8-bit"
    kind = settings.get("bnb_4bit_quant_type")
    nested = ", nested" if settings.get("bnb_4bit_use_double_quant") is True else ""
    return f"4-bit {kind}{nested}" if kind in ("nf4", "fp4") else "4-bit"


def _torchao(settings: Mapping[str, Any]) -> str:
    """Name the class of torchao's config, as `TorchAoConfig.to_dict` writes it."""
    given = settings.get("quant_type")
    inner = given.get("default") if isinstance(given, dict) else None
    kind = inner.get("_type") if isinstance(inner, dict) else None
    return kind if isinstance(kind, str) and kind.isidentifier() and len(kind) <= 60 else "of unknown type"


def _is_foreign(settings: Mapping[str, Any]) -> bool:
    """Say whether a quantization_config names a layout that its method does not have by default."""
    keys = ("version", "format", "checkpoint_format", "bnb_4bit_quant_storage")
    formats = {str(settings[key]).casefold() for key in keys if settings.get(key)}
    return bool(settings.get("is_marlin_format")) or not formats <= {"gemm", "gptq", "gptq_v2", "uint8"}


def _positive(value: Any) -> int:
    """Return a believable number of bits, else 0: configs are read before anyone has checked them."""
    return value if type(value) is int and 0 < value <= 32 else 0


def _sentence(words: list[str], bits: int, group: Any) -> str:
    words += [f"{bits}-bit"] if bits else []
    grouped = f", groups of {group}" if type(group) is int and 0 < group < 1 << 20 else ""
    return " ".join(words) + grouped
