"""What is quantised already: how config and tensors say it, and how many weights a packed tensor stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.headers import Tensor

# Stored beside the weights without being weights: scales, zeros, orders and formats of quantised layers, and buffers.
_BESIDE = re.compile(
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format|qzeros|scales|g_idx|weight_scale|weight_scale_2"
    r"|weight_scale_inv|weight_shape|weight_zero_point|weight_g_idx|input_scale|k_scale|v_scale|inv_freq|causal_mask|masked_bias"
    r"|position_ids)$|\.quant_state\.|_scales$"
)
_ATTENTION_MASK = re.compile(r"(attn|attention)\.bias$")
_PACKED_SUFFIXES = (".qweight", ".weight_packed")

# quant_method of transformers -> the key in its config that gives the bits
_BITS_KEYS = ("bits", "w_bit", "num_bits", "weight_bits")


def describe(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> str | None:
    """Say in a few words how the stored weights are quantised: "gptq 4-bit, groups of 128"; None where they are not."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes:
        from harness.gguf_header import BLOCK_TYPES

        blocks = sorted(dtypes & BLOCK_TYPES)
        if blocks:
            return "gguf " + ", ".join(blocks)
    settings = _settings(config)
    if settings is not None:
        method = settings.get("quant_method")
        words = [method if isinstance(method, str) and method.isprintable() and len(method) <= 40 else "unknown method"]
        words += [_bitsandbytes(settings)] if method == "bitsandbytes" else []
        return _sentence(words, _bits(settings), settings.get("group_size", settings.get("q_group_size")))
    if 0 < _positive(config.get("wbits")) < 16:  # MOSS in float16 says 32
        return _sentence(["gptq"], config["wbits"], config.get("groupsize"))
    if _positive(config.get("quantization_bit")):
        return _sentence(["chatglm"], config["quantization_bit"], None)
    return None


def weights_in(tensor: Tensor, elements: int, names: Collection[str], config: Mapping[str, Any]) -> int:
    """Return how many of the model's weights a stored tensor of `elements` stands for.

    Buffers and what only helps to unpack count 0; packed integers count the weights inside them. `names` are all the
    tensors of the checkpoint: a packed tensor is known by what stands beside it.
    """
    name = tensor.name
    if _BESIDE.search(name) or tensor.dtype == "bool" or (_ATTENTION_MASK.search(name) and len(tensor.shape) == 4):
        return 0
    if name.endswith(_PACKED_SUFFIXES) and tensor.dtype == "int32":
        return elements * 32 // (_bits(_settings(config) or {}) or _positive(config.get("wbits")) or 4)
    nibbles = (
        tensor.dtype == "uint8" and (f"{name}.absmax" in names or f"{name}_scale_2" in names or name.endswith("_blocks"))
    ) or (tensor.dtype == "int8" and f"{name}_scale" in names and config.get("quantization_bit") == 4)
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
    return f"4-bit {kind}" if kind in ("nf4", "fp4") else "4-bit"


def _positive(value: Any) -> int:
    """Return a believable number of bits, else 0: configs are read before anyone has checked them."""
    return value if type(value) is int and 0 < value <= 32 else 0


def _sentence(words: list[str], bits: int, group: Any) -> str:
    words += [f"{bits}-bit"] if bits else []
    grouped = f", groups of {group}" if type(group) is int and 0 < group < 1 << 20 else ""
    return " ".join(words) + grouped
