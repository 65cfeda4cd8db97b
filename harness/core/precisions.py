"""PRECISIONS: how weights can be held, widest first. One entry gives the option, the gate, the loader's arguments and the check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.core.records import Record

# What `--precision` takes for every row.
ALL = "all"


class Config(Record, frozen=True, kw_only=True):
    """A `quantization_config` that transformers takes as objects only: the lines that import them, and the expression."""

    imports: tuple[str, ...]
    expression: str


class Precision(Record, frozen=True, kw_only=True):
    """One row of the table.

    `usual`: it is in the matrix unless the user names others. `dtype` is what transformers is asked for, `dtype_before_cc80` the
    same on GPUs without bfloat16; `quantization` is its `quantization_config` and `quantization_on_cpu` the same without a GPU.
    `scheme` says how the cost model counts what is quantised on loading (`core.quantizers`). `holds` names the dtype that the
    weights of the Linear modules must have after loading, or their scheme where the dtype does not tell
    (`Loaded.linear_dtype_bytes`), else the precision did not take effect. `refuses` maps a trait of a placement to the reason why
    this precision cannot be loaded that way, and `never` says why it cannot be loaded at all. `keeps` is how much of the answers'
    worth it keeps, as a general rule. `off_gpu` is what its `quantization_config` needs as well where an explicit map
    has parts off the GPUs, which then are not quantised; None: it treats them like the others.

    `stored` is how the description of a checkpoint begins that is held this way already (`quantized.describe`). It runs as what it
    is, in this row alone; `only` names what it must be where the row makes nothing of other checkpoints. `needs` are modules, which
    `extra` of this package installs.
    """

    name: str
    title: str
    bits: float
    dtype: str
    holds: str
    keeps: float
    usual: bool = False
    dtype_before_cc80: str | None = None
    quantization: Mapping[str, Any] | Config | None = None
    quantization_on_cpu: Config | None = None
    scheme: str | None = None
    needs: tuple[str, ...] = ()
    extra: str | None = None
    min_compute_capability: float = 0.0
    refuses: Mapping[str, str] = {}
    off_gpu: Mapping[str, Any] | None = None
    never: str | None = None
    stored: str | None = None
    only: str | None = None

    @property
    def quantises(self) -> bool:
        """Whether it makes narrower weights of 16-bit ones while loading."""
        return self.quantization is not None and self.only is None

    def dtype_on(self, compute_capability: str | None) -> str:
        """Return the dtype to ask for on a GPU of this compute capability (None: no GPU)."""
        old = compute_capability is not None and float(compute_capability) < 8.0
        return self.dtype_before_cc80 if old and self.dtype_before_cc80 else self.dtype


# GGUF's names of the architectures whose blocks transformers 5.23 can keep (its `integrations.gguf`, GGUF_ARCHS).
PACKED_ARCHITECTURES = frozenset(("lfm2", "qwen35", "qwen35moe"))

_DISPATCHES = "load_checkpoint_and_dispatch places weights as they are stored and does not quantise them"
_ALONE = "nobody here has shared such weights among processes yet: use bf16 or fp16"
_BNB_REFUSES = {
    "spills": "transformers refuses bitsandbytes weights on the CPU or the disk beside a GPU, or on the disk at all "
    '("Some modules are dispatched on the CPU or the disk")',
    "parallel": "transformers 5.23 shares no bitsandbytes weights among processes: its tensors lose what they were quantised with",
    "dispatches": _DISPATCHES,
}
# "fp32" is history: transformers 5.23 leaves every module that an explicit map has on the CPU or the disk in the dtype asked for,
# in 4 bits as in 8. Of device_map="auto" it quantises them all the same, and generating fails.
_BNB_OFF_GPU = {"llm_int8_enable_fp32_cpu_offload": True}
_QUANTO_REFUSES = {
    "spills": "transformers refuses to quantise with quanto for the CPU beside a GPU, or for the disk "
    '("a device_map that contains a CPU or disk device")',
    "dispatches": _DISPATCHES,
    "parallel": _ALONE,
}
_TORCHAO_OFFLOADS = "transformers moves what torchao is to quantise for the CPU or the disk to a GPU first, and offloads none of it"
_STORED_REFUSES = {
    "dispatches": "load_checkpoint_and_dispatch builds the model without its packed modules",
    "parallel": _ALONE,
}


def _bitsandbytes(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", **settings}


def _nf4(
    name: str, title: str, bits: float, *, holds: str, stored: str, keeps: float, usual: bool = False, **more: Any
) -> Precision:
    """Return a row of bitsandbytes' 4 bits; `more` is what its config says beside that."""
    return Precision(
        name=name,
        title=title,
        bits=bits,
        dtype="bfloat16",
        dtype_before_cc80="float16",
        holds=holds,
        keeps=keeps,
        usual=usual,
        quantization=_bitsandbytes(load_in_4bit=True, **more),
        scheme=name,
        needs=("bitsandbytes",),
        min_compute_capability=6.0,
        refuses=_BNB_REFUSES,
        off_gpu=_BNB_OFF_GPU,
        stored=stored,
    )


