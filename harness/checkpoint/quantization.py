"""What is quantized already: how config and tensors say it, how files hold it, and how many weights a packed tensor stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from harness.checkpoint.packed_tensors import FLOATS, PACKED_SUFFIXES, any_packed, count_beside, is_beside, parts_of
from harness.checkpoint.quantization_words import (
    believable_bits,
    bits_in,
    bits_of,
    block_in,
    group_in,
)
from harness.core.dtypes import DTYPE_BITS, DTYPE_BYTES
from harness.core.families import CHATGLM, GGUF, MOSS, family_of
from harness.core.methods import torchao
from harness.core.methods.compressed import FormatLoading, differ, schemes_in
from harness.core.methods.config import CountedByName, method_name, settings_of
from harness.core.methods.layouts import FP8_SCALES, LAYOUTS, TORCHAO_PARTS, Layout, Sides, layout_name
from harness.core.methods.method import Method
from harness.core.methods.table import METHODS, OWN, foreign
from harness.core.precisions import Precision, row_of
from harness.core.records import Record

if TYPE_CHECKING:
    from harness.checkpoint.formats.safetensors_header import StoredTensor

_ATTENTION_MASK = re.compile(r"(attn|attention)\.bias$")
# What tells modules apart whose bits are others
_VARY_KEYS = ("dynamic", "extra_config", "layer_quant_config")
# ... how they are packed
_PACKING_KEYS = ("packing_format", "version", "checkpoint_format", "format")
# ... which are packed, where those are not all Linears but the head
_SELECT_KEYS = ("modules_to_not_convert", "modules_in_block_to_quantize", "lm_head", "llm_int8_skip_modules")


class Packed(Record, frozen=True, kw_only=True):
    """How a checkpoint is quantized already."""

    title: str  #: "gptq 4-bit, groups of 128" (`describe_quantization`)
    name: str  #: the row of METHODS or OWN; one of neither, if transformers does not know it
    bits: int
    group: int  #: 0: whole columns
    block: tuple[int, int] | None = None  #: outputs and inputs that share a scale, of methods that scale blocks
    varies: bool = False  #: bits differ from module to module
    selects: bool = False  #: the config names modules that are packed, or that are not
    apart: bool = False  #: modules outside of experts are packed in several ways, and transformers unpacks in one while it loads
    held: str | None = None  #: the dtype of most of what is packed, if the headers were read; what stays packed keeps it
    rest: str | None = None  #: the dtype of most of what is not packed, if the headers were read
    scheme: str | None = None  #: what bitsandbytes calls weights of 4 bits that are stored so
    floats: tuple[int, int] = (0, 0)  #: elements and bytes of the scales and codebooks in the files
    dtype: str | None = None  #: what the config says of the rest, where nothing else runs
    packing: str = ""  #: how AutoRound, AWQ or GPTQ says that it is packed
    stored_by: str | None = None  #: the row of LAYOUTS; None: how its files hold weights is not known
    plain: bool = False  #: the files hold weights in 16 bits, with scales beside them
    beside: tuple[tuple[str, int], ...] = ()  #: elements of scales and of all else that the files hold beside weights, by dtype
    keeps_beside: bool = False  #: these stay in memory beside 16-bit weights
    unpacked_dtype: str | None = None  #: the only dtype that its weights are unpacked to
    filled: tuple[int, int] | None = None  #: outputs and inputs whose multiples weights fill once they are unpacked ...
    filled_in: str | None = None  #: ... to this dtype alone
    counted: CountedByName | None = None  #: what counts as packed when a device map is inferred, if names decide it
    fault: str | None = None  #: why the method's package does not take the config
    undivided: str | None = None  #: why weights are not unpacked whose sides are no whole blocks, where it was looked at

    @property
    def method(self) -> Method | None:
        """What is known of the method; None if transformers does not know it."""
        return METHODS.get(self.name) or OWN.get(self.name)

    @property
    def own(self) -> bool:
        """Whether the config says it by keys of the model's family, which `harness.models` reads and no package does."""
        return self.name in OWN

    @property
    def has_kernels(self) -> bool:
        """Whether rows of PACKED_KERNELS and CPU_KERNELS multiply its weights."""
        return self.method is not None and self.method.has_kernels

    @property
    def layout(self) -> Layout | None:
        """How its weights lie in the files, None if that is not known."""
        return LAYOUTS.get(self.stored_by) if self.stored_by else None

    @property
    def precision(self) -> str | None:
        """The row of PRECISIONS that keeps it packed, None if there is none."""
        row = row_of(self.title)
        return row.name if row else None

    def float_growth(self, dtype: str) -> int:
        """Return by how many bytes scales and codebooks are larger in memory than in the files, in a model of this dtype."""
        elements, size = self.floats
        kept = self._floats_in(dtype)
        return 0 if kept is None else elements * DTYPE_BYTES[kept] - size

    def beside_bytes(self, dtype: str) -> float:
        """Return the bytes of scales and of all else that stays in memory beside 16-bit weights, in a model of this dtype."""
        kept = self._floats_in(dtype) if self.keeps_beside else None
        return sum(count * DTYPE_BITS[(kept or one) if one in FLOATS else one] / 8 for one, count in self.beside)

    def _floats_in(self, dtype: str) -> str | None:
        """Return the dtype that scales and codebooks have in a model of this dtype, None if they keep that of the files."""
        kept = "stored" if self.method is None else "asked" if self.method.casts else self.method.floats
        return None if kept == "stored" else dtype if kept == "asked" else kept

    def unpacks(self, precision: Precision) -> bool:
        """Say whether loading with a precision makes 16- or 32-bit weights of what is stored."""
        return self.plain or (self.method is not None and self.method.unpacked is not None and precision.name != self.precision)

    def in_part(self, precision: Precision) -> bool:
        """Say whether only some Linear weights have the dtype of the packed ones, in a model loaded in a precision."""
        return self.apart if self.unpacks(precision) else self.selects or self.varies

    def holds_all(self, precision: Precision) -> bool:
        """Say whether bitsandbytes holds the weights as it would have packed them while loading with a precision, all of them."""
        return self.method is not None and self.method.kept_as_made and precision.name == self.precision and not self.selects

    def refusal(self, precision: Precision, *, in_ram: bool = False) -> str | None:
        """Say why it is not held this way, in RAM for a processor; None if it is: it stays what it is or is unpacked, no more."""
        if self.method is None:
            return foreign(self.name)
        if why := self.method.unsupported or self.fault:
            return why
        method_dtypes = () if self.method.unpacked or (in_ram and self.has_kernels) else self.method.dtypes
        if precision.name == self.precision:
            return None
        if self.undivided is not None and self.unpacks(precision):
            return self.undivided
        plain = not precision.quantizes and precision.requires_checkpoint is None
        if plain and self.precision is None and method_dtypes and precision.dtype not in method_dtypes:
            return f"transformers runs {self.method.title} with the rest in {' or '.join(method_dtypes)} only"
        if plain and self.precision is None and self.dtype is not None and precision.dtype != self.dtype:
            return f"products of {self.method.title}'s {self.held} weights are in {self.dtype}: use a precision of that dtype"
        if plain and self.unpacked_dtype not in (None, precision.dtype):
            what = f"{self.method.title} weights of this checkpoint are unpacked to {self.unpacked_dtype}, whatever is asked for"
            return f"{what}: use a precision of that dtype"
        if plain and (self.precision is None or self.method.unpacked is not None):
            return None
        ways = [*([] if self.precision and not self.method.unpacked else ["bf16", "fp16"]), *filter(None, [self.precision])]
        return f"the checkpoint is quantized already ({self.title}): load it with --precision {' or '.join(ways)}"

    def adapted(self, precision: Precision) -> Precision:
        """Return the row of a precision as it holds of these weights: they are not quantized on loading, but kept or unpacked."""
        method = self.method
        assert method is not None
        if self.unpacks(precision):
            # Until the first forward pass what transformers does not unpack while it loads is packed.
            asked = None if self.keeps_beside else method.unpacked
            dtype = self.held or method.held if self.keeps_beside and not self.plain else precision.linear_dtype
            row = replace(precision, quantization=asked, linear_dtype=dtype)
            return replace(row, needs=method.needs, incompatible=dict(method.refuses))
        refuses = dict(method.refuses)
        if "ram" not in refuses and (why := self._no_layers(precision)):
            refuses["ram"] = why
        stored = self.rest if method.keeps_dtype else None
        return replace(
            precision,
            dtype=stored or precision.dtype,
            dtype_in_ram=None if stored or self.own else precision.dtype_in_ram,
            dtype_before_cc80=None if stored else precision.dtype_before_cc80,
            quantization=None,
            quantization_on_cpu=None,
            needs=(*method.needs, *method.packs_with),
            min_compute_capability=method.packs_from or precision.min_compute_capability,
            incompatible=refuses,
            off_gpu=None,
            linear_dtype=(self.scheme or precision.linear_dtype) if precision.name == self.precision else self.held or method.held,
        )

    def _no_layers(self, precision: Precision) -> str | None:
        """Say why a processor does not keep it packed, with the rest in a precision's dtype; None if it does."""
        method = self.method
        assert method is not None
        if "cpu" not in method.packs_on:
            return self.undivided or f"transformers unpacks {method.title} on a processor: use --precision bf16, fp16 or fp32"
        if method.cpu_dtypes and precision.dtype not in method.cpu_dtypes:
            return f"{method.title} runs on a processor with the rest in {' or '.join(method.cpu_dtypes)} only"
        return next((why for end, why in method.cpu_lacks.items() if self.packing.endswith(end)), None)


