"""PRECISIONS: how weights can be stored in memory, widest first. One row gives option, gate, arguments of the loader and check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from harness.core.quantizers import SCHEMES
from harness.core.records import Record

# What `--precision` takes for every row.
ALL = "all"


class Config(Record, frozen=True, kw_only=True):
    """A `quantization_config` that transformers takes as objects only: the lines that import them, and the expression."""

    imports: tuple[str, ...]
    expression: str


class Precision(Record, frozen=True, kw_only=True):
    """One row of the table: how the weights are stored in memory, how transformers is asked for it, and what it excludes."""

    name: str
    title: str
    bits: float  #: bits per weight, scales included
    dtype: str  #: the dtype that transformers is asked for
    linear_dtype: str  #: what Linear weights must be after loading: a dtype, or a scheme (`Loaded.linear_dtype_bytes`)
    quality_kept: float  #: share of the answers that stay right, as a rule of thumb
    default: bool = False  #: in the matrix unless the user names others
    dtype_before_cc80: str | None = None  #: the dtype on GPUs without bfloat16
    dtype_in_ram: str | None = None  #: the dtype where a processor multiplies, where it differs
    casts_beside_gpu: bool = False  #: ... but not where torch sees a GPU: transformers makes `dtype` of it
    quantization: Mapping[str, Any] | Config | None = None  #: the `quantization_config`
    quantization_on_cpu: Config | None = None  #: the same without a GPU, where it differs
    scheme: str | None = None  #: the row of `core.quantizers` that sizes what is quantized while loading
    scheme_on_cpu: str | None = None  #: the same without a GPU, where it differs
    needs: tuple[str, ...] = ()  #: modules that must be importable
    extra: str | None = None  #: the extra of this package that installs them
    min_compute_capability: float = 0.0
    incompatible: Mapping[str, str] = {}  #: trait of a placement -> why this precision cannot be loaded that way
    off_gpu: Mapping[str, Any] | None = None  #: more of the config if an explicit map has parts off the GPUs, which stay 16-bit
    unsupported: str | None = None  #: why it cannot be loaded at all
    stored: str | None = None  #: how the description of a checkpoint begins that is stored so (`quantization.describe`)
    requires_checkpoint: str | None = None  #: the form of checkpoint that this row reads, if it makes nothing of others
    unpacks: bool = False  #: transformers makes 16-bit weights of such a checkpoint as well

    @property
    def quantizes(self) -> bool:
        """Whether it quantizes 16-bit weights while loading."""
        return self.quantization is not None and self.requires_checkpoint is None

    @property
    def is_traceable(self) -> bool:
        """Whether what its kernels allocate is known, so that a trace of it can be made (`harness.worker.trace.kernels`)."""
        known = self.quantization is None or (self.scheme is not None and SCHEMES[self.scheme].traced)
        return known and self.requires_checkpoint in (None, *_TRACED_FORMS)

    @property
    def is_packed_for_cards(self) -> bool:
        """Whether every kind of card has kernels of its own for it, so that a trace holds for one kind."""
        return self.requires_checkpoint in _TRACED_FORMS

    def dtype_on(self, compute_capability: str | None) -> str:
        """Return the dtype to ask for on a GPU of this compute capability (None: no GPU)."""
        old = compute_capability is not None and float(compute_capability) < 8.0
        return self.dtype_before_cc80 if old and self.dtype_before_cc80 else self.dtype

    def dtype_on_cpu(self, *, beside_gpu: bool) -> str:
        """Return the dtype to ask for where a processor multiplies, in a machine with a GPU or without one."""
        return self.dtype if self.dtype_in_ram is None or (beside_gpu and self.casts_beside_gpu) else self.dtype_in_ram


# Forms of checkpoints whose kernels' memory is (`harness.core.methods.kernels`).
_TRACED_FORMS = ("GPTQ", "AWQ", "MXFP4")
_DISPATCHES = "load_checkpoint_and_dispatch loads weights as they are stored and does not quantize"
_ALONE = "tensor parallelism is untested with these weights: use bf16 or fp16"
_BNB_INCOMPATIBLE = {
    "offloads_to_cpu": "transformers leaves parts of a bitsandbytes model off the GPU by an explicit device_map alone, in 16 bits "
    '("Some modules are dispatched on the CPU or the disk")',
    "parallel": "transformers 5.23 cannot split bitsandbytes weights over processes: the parts lose their quantization state",
    "dispatches": _DISPATCHES,
}
# "fp32" is history: transformers 5.23 leaves every module that an explicit map has on the CPU or the disk in the dtype asked for,
# in 4 bits as in 8. Of device_map="auto" it quantizes them all the same, and generating fails.
_BNB_OFF_GPU = {"llm_int8_enable_fp32_cpu_offload": True}
_QUANTO_INCOMPATIBLE = {
    "offloads_to_cpu": "transformers does not offload quanto weights from a GPU to the CPU, nor to disk at all "
    '("a device_map that contains a CPU or disk device")',
    "dispatches": _DISPATCHES,
    "parallel": _ALONE,
}
_TORCHAO_OFFLOADS = "transformers moves weights to a GPU for torchao to quantize, and offloads none of them"
_STORED_INCOMPATIBLE = {
    "dispatches": "load_checkpoint_and_dispatch builds the model without its packed modules",
    "parallel": _ALONE,
}


def _unpacks_in_ram(title: str) -> dict[str, str]:
    return {"ram": f"transformers unpacks {title} on a processor: use --precision bf16, fp16 or fp32", **_STORED_INCOMPATIBLE}


def _bitsandbytes(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", **settings}


# What the 4-bit rows of bitsandbytes share.
_BNB_4BIT: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "dtype_before_cc80": "float16",
    "needs": ("bitsandbytes",),
    "min_compute_capability": 6.0,
    "incompatible": _BNB_INCOMPATIBLE,
    "off_gpu": _BNB_OFF_GPU,
}
# What the rows of torchao share.
_TORCHAO: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "needs": ("torchao",),
    "extra": "torchao",
    "min_compute_capability": 8.0,
    "incompatible": {"dispatches": _DISPATCHES, "offloads": _TORCHAO_OFFLOADS, "parallel": _ALONE},
}


def _torchao_config(made: str) -> Config:
    kind = made.partition("(")[0]
    return Config(
        imports=(f"from torchao.quantization import {kind}", "from transformers import TorchAoConfig"),
        expression=f"TorchAoConfig({made})",
    )


def _quanto(bits: int, width: float, quality_kept: float) -> Precision:
    return Precision(
        name=f"quanto-int{bits}",
        title=f"{bits}-bit, optimum-quanto",
        bits=width,
        dtype="bfloat16",
        dtype_before_cc80="float16",
        linear_dtype=f"qint{bits}",
        quality_kept=quality_kept,
        quantization={"quant_method": "quanto", "weights": f"int{bits}"},
        scheme=f"quanto-int{bits}",
        needs=("optimum.quanto",),
        extra="quanto",
        incompatible=_QUANTO_INCOMPATIBLE,
    )


def _by_gptqmodel(title: str, quality_kept: float, **more: Any) -> Precision:
    width, method = title.split("-bit ")
    bits = int(width)
    return Precision(
        name=f"{method.lower()}-int{bits}",
        title=title,
        bits=bits + (16 + bits) / 128,  # groups of 128; each checkpoint says its own
        dtype="float16",
        dtype_in_ram="bfloat16",
        linear_dtype="int32",
        quality_kept=quality_kept,
        extra="gptq",
        incompatible=_STORED_INCOMPATIBLE,
        stored=f"{method.lower()} {bits}-bit",
        requires_checkpoint=method,
        **more,
    )


def _chatglm(bits: int, quality_kept: float) -> Precision:
    return Precision(
        name=f"chatglm-int{bits}",
        title=f"{bits}-bit, ChatGLM-6B format",
        bits=bits,
        dtype="float16",
        linear_dtype="int8",
        quality_kept=quality_kept,
        incompatible=_STORED_INCOMPATIBLE,
        stored=f"chatglm {bits}-bit",
        requires_checkpoint=f"ChatGLM-6B int{bits}",
    )


# torchao's only 4-bit format for CPUs.
_TORCHAO_INT4_ON_CPU = Config(
    imports=(
        "from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig",
        "from transformers import TorchAoConfig",
    ),
    expression="TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=64))",
)

_ROWS = (
    Precision(name="fp32", title="32-bit float", bits=32, dtype="float32", linear_dtype="float32", quality_kept=0.99, default=True),
    Precision(name="bf16", title="bfloat16", bits=16, dtype="bfloat16", linear_dtype="bfloat16", quality_kept=1.0, default=True),
    Precision(
        name="fp16", title="16-bit float", bits=16, dtype="float16", linear_dtype="float16", quality_kept=0.995, default=True
    ),
    _by_gptqmodel("8-bit GPTQ", quality_kept=0.98, needs=("gptqmodel", "optimum")),
    Precision(
        name="int8",
        title="8-bit, bitsandbytes LLM.int8",
        bits=8,
        # LLM.int8 computes in float16 and casts anything else at every layer, with a warning each.
        dtype="float16",
        linear_dtype="int8",
        quality_kept=0.97,
        default=True,
        quantization=_bitsandbytes(load_in_8bit=True),
        scheme="int8",
        needs=("bitsandbytes",),
        min_compute_capability=7.5,
        incompatible=_BNB_INCOMPATIBLE,
        off_gpu=_BNB_OFF_GPU,
        stored="bitsandbytes 8-bit",
    ),
    Precision(
        name="torchao-int8",
        title="8-bit, torchao, weight-only",
        bits=8,
        linear_dtype="int8",
        quality_kept=0.97,
        quantization=_torchao_config("Int8WeightOnlyConfig()"),
        scheme="torchao-int8",
        stored="torchao Int8WeightOnlyConfig",
        **_TORCHAO,
    ),
    Precision(
        name="torchao-int8-dynamic",
        title="8-bit, torchao, weights and activations",
        bits=8,
        linear_dtype="int8 dynamic",
        quality_kept=0.95,
        quantization=_torchao_config("Int8DynamicActivationInt8WeightConfig()"),
        scheme="torchao-int8-dynamic",
        stored="torchao Int8DynamicActivationInt8WeightConfig",
        **_TORCHAO,
    ),
    _quanto(8, 8, quality_kept=0.97),
    Precision(
        name="fp8",
        title="8-bit float, blocks of 128 x 128",
        bits=8,
        dtype="bfloat16",
        linear_dtype="float8_e4m3fn",
        quality_kept=0.98,
        quantization={"quant_method": "fp8"},
        scheme="fp8",
        min_compute_capability=8.9,
        incompatible={
            "ram": 'transformers quantizes to fp8 on a GPU only ("No GPU or XPU found")',
            "offloads_to_cpu": "transformers does not quantize to fp8 when it offloads from a GPU "
            '("a device_map that contains a cpu/disk device")',
            "dispatches": _DISPATCHES,
            "parallel": _ALONE,
        },
        stored="fp8",
        unpacks=True,
    ),
    _chatglm(8, quality_kept=0.97),
    Precision(
        name="mxfp8",
        title="8-bit float, groups of 32 (MXFP8)",
        bits=8,
        dtype="bfloat16",
        linear_dtype="float8_e4m3fn",
        quality_kept=0.98,
        min_compute_capability=8.9,
        incompatible=_unpacks_in_ram("MXFP8"),
        stored="mxfp8",
        requires_checkpoint="MXFP8",
        unpacks=True,
    ),
    Precision(
        name="int4",
        title="4-bit, bitsandbytes nf4",
        bits=4.5,
        linear_dtype="nf4",
        quality_kept=0.85,
        default=True,
        quantization=_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        scheme="int4",
        stored="bitsandbytes 4-bit nf4",
        **_BNB_4BIT,
    ),
    Precision(
        name="fp4",
        title="4-bit, bitsandbytes fp4",
        bits=4.5,
        linear_dtype="fp4",
        quality_kept=0.78,
        quantization=_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        scheme="fp4",
        stored="bitsandbytes 4-bit fp4",
        **_BNB_4BIT,
    ),
    Precision(
        name="gguf",
        title="GGUF, kept packed",
        bits=4.5,  # of a file of Q4; each says its own
        # ggml's kernels compute in float32 and would cast anything else at every Linear.
        dtype="float32",
        linear_dtype="uint8",
        quality_kept=0.9,
        quantization={"quant_method": "gguf"},
        needs=("kernels",),
        extra="gguf",
        min_compute_capability=7.5,
        incompatible={
            "ram": "transformers runs packed GGUF on GPUs only and unpacks it on the CPU: use --precision bf16, fp16 or fp32",
        },
        stored="gguf",
        requires_checkpoint="GGUF",
        unpacks=True,
    ),
    Precision(
        name="hqq-int4",
        title="4-bit HQQ",
        bits=4.5,
        dtype="bfloat16",
        linear_dtype="uint8",
        quality_kept=0.85,
        quantization={"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
        unsupported='transformers 5 cannot quantize to HQQ while loading ("not available yet and will be supported soon")',
        stored="hqq",
    ),
    Precision(
        name="torchao-int4",
        title="4-bit, torchao, groups of 64",
        bits=4.5,
        linear_dtype="int4",
        quality_kept=0.85,
        quantization_on_cpu=_TORCHAO_INT4_ON_CPU,
        quantization=_torchao_config('Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")'),
        scheme="torchao-int4",
        scheme_on_cpu="torchao-int4-on-cpu",
        stored="torchao Int4WeightOnlyConfig",
        **_TORCHAO,
    ),
    _quanto(4, 4.25, quality_kept=0.85),
    Precision(
        name="mxfp4",
        title="4-bit float experts, groups of 32 (MXFP4)",
        bits=4.25,
        dtype="bfloat16",
        # Its experts alone are packed; what is Linear stays in 16 bits.
        linear_dtype="bfloat16",
        quality_kept=0.9,
        needs=("kernels", "triton"),
        min_compute_capability=7.5,
        incompatible=_unpacks_in_ram("MXFP4"),
        stored="mxfp4",
        requires_checkpoint="MXFP4",
        unpacks=True,
    ),
    _by_gptqmodel("4-bit GPTQ", quality_kept=0.88, needs=("gptqmodel", "optimum")),
    _by_gptqmodel("4-bit AWQ", quality_kept=0.88, needs=("gptqmodel",), casts_beside_gpu=True),
    Precision(
        name="nf4-dq",
        title="4-bit, bitsandbytes nf4, double quantization",
        bits=4.127,
        linear_dtype="nf4 nested",
        quality_kept=0.85,
        quantization=_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        scheme="nf4-dq",
        stored="bitsandbytes 4-bit nf4, nested",
        **_BNB_4BIT,
    ),
    _chatglm(4, quality_kept=0.85),
)

PRECISIONS: Mapping[str, Precision] = {row.name: row for row in _ROWS}
DEFAULT_PRECISIONS = tuple(name for name, row in PRECISIONS.items() if row.default)


@lru_cache(maxsize=64)  # every case asks for that of its model
def row_of(stored: str) -> Precision | None:
    """Return the row of a checkpoint that is already quantized, by its description (`quantization.describe`), or None."""
    rows = [row for row in _ROWS if row.stored is not None and stored.startswith(row.stored)]
    return max(rows, key=lambda row: len(row.stored or ""), default=None)


def defaults(stored: str | None, among: Iterable[str] = DEFAULT_PRECISIONS) -> list[str]:
    """Return the precisions of the matrix unless the user names others: `among`, or the format of a quantized checkpoint.

    What transformers can unpack is unpacked as well.
    """
    plain = [name for name in among if not PRECISIONS[name].quantizes]
    own = row_of(stored) if stored is not None else None
    if own is None:
        return list(among) if stored is None else plain
    return [*plain, own.name] if own.unpacks else [own.name]