def _torchao(name: str, title: str, bits: float, made: str, *, holds: str, keeps: float, on_cpu: Config | None = None) -> Precision:
    kind = made.partition("(")[0]
    return Precision(
        name=name,
        title=title,
        bits=bits,
        dtype="bfloat16",
        holds=holds,
        keeps=keeps,
        quantization=Config(
            imports=(f"from torchao.quantization import {kind}", "from transformers import TorchAoConfig"),
            expression=f"TorchAoConfig({made})",
        ),
        quantization_on_cpu=on_cpu,
        scheme=name,
        needs=("torchao",),
        extra="torchao",
        min_compute_capability=8.0,
        refuses={"dispatches": _DISPATCHES, "offloads": _TORCHAO_OFFLOADS, "parallel": _ALONE},
        stored=f"torchao {kind}",
    )


def _quanto(bits: int, width: float, keeps: float) -> Precision:
    return Precision(
        name=f"quanto-int{bits}",
        title=f"{bits}-bit, optimum-quanto",
        bits=width,
        dtype="bfloat16",
        dtype_before_cc80="float16",
        holds=f"qint{bits}",
        keeps=keeps,
        quantization={"quant_method": "quanto", "weights": f"int{bits}"},
        scheme=f"quanto-int{bits}",
        needs=("optimum.quanto",),
        extra="quanto",
        refuses=_QUANTO_REFUSES,
    )


def _gptq(bits: int, keeps: float) -> Precision:
    return Precision(
        name=f"gptq-int{bits}",
        title=f"{bits}-bit GPTQ",
        bits=bits + (16 + bits) / 128,  # groups of 128; each checkpoint says its own
        dtype="float16",
        holds="int32",
        keeps=keeps,
        needs=("gptqmodel", "optimum"),
        extra="gptq",
        refuses=_STORED_REFUSES,
        stored=f"gptq {bits}-bit",
        only="GPTQ",
    )


def _chatglm(bits: int, keeps: float) -> Precision:
    return Precision(
        name=f"chatglm-int{bits}",
        title=f"{bits}-bit, ChatGLM-6B's own",
        bits=bits,
        dtype="float16",
        holds="int8",
        keeps=keeps,
        refuses=_STORED_REFUSES,
        stored=f"chatglm {bits}-bit",
        only=f"ChatGLM-6B int{bits}",
    )


# torchao's only format of 4 bits for processors.
_TORCHAO_INT4_ON_CPU = Config(
    imports=(
        "from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig",
        "from transformers import TorchAoConfig",
    ),
    expression="TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=64))",
)

