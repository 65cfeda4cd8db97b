"""Small checkpoints stored in the forms that people download, and hollow ones of their real sizes.

A form says how one weight of outputs x inputs lies in the files, and what config.json says of it; the values are random, but such
that what is unpacked from them is finite.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
BF16, F32, F8, U8, U32, I8, I32, I64 = (
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.uint32,
    torch.int8,
    torch.int32,
    torch.int64,
)
_SAFE = {BF16: "BF16", F32: "F32", F8: "F8_E4M3", U8: "U8", U32: "U32", I8: "I8", I32: "I32", I64: "I64"}

SMALL: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Llama 3.1 8B's shape.
LARGE: Mapping[str, Any] = {
    **SMALL,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SMALL_GPT_OSS: Mapping[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LARGE_GPT_OSS: Mapping[str, Any] = {
    **SMALL_GPT_OSS,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
}


class Form(NamedTuple):
    """How a method stores weights: the parts of one, and the quantization_config; `where` is the key that holds that."""

    parts: Callable[[int, int], Tensors]
    settings: Mapping[str, Any]
    where: str = "quantization_config"


def _compressed(
    kind: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None, parts: Callable[[int, int], Tensors]
) -> Form:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations,
        "output_activations": None,
    }
    return Form(
        parts,
        {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )


def _row_scaled(dtype: torch.dtype) -> Callable[[int, int], Tensors]:
    return lambda o, i: {".weight": (dtype, (o, i)), ".weight_scale": (BF16, (o, 1))}


def _words(bits: int, group: int) -> Callable[[int, int], Tensors]:
    return lambda o, i: {
        ".weight_packed": (I32, (o, -(-i * bits // 32))),
        ".weight_scale": (BF16, (o, i // group)),
        ".weight_shape": (I64, (2,)),
    }


def _blocks(side: int) -> Callable[[int, int], Tensors]:
    return lambda o, i: {".weight": (F8, (o, i)), ".weight_scale_inv": (F32, (-(-o // side), -(-i // side)))}


_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
FORMS: Mapping[str, Form] = {
    "ct-w4a16": _compressed(
        "pack-quantized", {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group"}, None, _words(4, 128)
    ),
    "ct-w8a16": _compressed(
        "pack-quantized", {"num_bits": 8, "type": "int", "group_size": 64, "strategy": "group"}, None, _words(8, 64)
    ),
    "ct-fp8": _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _TOKENS, _row_scaled(F8)),
    "ct-int8": _compressed(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, {**_TOKENS, "type": "int"}, _row_scaled(I8)
    ),
    "fp8-blocks": Form(_blocks(128), {**_FP8, "weight_block_size": [128, 128]}),
    "fp8-small-blocks": Form(_blocks(64), {**_FP8, "weight_block_size": [64, 64]}),
    "mxfp8": Form(
        lambda o, i: {".weight": (F8, (o, i)), ".weight_scale_inv": (U8, (o, i // 32))},
        {**_FP8, "quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ),
    "metal": Form(
        lambda o, i: {".weight": (U32, (o, i // 8)), ".scales": (BF16, (o, i // 64)), ".qbiases": (BF16, (o, i // 64))},
        {"quant_method": "metal", "bits": 4, "group_size": 64, "modules_to_not_convert": ["lm_head"]},
    ),
    "bitnet": Form(
        lambda o, i: {".weight": (U8, (o // 4, i)), ".weight_scale": (BF16, (1,))},
        {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"},
    ),
    "hqq": Form(
        lambda o, i: {".W_q": (U8, (o * i // 128, 64)), ".scale": (BF16, (o * i // 64, 1)), ".zero": (BF16, (o * i // 64, 1))},
        {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
            "skip_modules": ["lm_head"],
        },
    ),
    "modelopt-nvfp4": Form(
        lambda o, i: {
            ".weight": (U8, (o, i // 2)),
            ".weight_scale": (F8, (o, i // 16)),
            ".weight_scale_2": (F32, ()),
            ".input_scale": (F32, ()),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
    ),
    "modelopt-fp8": Form(
        lambda o, i: {".weight": (F8, (o, i)), ".weight_scale": (F32, ()), ".input_scale": (F32, ())},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "mlx": Form(
        lambda o, i: {".weight": (U32, (o, i // 8)), ".scales": (BF16, (o, i // 64)), ".biases": (BF16, (o, i // 64))},
        {"group_size": 64, "bits": 4},
        where="quantization",
    ),
    "mlx-in-its-new-place": Form(
        lambda o, i: {".weight": (U32, (o, i // 8)), ".scales": (BF16, (o, i // 64)), ".biases": (BF16, (o, i // 64))},
        {"group_size": 64, "bits": 4, "mode": "affine"},
    ),
    "no-method": Form(lambda o, i: {".weight": (I8, (o, i)), ".scale": (F32, (o, 1))}, {"algo": "w8"}),
    "exl2": Form(lambda o, i: {".q_weight": (I32, (i // 8, o)), ".q_scale": (I32, (i // 32, o // 8))}, {"quant_method": "exl2"}),
    "bnb-nf4": Form(
        lambda o, i: {
            ".weight": (U8, (o * i // 2, 1)),
            ".weight.absmax": (F32, (o * i // 64,)),
            ".weight.quant_map": (F32, (16,)),
            ".weight.quant_state.bitsandbytes__nf4": (U8, (90,)),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"},
    ),
    "bnb-int8": Form(
        lambda o, i: {".weight": (I8, (o, i)), ".SCB": (F32, (o,)), ".weight_format": (U8, ())},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
}


def tensors_of(config: Mapping[str, Any], form: Form) -> tuple[Tensors, dict[str, tuple[int, int]]]:
    """Return the tensors of a Llama in a form, and the shapes of what is packed by the name of its module."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    side = hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * side, config["num_key_value_heads"] * side
    found: Tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (BF16, (config["vocab_size"], hidden)))
    found["model.norm.weight"] = (BF16, (hidden,))
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        linears |= {f"{at}self_attn.{name}_proj": (rows, hidden) for name, rows in {"q": queries, "k": keys, "v": keys}.items()}
        linears |= {f"{at}self_attn.o_proj": (hidden, queries), f"{at}mlp.down_proj": (hidden, inner)}
        linears |= {f"{at}mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        found |= {f"{at}{name}_layernorm.weight": (BF16, (hidden,)) for name in ("input", "post_attention")}
    for module, (outputs, inputs) in linears.items():
        found |= {f"{module}{part}": kind for part, kind in form.parts(outputs, inputs).items()}
    return found, linears


def experts_of(config: Mapping[str, Any]) -> Tensors:
    """Return the tensors of GPT-OSS: attention in bfloat16, experts in MXFP4."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    found: Tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (BF16, (config["vocab_size"], hidden)))
    found["model.norm.weight"] = (BF16, (hidden,))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, (rows, columns) in {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
        }.items():
            found[f"{at}self_attn.{name}_proj.weight"] = (BF16, (rows, columns))
            found[f"{at}self_attn.{name}_proj.bias"] = (BF16, (rows,))
        found |= {f"{at}{name}_layernorm.weight": (BF16, (hidden,)) for name in ("input", "post_attention")}
        found |= {f"{at}self_attn.sinks": (BF16, (config["num_attention_heads"],))}
        found |= {f"{at}mlp.router.weight": (BF16, (experts, hidden)), f"{at}mlp.router.bias": (BF16, (experts,))}
        for name, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            found[f"{at}mlp.experts.{name}_blocks"] = (U8, (experts, outputs, inputs // 32, 16))
            found[f"{at}mlp.experts.{name}_scales"] = (U8, (experts, outputs, inputs // 32))
            found[f"{at}mlp.experts.{name}_bias"] = (BF16, (experts, outputs))
    return found


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


def save_form(folder: Path, name: str) -> Path:
    """Write a small checkpoint in a form, with values."""
    if name == "mxfp4":
        return save_tensors(folder, {**SMALL_GPT_OSS, "quantization_config": MXFP4}, experts_of(SMALL_GPT_OSS), {})
    form = FORMS[name]
    return save_tensors(folder, {**SMALL, form.where: form.settings}, *tensors_of(SMALL, form))


def save_hollow(folder: Path, name: str) -> Path:
    """Write one of a real size, whose data is a hole but for the shapes of what is packed."""
    linears: Mapping[str, tuple[int, int]] = {}
    if name == "mxfp4":
        config, tensors = {**LARGE_GPT_OSS, "quantization_config": MXFP4}, experts_of(LARGE_GPT_OSS)
    else:
        config = {**LARGE, FORMS[name].where: FORMS[name].settings}
        tensors, linears = tensors_of(LARGE, FORMS[name])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[one] = {"dtype": _SAFE[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for module, sides in linears.items():
            if (stored := header.get(f"{module}.weight_shape")) is not None:
                file.seek(8 + len(text) + stored["data_offsets"][0])
                file.write(struct.pack("<2q", *sides))
    return folder


def save_tensors(folder: Path, config: Mapping[str, Any], tensors: Tensors, linears: Mapping[str, tuple[int, int]]) -> Path:
    """Write a config, and tensors with values; `linears` are the shapes of what is packed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    values = {name: _value(name, dtype, shape, linears) for name, (dtype, shape) in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _value(name: str, dtype: torch.dtype, shape: tuple[int, ...], linears: Mapping[str, tuple[int, int]]) -> torch.Tensor:
    if name.endswith(".weight_shape"):
        return torch.tensor(linears[name.removesuffix(".weight_shape")])
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    if dtype is U8 and "scale" in name:  # exponents about 2 ** -6
        return torch.full(shape, 121, dtype=dtype)
    if not dtype.is_floating_point:
        low, high = (0, 256) if dtype is U8 else (-128, 128) if dtype is I8 else (0, 2**31 - 1)
        return torch.randint(low, high, shape).to(dtype)
    return (torch.rand(shape) * 0.02 + 0.001 if "scale" in name else torch.randn(shape) * 0.05).to(dtype)
