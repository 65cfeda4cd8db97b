"""METHODS: the quantization methods of transformers, and what each does with weights that are stored so; FOREIGN: some it lacks.

What is said here of transformers 5.24 is read in `transformers.quantizers` and held against it by tests/core/test_methods.py: a
release that adds a method, drops one, or treats it otherwise makes a test fail.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from harness.core.methods import compressed, torchao
from harness.core.precisions import Config
from harness.core.records import Record


class Method(Record, frozen=True, kw_only=True):
    """One row of the table: what transformers does with a checkpoint whose weights are stored by a method."""

    name: str  #: the key of transformers' AUTO_QUANTIZER_MAPPING
    title: str
    needs: tuple[str, ...] = ()  #: modules that it cannot be loaded without (REQUIREMENTS)
    packs_on: frozenset[str] = frozenset(("gpu", "cpu"))  #: kinds of device that weights stay packed on
    packs_with: tuple[str, ...] = ()  #: modules that it needs for that: without them it unpacks
    packs_from: float = 0.0  #: the compute capability from which on they stay packed
    unpacked: Config | None = None  #: the `quantization_config` that asks for 16- or 32-bit weights; None: it keeps what is stored
    dtypes: tuple[str, ...] = ()  #: the only dtypes that the rest of the model may be in; empty: any
    counted: float | None = None  #: bytes of an element when a device map is inferred; None: those of the tensors as replaced
    margin: bool = False  #: a tenth of the memory is kept free when a device map is inferred
    refuses: Mapping[str, str] = {}  #: trait of a placement -> why weights that are stored so cannot be loaded that way
    copies: bool = False  #: every product makes a 16-bit copy of its weight
    held: str = "uint8"  #: the dtype that Linear weights have in memory, where the headers of the files were not read
    floats: Literal["stored", "asked", "float32"] = "stored"  #: the dtype that scales and codebooks have in memory
    cpu_dtypes: tuple[str, ...] = ()  #: the only dtypes that the rest may be in on a processor; empty: any
    cpu_lacks: Mapping[str, str] = {}  #: end of the format that weights are packed in -> why a processor has no layers
    # Says from a config, and the classes of tensors that a pickle holds, whether the rest of the model has no dtype but its own.
    binds: Callable[[Mapping[str, Any], Collection[str]], bool] | None = None
    bits: int = 4  #: of a weight, where the config does not say
    packs_linears: bool = True  #: Linear weights are packed
    packs_experts: bool = False  #: stacked experts of a mixture are
    stacks_pass: bool = False  #: a stack of experts that is unpacked passes through larger integers
    counts_scales: bool = True  #: scales count when a device map is inferred; they may come into their module afterward
    wide_bias: bool = False  #: the biases of packed experts are in float32
    blocks: bool = False  #: a scale is for a block of outputs x inputs
    group: int = 0  #: inputs that share a scale in nearly all that are published; 0: the method has no groups of its own
    only_of: str | None = None  #: the only `model_type` that is stored so
    keeps_dtype: bool = False  #: what is not packed keeps the dtype of the files, whichever is asked for; only biases take that
    on_cards: bool = False  #: a row of PACKED_KERNELS multiplies the weights on a card
    layout: str | None = None  #: whose row of LAYOUTS its files follow, where it is another method's
    writes: Mapping[str, Any] = {}  #: what its config says beside bits and groups, of a checkpoint that is made here
    plain_when: Mapping[str, tuple[Any, ...]] = {}  #: key of the config -> values (None: no word) of 16-bit weights in the files
    spares: tuple[str, ...] = ()  #: parts of its layout that its files need not hold
    whole_blocks: str | None = None  #: why no Linear may be left in 16 bits, but those that the config keeps so
    scales_decide: bool = False  #: unpacked weights are in the dtype of their scales, whichever is asked for
    unsupported: str | None = None  #: why nothing that is stored so can be loaded
    faults: Callable[[Mapping[str, Any]], str | None] | None = None  #: says why its package does not take a config
    undivided: Callable[[Mapping[str, Any]], str | None] | None = None  #: says why no inferred map can divide the weights
    casts: Callable[[str], bool] | None = None  #: says whether scales of a class that a pickle holds take the dtype asked for
    # Says from a config, and from whether the files hold weights in a format, what becomes of them on loading.
    loading: Callable[[Mapping[str, Any], Callable[[str], bool] | None], compressed.FormatLoading] | None = None

    def is_plain(self, settings: Mapping[str, Any]) -> bool:
        """Say whether a config means 16-bit weights in the files, with scales beside them that nothing is multiplied by yet."""
        return any(settings.get(key) in values for key, values in self.plain_when.items())

    def unpacks_on(self, kind: str, capability: float | None) -> bool:
        """Say whether weights become 16-bit for lack of hardware on a "cpu" or "gpu" of this compute capability (None: unknown)."""
        old = kind == "gpu" and capability is not None and capability < self.packs_from
        return self.unpacked is not None and (kind not in self.packs_on or old)


class Foreign(Record, frozen=True, kw_only=True):
    """A method that transformers does not know, and what reads it."""

    title: str
    readers: str


def _dequantize(name: str) -> Config:
    return Config(imports=(f"from transformers import {name}",), expression=f"{name}(dequantize=True)")


# Where a config keeps that of its text model (transformers' get_text_config).
TEXT_CONFIGS = ("decoder", "generator", "text_config")
_GPU = frozenset(("gpu",))
_DISPATCHES = "load_checkpoint_and_dispatch builds the model without its packed modules"
_ALONE = "tensor parallelism is untested with these weights: use bf16 or fp16"
_STORED: Mapping[str, str] = {"dispatches": _DISPATCHES, "parallel": _ALONE}
_NO_GPU = "transformers runs {} on GPUs only"
_OFFLOADS = "transformers loads no {} weights with a device_map that contains a CPU or disk device"


def _on_gpus(title: str) -> dict[str, str]:
    return {**_STORED, "ram": _NO_GPU.format(title), "offloads_to_cpu": _OFFLOADS.format(title)}


_BNB_REFUSES = {
    **_STORED,
    "offloads_to_cpu": "transformers does not offload bitsandbytes weights from a GPU to the CPU, nor to disk at all "
    '("Some modules are dispatched on the CPU or the disk")',
    "parallel": "transformers 5.23 cannot split bitsandbytes weights over processes: the parts lose their quantization state",
}
_FP8 = Method(
    name="fp8",
    title="FP8 in blocks",
    packs_on=_GPU,
    packs_from=8.9,
    unpacked=_dequantize("FineGrainedFP8Config"),
    refuses=_STORED,
    held="float8_e4m3fn",
    bits=8,
    blocks=True,
    packs_experts=True,
)


def _derived(row: Method, **changed: Any) -> Method:
    fields = {name: getattr(row, name) for name in row.__struct_fields__}
    return Method(**(fields | changed))


_NO_LAYER = "gptqmodel has no layer for {}'s {} packing on a processor: take one that is packed as {}, or a GPU"
_AWQ_ON_CARDS = {version: _NO_LAYER.format("AWQ", version, "gemm") for version in ("gemv", "gemv_fast", "llm-awq")}
_GPTQ_ON_CARDS = {version: _NO_LAYER.format("GPTQ", version, "gptq") for version in ("marlin", "bitblas")}
_ROWS = (
    Method(
        name="awq",
        title="AWQ",
        needs=("gptqmodel",),
        dtypes=("float16",),
        refuses=_STORED,
        held="int32",
        group=128,
        on_cards=True,
        cpu_lacks=_AWQ_ON_CARDS,
        whole_blocks="transformers packs all that 'modules_to_not_convert' names by no beginning or end: write whole names in it",
        writes={"zero_point": True, "version": "gemm"},
    ),
    Method(
        name="bitsandbytes_4bit",
        title="bitsandbytes 4-bit",
        needs=("bitsandbytes",),
        counted=0.5,
        margin=True,
        refuses=_BNB_REFUSES,
        keeps_dtype=True,
    ),
    Method(
        name="bitsandbytes_8bit",
        title="bitsandbytes 8-bit",
        needs=("bitsandbytes",),
        counted=1,
        margin=True,
        refuses=_BNB_REFUSES,
        keeps_dtype=True,
        held="int8",
        bits=8,
    ),
    Method(
        name="gptq",
        title="GPTQ",
        needs=("optimum", "gptqmodel"),
        dtypes=("float16",),
        refuses=_STORED,
        held="int32",
        group=128,
        on_cards=True,
        cpu_lacks=_GPTQ_ON_CARDS,
        whole_blocks="optimum packs every Linear of the blocks, whatever 'dynamic' says: use the gptqmodel package by itself",
        writes={"sym": True, "desc_act": False},
    ),
    Method(
        name="aqlm",
        title="AQLM",
        needs=("aqlm",),
        refuses=_STORED,
        held="int16",
        bits=2,
        floats="asked",
        cpu_dtypes=("float32",),
    ),
    Method(
        name="quanto",
        title="optimum-quanto",
        needs=("optimum.quanto",),
        counted=1,
        margin=True,
        unsupported="transformers saves no quanto weights and loads none: quantize the 16-bit checkpoint while loading, "
        "--precision quanto-int8 or quanto-int4, or load these by optimum-quanto's own QuantizedModelForCausalLM",
    ),
    Method(name="quark", title="Quark", needs=("quark",), refuses=_STORED, floats="float32", copies=True),
    Method(name="fouroversix", title="Four Over Six", needs=("fouroversix",), refuses=_STORED),
    Method(
        name="fp_quant",
        title="FP-Quant",
        needs=("fp_quant", "qutlass"),
        packs_on=_GPU,
        packs_from=10.0,
        dtypes=("bfloat16",),
        refuses=_on_gpus("FP-Quant"),
    ),
    Method(name="eetq", title="EETQ", needs=("kernels",), packs_on=_GPU, refuses=_on_gpus("EETQ"), held="int8", bits=8),
    Method(
        name="higgs",
        title="HIGGS",
        needs=("flute", "fast_hadamard_transform"),
        packs_on=_GPU,
        dtypes=("float16", "bfloat16"),
        refuses=_on_gpus("HIGGS"),
    ),
    Method(
        name="hqq",
        title="HQQ",
        needs=("hqq",),
        unsupported="transformers 5 fills no HQQ layers from files (it leaves out their W_q): use the 16-bit checkpoint with "
        "--precision int4, or the hqq package by itself",
    ),
    Method(
        name="compressed-tensors",
        title="compressed-tensors",
        needs=("compressed_tensors",),
        packs_on=frozenset(),  # until the first forward pass, which unpacks all of it
        unpacked=_dequantize("CompressedTensorsConfig"),
        refuses=_STORED,
        plain_when={"quantization_status": (None, "initialized", "calibration", "frozen", "decompressed")},
        floats="asked",
        faults=compressed.settings_refusal,
        loading=compressed.loading,
    ),
    Method(
        name="fbgemm_fp8",
        title="FBGEMM FP8",
        needs=("fbgemm_gpu",),
        packs_on=_GPU,
        packs_from=9.0,
        dtypes=("bfloat16",),
        counted=1,
        refuses={**_STORED, "ram": _NO_GPU.format("FBGEMM FP8")},
        held="float8_e4m3fn",
        bits=8,
    ),
    Method(
        name="torchao",
        title="torchao",
        needs=("torchao",),
        counted=1,
        margin=True,
        bits=8,
        refuses={**_STORED, "offloads": 'transformers does no disk offload with stored torchao weights ("not supported yet")'},
        held="int8",
        binds=torchao.binds,
        casts=torchao.casts,
        undivided=torchao.undivided,
    ),
    Method(
        name="bitnet",
        title="BitNet",
        margin=True,
        refuses={**_STORED, "offloads_to_cpu": _OFFLOADS.format("BitNet")},
        bits=2,
        copies=True,
        plain_when={"quantization_mode": ("online",)},
    ),
    Method(
        name="vptq",
        title="VPTQ",
        needs=("vptq",),
        packs_on=_GPU,
        unsupported="transformers 5 puts no VPTQ layer into a model (it looks for nested modules at the top, a KeyError): "
        "use the vptq package by itself, with transformers 4",
    ),
    Method(
        name="spqr",
        title="SpQR",
        needs=("spqr_quant",),
        packs_on=_GPU,
        dtypes=("float16",),
        refuses={**_STORED, "ram": _NO_GPU.format("SpQR")},
    ),
    _FP8,
    Method(
        name="gguf",
        title="GGUF",
        needs=("gguf",),
        packs_on=_GPU,
        packs_with=("kernels",),
        unpacked=Config(imports=(), expression='{"quant_method": "gguf", "dequantize": True}'),
        refuses={
            "dispatches": "load_checkpoint_and_dispatch does not read GGUF",
            "parallel": "a GGUF file is not shared among GPUs here: load a checkpoint in safetensors",
            "offloads": "transformers does not offload a GGUF to the disk: what it would put there stays in RAM",
        },
    ),
    Method(
        name="nvfp4",
        title="NVFP4",
        counted=0.5,
        unsupported='transformers 5 reads no stored NVFP4 ("Loading pre-quantized NVFP4 checkpoints is not supported yet"): '
        "vLLM and TensorRT-LLM do",
    ),
    _derived(_FP8, name="mxfp8", title="MXFP8", layout="fp8"),
    Method(
        name="auto-round",
        title="AutoRound",
        needs=("auto_round",),
        refuses=_STORED,
        held="int32",
        spares=(".g_idx",),
        cpu_lacks={
            "awq": "auto-round has no layer for its AWQ packing on a processor and fills one with random numbers: "
            "take a checkpoint in its own packing, or a GPU"
        },
    ),
    Method(
        name="mxfp4",
        title="MXFP4",
        packs_on=_GPU,  # on a processor only with use_kernels=True
        packs_with=("kernels", "triton"),
        packs_from=7.5,
        unpacked=_dequantize("Mxfp4Config"),
        refuses=_STORED,
        packs_linears=False,
        packs_experts=True,
        stacks_pass=True,
        only_of="gpt_oss",
        counts_scales=False,
        wide_bias=True,
    ),
    Method(
        name="metal",
        title="Metal affine",
        packs_on=frozenset(),  # but Apple's GPU
        unpacked=_dequantize("MetalConfig"),
        scales_decide=True,
        refuses=_STORED,
        held="uint32",
    ),
    Method(
        name="sinq",
        title="SINQ",
        needs=("sinq",),
        unsupported="transformers 5 leaves out what sinq 0.2 saves (the parts of its meta), and sinq's own loader multiplies "
        "float32 by bfloat16: use the 16-bit checkpoint with --precision int4",
    ),
    Method(name="gemma", title="Gemma's own", refuses=_STORED, copies=True),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
# What the layers of `harness.models` read, by the `model_type` of the family; no package does.
OWN: Mapping[str, Method] = {
    "chatglm": Method(name="chatglm", title="ChatGLM-6B's own", refuses=_STORED, held="int8", only_of="chatglm", copies=True),
    "moss": Method(name="moss", title="MOSS's GPTQ", refuses=_STORED, held="int32", copies=True),
}

# By the `quant_method` that they write; "" writes none.
_MODELOPT = Foreign(title="NVIDIA ModelOpt", readers="vLLM, SGLang and TensorRT-LLM")
FOREIGN: Mapping[str, Foreign] = {
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mixed"), _MODELOPT),
    "mlx": Foreign(title="MLX", readers="mlx-lm and LM Studio (on Apple silicon)"),
    "exl2": Foreign(title="ExLlamaV2", readers="exllamav2 and TabbyAPI"),
    "exl3": Foreign(title="ExLlamaV3", readers="exllamav3 and TabbyAPI"),
    "intel/auto-round": Foreign(title="an old AutoRound", readers="the auto-round package by itself"),
}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config says of quantization, where transformers looks: at the top, then in the config of the text model.

    MLX writes a key of its own, which transformers passes over.
    """
    places = (config, *(config.get(name) for name in TEXT_CONFIGS))
    for place in places:
        settings = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(settings, Mapping) and settings:
            return settings
    own = config.get("quantization")
    return {"quant_method": "mlx", **own} if isinstance(own, Mapping) and "bits" in own else None


def method_name(settings: Mapping[str, Any]) -> str:
    """Return the key of METHODS that transformers takes settings for; what it does not know as it is written, "" for nothing."""
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes_4bit" if settings.get("load_in_4bit") else "bitsandbytes_8bit"
    name = settings.get("quant_method")
    if name is None and "group_size" in settings and "bits" in settings:
        return "mlx"
    return name if isinstance(name, str) else ""


def foreign(name: str) -> str | None:
    """Say why transformers cannot load what is stored by a method that it does not know, and what can; None if it knows it."""
    if name in METHODS:
        return None
    if name == "bitsandbytes":
        return "its config says bitsandbytes, and neither load_in_4bit nor load_in_8bit: add the one that it is"
    known = FOREIGN.get(name)
    if known is not None:
        return f"transformers does not know the quantization method {name!r} of {known.title}: {known.readers} read it"
    what = f"the quantization method {name!r}" if name else "a quantization_config without a quant_method"
    return f"transformers does not know {what}: look for the loader that the model's page names, or for the 16-bit checkpoint"