def packed(config: Mapping[str, Any], tensors: Iterable[StoredTensor] = ()) -> Packed | None:
    """Read from a config, and from the tensors where they are known, how weights are quantized already."""
    tensors = tuple(tensors)
    title = describe_quantization(config, tensors)
    if title is None:
        return None
    bits, group = re.search(r"(\d+)-bit", title), re.search(r"groups of (\d+)", title)
    settings, family = settings_of(config), family_of(config)
    own = family.model_type if family else MOSS.model_type
    name = method_name(settings) if settings else GGUF.name if title.startswith(GGUF.name) else own
    known = METHODS.get(name) or OWN.get(name)
    loading = _loading(name, known, settings or {}, tensors)
    form = f"{name} {loading.stored}" if loading else layout_name(name, settings) if settings else None
    stored_by = form if settings else family.method if family else MOSS.method
    plain = settings is not None and known is not None and known.is_plain(settings) and not any_packed(stored_by, tensors)
    held = parts_of(LAYOUTS.get(stored_by or ""), tensors, known.casts if known else None)
    keeps = loading is not None and not loading.whole
    block = block_in(settings or {}) if known is not None and known.blocks else None
    return Packed(
        title=title,
        name=name,
        bits=int(bits[1]) if bits else known.bits if known else 4,
        group=int(group[1]) if group else 0,
        block=block,
        varies=len(held.packed) > 1 or differ(schemes_in(settings or {})) or any((settings or {}).get(key) for key in _VARY_KEYS),
        selects=any((settings or {}).get(key) for key in _SELECT_KEYS),
        apart=loading is not None and loading.apart,
        held=next(iter(held.packed), None),
        rest=held.rest,
        scheme=title.rpartition("4-bit ")[2].replace(",", "") if known and known.kept_as_made and known.bits == 4 else None,
        floats=held.floats,
        dtype=config.get("torch_dtype") or config.get("dtype") if _binds(known, settings or {}, tensors) else None,
        packing=str(next(filter(None, map((settings or {}).get, _PACKING_KEYS)), "")).casefold(),
        stored_by=None if plain else stored_by,
        plain=plain,
        beside=count_beside(tensors, loading.scales if loading and keeps and not plain else None),
        keeps_beside=plain or keeps,
        unpacked_dtype=None if plain else _unpacked_dtype(known, loading if keeps else None, tensors),
        filled=loading.filled if loading is not None and not plain else None,
        filled_in=held.scales or config.get("torch_dtype") or config.get("dtype"),
        counted=CountedByName.read(settings) if settings and known is not None and known.counts_by_name else None,
        fault=_fault(known, settings or {}, None if plain else loading),
    )


