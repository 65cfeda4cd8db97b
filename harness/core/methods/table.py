"""METHODS: the quantization methods of transformers, and what each does with weights that are stored so; FOREIGN: some it lacks.

What is said here of transformers 5.24 is read in `transformers.quantizers` and held against it by tests/core/test_methods.py: a
release that adds a method, drops one, or treats it otherwise makes a test fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.methods import compressed, settings, torchao
from harness.core.methods.config import bitsandbytes_type
from harness.core.methods.method import Foreign, Method
from harness.core.methods.scheme import awq_scheme, gptq_scheme
from harness.core.precisions import Config


def _dequantize(name: str) -> Config:
    return Config(imports=(f"from transformers import {name}",), expression=f"{name}(dequantize=True)")


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
    settings=settings.FP8,
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
        settings=settings.AWQ,
        title="AWQ",
        needs=("gptqmodel",),
        dtypes=("float16",),
        refuses=_STORED,
        held="int32",
        group=128,
        scheme=awq_scheme,
        formats=frozenset(("gemm",)),
        cpu_lacks=_AWQ_ON_CARDS,
        whole_blocks="transformers packs all that 'modules_to_not_convert' names by no beginning or end: write whole names in it",
        not_packed="'modules_to_not_convert' keeps it in 16 bits: take it out of there",
        writes={"zero_point": True, "version": "gemm"},
    ),
    Method(
        name="bitsandbytes_4bit",
        settings=settings.BITSANDBYTES,
        title="bitsandbytes 4-bit",
        written="bitsandbytes",
        variant=bitsandbytes_type,
        needs=("bitsandbytes",),
        formats=frozenset(("uint8",)),
        kept_as_made=True,
        counted=0.5,
        margin=True,
        refuses=_BNB_REFUSES,
        keeps_dtype=True,
    ),
    Method(
        name="bitsandbytes_8bit",
        settings=settings.BITSANDBYTES,
        title="bitsandbytes 8-bit",
        written="bitsandbytes",
        variant=bitsandbytes_type,
        needs=("bitsandbytes",),
        kept_as_made=True,
        counted=1,
        margin=True,
        refuses=_BNB_REFUSES,
        keeps_dtype=True,
        held="int8",
        bits=8,
    ),
    Method(
        name="gptq",
        settings=settings.GPTQ,
        title="GPTQ",
        needs=("optimum", "gptqmodel"),
        dtypes=("float16",),
        refuses=_STORED,
        held="int32",
        group=128,
        scheme=gptq_scheme,
        formats=frozenset(("gptq", "gptq_v2")),
        by_blocks=True,
        cpu_lacks=_GPTQ_ON_CARDS,
        whole_blocks="optimum packs every Linear of the blocks, whatever 'dynamic' says: use the gptqmodel package by itself",
        not_packed="optimum makes packed layers of torch's own Linear alone, in blocks that it knows by their names (model.layers, "
        "transformer.h and such) or by block_name_to_quantize: use the gptqmodel package by itself",
        writes={"sym": True, "desc_act": False},
    ),
    Method(
        name="aqlm",
        settings=settings.AQLM,
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
    Method(name="quark", title="Quark", needs=("quark",), in_words=True, refuses=_STORED, floats="float32", copies=True),
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
        settings=settings.HIGGS,
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
        tables=settings.PackedTables(("config_groups",), "takes no layer for packed and fills all that are with random numbers"),
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
        tables=settings.PackedTables(("quant_type",), "makes no config of the settings"),
        title="torchao",
        variant=torchao.config_class,
        counts_by_name=True,
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
        settings=settings.BITNET,
        title="BitNet",
        in_words=True,
        margin=True,
        refuses={**_STORED, "offloads_to_cpu": _OFFLOADS.format("BitNet")},
        bits=2,
        copies=True,
        plain_when={"quantization_mode": ("online",)},
    ),
    Method(
        name="vptq",
        tables=settings.PackedTables(
            ("config_for_layers", "shared_layer_config"), "knows the code books of no layer, and ends in an error"
        ),
        title="VPTQ",
        needs=("vptq",),
        packs_on=_GPU,
        unsupported="transformers 5 puts no VPTQ layer into a model (it looks for nested modules at the top, a KeyError): "
        "use the vptq package by itself, with transformers 4",
    ),
    Method(
        name="spqr",
        tables=settings.PackedTables(("shapes",), "knows the size of no packed layer, and ends in an error"),
        settings=settings.SPQR,
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
        settings=settings.AUTO_ROUND,
        title="AutoRound",
        needs=("auto_round",),
        refuses=_STORED,
        held="int32",
        spares=(".g_idx",),
        cpu_lacks={
            "awq": "auto-round has no layer for its AWQ packing on a processor and fills one with random numbers: "
            "take a checkpoint in its own packing, or a GPU"
        },
        takes_experts_apart=True,
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
        settings=settings.METAL,
        title="Metal affine",
        packs_on=frozenset(),  # but Apple's GPU
        unpacked=_dequantize("MetalConfig"),
        scales_decide=True,
        refuses=_STORED,
        held="uint32",
    ),
    Method(
        name="sinq",
        settings=settings.SINQ,
        title="SINQ",
        needs=("sinq",),
        unsupported="transformers 5 leaves out what sinq 0.2 saves (the parts of its meta), and sinq's own loader multiplies "
        "float32 by bfloat16: use the 16-bit checkpoint with --precision int4",
    ),
    Method(name="gemma", title="Gemma's own", in_words=True, refuses=_STORED, copies=True),
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
