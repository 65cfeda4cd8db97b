"""LAYOUTS: how quantizers store a weight in the files: under which names, in which dtypes and shapes; which a config means."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from harness.core.dtypes import DTYPE_BYTES
from harness.core.methods.table import METHODS
from harness.core.records import Record

Sides = tuple[int, ...]

_WORD = 32  # bits of the integers that weights are packed into

# What a part of a packed weight holds: integers as unsigned bit fields about a middle, or as signed ones about 0; that middle, or
# one less; what an integer is multiplied by; the group of each input.
Holds = Literal["fields", "signed", "middle", "middle-1", "scales", "order"]


# (outputs, inputs, bits, groups) -> the shapes of parts that are fixed
Shapes = Callable[[int, int, int, int], Mapping[str, Sides]]


class Part(NamedTuple):
    """A tensor that a packed weight is stored in: its torch dtype, and what it holds."""

    dtype: str
    holds: Holds


class Layout(Record, frozen=True, kw_only=True):
    """One row of LAYOUTS: how a quantizer stores a weight of outputs x inputs."""

    main: str  #: the part with the weights, behind the name of the module
    beside: tuple[str, ...]  #: the parts that help to unpack it
    shapes: Shapes
    parts: Mapping[str, Part] = {}  #: what the parts contain, all that a weight needs; empty if not all is known
    bits: tuple[int, ...] = (4, 8)  #: the widths that it has
    dtypes: tuple[str, ...] = ()  #: how the dtypes begin that are packed under the name of `main`; empty: all
    scales: tuple[str, ...] = ()  #: parts of which a weight has at least one: without it nothing unpacks it
    groups: tuple[int, ...] = ()  #: the inputs that may share a scale, beside all of them; empty: any number
    whole: bool = False  #: only whole groups of inputs are packed
    anywhere: bool = False  #: embeddings may be packed as well as Linear modules
    # By bits, the bytes that a card takes at most for each weight beside its 16 bits, while transformers unpacks it on loading, as
    # traced (tests/oracle/oracle_loads.py).
    unpacking: Mapping[int, float] = {}

    def split(self, name: str, dtype: str) -> tuple[str | None, str]:
        """Return the module that a tensor is a part of, and which part; None for one that is not packed."""
        for part in (self.main, *self.beside):
            if name.endswith(part) and not (part == self.main and self.dtypes and not dtype.startswith(self.dtypes)):
                return name.removesuffix(part), part
        return None, ""

    def packed(self, name: str, dtype: str) -> bool:
        """Say whether a tensor of this name holds packed weights."""
        return self.split(name, dtype)[1] == self.main

    def whole_name(self, base: str) -> str:
        """Return the name of the weight whose parts begin with `base`: a module has a "weight", a stack is one itself."""
        return f"{base}.weight" if self.main.startswith(".") else base

    def holds_whole(self, name: str, names: Collection[str]) -> bool:
        """Say whether the packed part of a weight is among names of tensors."""
        return f"{name.removesuffix('.weight')}{self.main}" in names

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

    def fault(self, parts: Mapping[str, Sides], shape: Sides, bits: int, group: int) -> tuple[str, Sides] | None:
        """Return a part that is not as a weight of `shape` has it, and how it should be; None if all are."""
        asked = self._shapes(shape, bits, group)
        return next(((part, asked[part]) for part in asked if part in parts and tuple(parts[part]) != asked[part]), None)

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


def _whole(outputs: int, inputs: int, _: int, __: int) -> Mapping[str, Sides]:
    return {".weight": (outputs, inputs)}


def _words(outputs: int, inputs: int, bits: int, groups: int) -> dict[str, Sides]:
    return {".weight_packed": (outputs, -(-inputs * bits // _WORD))} | _grouped(outputs, groups)


def _grouped(outputs: int, groups: int) -> dict[str, Sides]:
    """Return the shape of the scales of groups; without groups there may be one for a row, or for all."""
    return {".weight_scale": (outputs, groups)} if groups > 1 else {}


def _halves(outputs: int, inputs: int, _: int, groups: int) -> Mapping[str, Sides]:
    return {".weight_packed": (outputs, -(-inputs // 2))} | _grouped(outputs, groups)


def _metal(outputs: int, inputs: int, bits: int, groups: int) -> Mapping[str, Sides]:
    scales = (outputs, groups)
    return {".weight": (outputs, inputs * bits // _WORD), ".scales": scales, ".qbiases": scales}


def _bitnet(outputs: int, inputs: int, bits: int, _: int) -> Mapping[str, Sides]:
    return {".weight": (outputs * bits // 8, inputs), ".weight_scale": (1,)}


def _unknown(_: int, __: int, ___: int, ____: int) -> Mapping[str, Sides]:
    return {}


def _compressed(
    main: str, shapes: Shapes, bits: tuple[int, ...], dtypes: tuple[str, ...] = (), unpacking: Mapping[int, float] | None = None
) -> Layout:
    """Return a layout of compressed-tensors, whose parts are named alike."""
    return Layout(
        main=main,
        beside=_COMPRESSED,
        shapes=shapes,
        bits=bits,
        dtypes=dtypes,
        scales=(".weight_scale",),
        unpacking=unpacking or {},
    )


_INTEGERS = ("int", "uint")
_STATE = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)
_GROUPED = (".qzeros", ".scales", ".g_idx")
_COMPRESSED = (
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_global_scale",
    ".input_scale",
    ".input_global_scale",
)
# DeepSeek's name for a scale, and what others call it; transformers reads three of them, compressed-tensors the last.
_FP8_SCALES = (".weight_scale_inv", ".scale", ".qscale_weight")
FP8_SCALES = (*_FP8_SCALES, ".weight_scale")
_EIGHT = ("int8", "float8")
_ANY_BITS = tuple(range(1, 17))
_QUARK = tuple(f".{of}_{what}" for of in ("weight", "input", "output", "bias") for what in ("scale", "zero_point", "scale_2"))
# transformers' TorchAoHfQuantizer.serialized_names, without the values.
TORCHAO_PARTS = tuple(f"._weight_{part}" for part in ("scale_and_zero", "per_tensor_scale", "scale", "zero_point", "act_pre_scale"))
# What is known of how quantizers store weights, by `Packed.stored_by`: AutoGPTQ's and MOSS's, AutoAWQ's "gemm", ChatGLM-6B's own,
# bitsandbytes as transformers saves it, the formats of compressed-tensors, DeepSeek's FP8, Metal's, BitNet's, GPT-OSS's stacks, and
# what AQLM, Quark and torchao call their parts.
LAYOUTS: Mapping[str, Layout] = {
    "gptq": Layout(
        main=".qweight",
        beside=_GROUPED,
        scales=(".scales",),
        groups=(16, 32, 64, 128, 256, 512, 1024),  # SUPPORTS_GROUP_SIZE of gptqmodel 7.7's kernels, all together
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
        scales=(".scales",),
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
        scales=(".weight_scale",),
        shapes=_chatglm,
        parts={".weight": Part("int8", "signed"), ".weight_scale": Part("float16", "scales")},
        dtypes=_INTEGERS,
    ),
    "bitsandbytes_4bit": Layout(
        main=".weight",
        beside=tuple(f".weight.{part}" for part in _STATE),
        shapes=_nf4,
        bits=(4,),
        dtypes=_INTEGERS,
        scales=(".weight.absmax",),
    ),
    "bitsandbytes_8bit": Layout(
        main=".weight", beside=(".SCB", ".weight_format"), shapes=_int8, bits=(8,), dtypes=_INTEGERS, scales=(".SCB",)
    ),
    "fp8": Layout(
        main=".weight",
        beside=(*_FP8_SCALES, ".activation_scale"),
        shapes=_whole,
        bits=(8,),
        dtypes=("float8",),
        scales=_FP8_SCALES,
        unpacking={8: 9.0},
    ),
    "metal": Layout(
        main=".weight",
        beside=(".scales", ".qbiases"),
        scales=(".scales",),
        shapes=_metal,
        bits=(2, 4, 8),
        dtypes=("uint32",),
        whole=True,
        unpacking={4: 11.0},
    ),
    "bitnet": Layout(
        main=".weight", beside=(".weight_scale",), scales=(".weight_scale",), shapes=_bitnet, bits=(2,), dtypes=("uint8",)
    ),
    "mxfp4": Layout(main="_blocks", beside=("_scales",), shapes=_unknown, bits=(4,), scales=("_scales",)),
    "aqlm": Layout(main=".codes", beside=(".codebooks", ".scales"), shapes=_unknown, bits=_ANY_BITS, scales=(".scales",)),
    "quark": Layout(
        main=".weight",
        beside=_QUARK,
        shapes=_unknown,
        bits=_ANY_BITS,
        dtypes=(*_INTEGERS, "float8"),
        scales=(".weight_scale",),
        anywhere=True,
    ),
    "torchao": Layout(
        main="._weight_qdata",
        beside=TORCHAO_PARTS,
        shapes=_unknown,
        bits=_ANY_BITS,
        scales=("._weight_scale", "._weight_scale_and_zero"),
        anywhere=True,
    ),
    "compressed-tensors pack-quantized": _compressed(".weight_packed", _words, (2, 3, 4, 5, 6, 7, 8), ("int32",), {4: 3.5, 8: 8.0}),
    "compressed-tensors nvfp4-pack-quantized": _compressed(".weight_packed", _halves, (4,), ("uint8",)),
    "compressed-tensors mxfp4-pack-quantized": _compressed(".weight_packed", _halves, (4,), ("uint8",)),
    "compressed-tensors float-quantized": _compressed(".weight", _whole, (8,), _EIGHT, {8: 3.0}),
    "compressed-tensors int-quantized": _compressed(".weight", _whole, (8,), _EIGHT, {8: 3.0}),
    "compressed-tensors naive-quantized": _compressed(".weight", _whole, (8,), _EIGHT, {8: 3.0}),
}

# Keys of a config that say which version or format weights are packed in.
_FORMAT_KEYS = ("version", "format", "checkpoint_format", "bnb_4bit_quant_storage")


def layout_name(method: str, settings: Mapping[str, Any]) -> str | None:
    """Return the row of LAYOUTS that a quantization_config means; None where it names a layout that its method has not usually."""
    if "packing_format" in settings:  # AutoRound's: that of another package, which it names at the end
        end = str(settings["packing_format"]).rpartition("_")[2]
        return end if end in METHODS and METHODS[end].has_kernels else None
    row = METHODS.get(method)
    formats = {str(settings[key]).casefold() for key in _FORMAT_KEYS if settings.get(key)}
    if row is not None and row.formats is not None and (settings.get("is_marlin_format") or not formats <= row.formats):
        return None
    return (row.layout if row is not None else None) or method