def _loading(
    name: str, known: Method | None, settings: Mapping[str, Any], tensors: tuple[StoredTensor, ...]
) -> FormatLoading | None:
    """Return what becomes of the weights on loading, of a method whose formats the config names; None of others."""
    if known is None or known.loading is None:
        return None
    return known.loading(settings, (lambda form: any_packed(f"{name} {form}", tensors)) if tensors else None)


def _binds(known: Method | None, settings: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> bool:
    """Say whether packed weights leave the rest of the model no dtype but the config's own."""
    asks = known.binds if known is not None else None
    return asks is not None and asks(settings, {tensor.whole_class for tensor in tensors if tensor.whole_class is not None})


def _fault(known: Method | None, settings: Mapping[str, Any], loading: FormatLoading | None) -> str | None:
    """Say why a method's package does not take a config, or cannot load what it says; None if it does."""
    refused = known.faults(settings) if known is not None and known.faults is not None else None
    return refused or (loading.fault if loading is not None else None)


def _unpacked_dtype(known: Method | None, kept: FormatLoading | None, tensors: Iterable[StoredTensor]) -> str | None:
    """Return the only dtype that weights are unpacked to, whichever is asked for; None if it is that one."""
    if kept is not None:
        return kept.dtype
    decide = known is not None and known.scales_decide
    return next((tensor.dtype for tensor in tensors if decide and tensor.name.endswith((".scales", "_scale"))), None)


def form_for(precision: Precision, config: Mapping[str, Any]) -> Packed | None:
    """Return how a model of this config would be stored for a precision that reads one form only; None if it cannot be.

    In groups as nearly all are published, and in a form of one architecture only for that.
    """
    title, family = precision.stored or "", family_of(config)
    name = title.partition(" ")[0]
    of_family = family is not None and family.method == name
    method = METHODS.get(name) or OWN.get(name)
    if method is None or layout_name(name, {}) not in LAYOUTS or method.only_of not in (None, config.get("model_type")):
        return None
    group, bits = method.group, re.search(r"(\d+)-bit", title)
    return Packed(
        title=f"{title}, groups of {group}" if group else title,
        name=family.model_type if family is not None and of_family else name,
        bits=int(bits[1]) if bits else method.bits,
        group=group,
        stored_by=name,
    )


def config_in(form: Packed, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model as it would be if its weights were stored in a form: by its family's keys, or by settings."""
    family = family_of(config)
    if form.own and family is not None:
        grouped = {family.group_key: form.group} if family.group_key else {}
        return {**config, family.bits_key: form.bits, **grouped}
    said = {"quant_method": form.name, "bits": form.bits, "group_size": form.group or -1}
    return {**config, "quantization_config": {**said, **(form.method.writes if form.method else {})}}


def describe_quantization(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str | None:
    """Say in a few words how the stored weights are quantized: "gptq 4-bit, groups of 128"; None if they are not."""
    tensors = tuple(tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes:
        from harness.checkpoint.formats.gguf_header import BLOCK_TYPES

        if blocks := sorted(dtypes & BLOCK_TYPES):
            return f"{GGUF.name} " + ", ".join(blocks)
    settings = settings_of(config)
    if settings is not None:
        name = method_name(settings)
        row = METHODS.get(name)
        method = (row.written if row is not None else None) or name
        words = [method if method.isprintable() and 0 < len(method) <= 40 else "unknown method"]
        words += [row.variant(settings)] if row is not None and row.variant is not None else []
        return _sentence(words, bits_in(settings), group_in(settings))
    if tensors_tell(config):
        bits = first_packed(tensors)[1] if tensors else bits_said(config)
        return _sentence([MOSS.method], bits, config.get(MOSS.group_key, MOSS.group)) if bits else None
    if believable_bits(config.get(CHATGLM.bits_key)):
        return _sentence([CHATGLM.method], config[CHATGLM.bits_key], None)
    return None


def tensors_tell(config: Mapping[str, Any]) -> bool:
    """Say whether shapes decide the bits of packed weights, as those of MOSS: one of its published configs is wrong."""
    family = family_of(config)
    return settings_of(config) is None and ((family is not None and family.shapes_decide_bits) or bits_said(config) > 0)


def bits_said(config: Mapping[str, Any]) -> int:
    """Return the bits that a config like MOSS's says its weights are packed in; 0 if it says none, or 32 as of float16."""
    bits = believable_bits(config.get(MOSS.bits_key))
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
    return believable_bits(zeros[1] * 32 // scales[1]) if len(zeros) == len(scales) == 2 and scales[1] else 0


def weights_in(tensor: StoredTensor, shapes: Mapping[str, Sides], config: Mapping[str, Any]) -> int:
    """Return how many of the model's weights a stored tensor stands for.

    Buffers and what only helps to unpack count 0; packed integers count the weights inside them. `shapes` are those of all
    tensors of the checkpoint: a packed tensor is known by what stands beside it.
    """
    name, module, elements = tensor.name, tensor.name.rpartition(".")[0], math.prod(tensor.shape)
    settings = settings_of(config) or {}
    method, said = method_name(settings), bits_in(settings) or believable_bits(config.get(MOSS.bits_key)) or 4
    scales = method in METHODS and METHODS[method].blocks and name.endswith(FP8_SCALES)
    if scales or is_beside(name) or tensor.dtype == "bool" or (_ATTENTION_MASK.search(name) and len(tensor.shape) == 4):
        return 0
    if name.endswith(PACKED_SUFFIXES) and tensor.dtype == "int32":
        return elements * 32 // (_bits_of(module, shapes) or bits_of(settings, module) or said)
    if f"{name}.absmax" in shapes:  # bitsandbytes' 4 bits, in whichever integers or floats
        return elements * DTYPE_BITS.get(tensor.dtype, 8) // 4
    if f"{module}.scales" in shapes and (tensor.dtype == "uint32" or name.endswith(".biases")):  # Metal's and MLX's
        return 0 if name.endswith(".biases") else elements * 32 // (bits_of(settings, module) or said)
    if name.endswith(".codes") and f"{name.removesuffix('.codes')}.codebooks" in shapes:  # AQLM: one of each book for a vector
        books, _, *vector = shapes[f"{name.removesuffix('.codes')}.codebooks"]
        return elements * math.prod(vector) // max(books, 1)
    if method in METHODS and METHODS[method].in_words and f"{name}_scale" in shapes and "float" not in tensor.dtype:
        return elements * DTYPE_BITS.get(tensor.dtype, 8) // (bits_in(settings) or METHODS[method].bits)
    if name.endswith((".W_q", ".weight._data._data")) or (f"{module}.W_q" in shapes and not name.endswith(".bias")):
        return elements * 8 // said if name.endswith((".W_q", "._data")) else 0  # HQQ's, and optimum-quanto's of less than 8 bits
    if "._weight_" in name and name.endswith(TORCHAO_PARTS):
        return 0
    if name.endswith("._weight_qdata") and "int4" in torchao.config_class(settings).casefold():
        return elements * DTYPE_BITS.get(tensor.dtype, 8) // 4
    halved = shapes.get(f"{name}_scale", ())[:1] == tuple(2 * side for side in tensor.shape[:1]) != ()  # ModelOpt's W4A16
    beside = f"{name}_scale_2" in shapes or name.endswith(("_blocks", ".weight_packed"))
    nibbles = (tensor.dtype == "uint8" and (halved or beside)) or (
        tensor.dtype == "int8" and f"{name}_scale" in shapes and config.get(CHATGLM.bits_key) == 4
    )
    return elements * 2 if nibbles else elements


def _sentence(words: list[str], bits: int, group: Any) -> str:
    words += [f"{bits}-bit"] if bits else []
    grouped = f", groups of {group}" if type(group) is int and 0 < group < 1 << 20 else ""
    return " ".join(words) + grouped