_ROWS = (
    Precision(name="fp32", title="32-bit float", bits=32, dtype="float32", holds="float32", keeps=0.99, usual=True),
    Precision(name="bf16", title="bfloat16", bits=16, dtype="bfloat16", holds="bfloat16", keeps=1.0, usual=True),
    Precision(name="fp16", title="16-bit float", bits=16, dtype="float16", holds="float16", keeps=0.995, usual=True),
    _gptq(8, keeps=0.98),
    Precision(
        name="int8",
        title="8-bit, bitsandbytes LLM.int8",
        bits=8,
        # LLM.int8 computes in float16 and casts anything else at every layer, with a warning each.
        dtype="float16",
        holds="int8",
        keeps=0.97,
        usual=True,
        quantization=_bitsandbytes(load_in_8bit=True),
        scheme="int8",
        needs=("bitsandbytes",),
        min_compute_capability=7.5,
        refuses=_BNB_REFUSES,
        off_gpu=_BNB_OFF_GPU,
        stored="bitsandbytes 8-bit",
    ),
    _torchao("torchao-int8", "8-bit, torchao, weights only", 8, "Int8WeightOnlyConfig()", holds="int8", keeps=0.97),
    _torchao(
        "torchao-int8-dynamic",
        "8-bit, torchao, activations too",
        8,
        "Int8DynamicActivationInt8WeightConfig()",
        holds="int8 dynamic",
        keeps=0.95,
    ),
    _quanto(8, 8, keeps=0.97),
    Precision(
        name="fp8",
        title="8-bit float, blocks of 128 x 128",
        bits=8,
        dtype="bfloat16",
        holds="float8_e4m3fn",
        keeps=0.98,
        quantization={"quant_method": "fp8"},
        scheme="fp8",
        min_compute_capability=8.9,
        refuses={
            "ram": 'transformers quantises to fp8 on a GPU alone ("No GPU or XPU found")',
            "spills": 'transformers refuses to quantise to fp8 beside a GPU ("a device_map that contains a cpu/disk device")',
            "dispatches": _DISPATCHES,
            "parallel": _ALONE,
        },
        stored="fp8",
    ),
    _chatglm(8, keeps=0.97),
    _nf4(
        "int4",
        "4-bit, bitsandbytes nf4",
        4.5,
        holds="nf4",
        stored="bitsandbytes 4-bit nf4",
        keeps=0.85,
        usual=True,
        bnb_4bit_quant_type="nf4",
    ),
    _nf4(
        "fp4", "4-bit, bitsandbytes fp4", 4.5, holds="fp4", stored="bitsandbytes 4-bit fp4", keeps=0.78, bnb_4bit_quant_type="fp4"
    ),
    Precision(
        name="gguf",
        title="GGUF, in its blocks",
        bits=4.5,  # of a file of Q4; each says its own
        # ggml's kernels compute in float32 and would cast anything else at every Linear.
        dtype="float32",
        holds="uint8",
        keeps=0.9,
        quantization={"quant_method": "gguf"},
        needs=("kernels",),
        extra="gguf",
        min_compute_capability=7.5,
        refuses={
            "ram": "transformers has kernels for packed GGUF on GPUs alone and unpacks it for the processor: load it with "
            "--precision bf16, fp16 or fp32",
        },
        stored="gguf",
        only="GGUF",
    ),
    Precision(
        name="hqq-int4",
        title="4-bit HQQ",
        bits=4.5,
        dtype="bfloat16",
        holds="uint8",
        keeps=0.85,
        quantization={"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
        never='transformers 5 has no HQQ on loading ("not available yet and will be supported soon")',
        stored="hqq",
    ),
    _torchao(
        "torchao-int4",
        "4-bit, torchao, groups of 64",
        4.5,
        'Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")',
        holds="int4",
        keeps=0.85,
        on_cpu=_TORCHAO_INT4_ON_CPU,
    ),
    _quanto(4, 4.25, keeps=0.85),
    _gptq(4, keeps=0.88),
    Precision(
        name="awq-int4",
        title="4-bit AWQ",
        bits=4.15625,
        dtype="float16",
        holds="int32",
        keeps=0.88,
        needs=("gptqmodel",),
        extra="gptq",
        refuses=_STORED_REFUSES,
        stored="awq 4-bit",
        only="AWQ",
    ),
    _nf4(
        "nf4-dq",
        "4-bit, bitsandbytes nf4, scales quantised too",
        4.127,
        holds="nf4 nested",
        stored="bitsandbytes 4-bit nf4, nested",
        keeps=0.85,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    ),
    _chatglm(4, keeps=0.85),
)

PRECISIONS: Mapping[str, Precision] = {row.name: row for row in _ROWS}
USUAL = tuple(name for name, row in PRECISIONS.items() if row.usual)


def row_of(stored: str) -> Precision | None:
    """Return the row that a checkpoint is, by the description of how it is quantised (`quantized.describe`), or None."""
    rows = [row for row in _ROWS if row.stored is not None and stored.startswith(row.stored)]
    return max(rows, key=lambda row: len(row.stored or ""), default=None)


def usual(stored: str | None, among: Iterable[str] = USUAL) -> list[str]:
    """Return what is in the matrix unless the user names others: `among`, or of a quantised checkpoint what it is.

    A GGUF file is unpacked as well.
    """
    plain = [name for name in among if not PRECISIONS[name].quantises]
    own = row_of(stored) if stored is not None else None
    if own is None:
        return list(among) if stored is None else plain
    return [*plain, own.name] if own.name == "gguf" else [own.name]
