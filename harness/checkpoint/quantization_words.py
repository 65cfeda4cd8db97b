"""What a quantization_config says in its own words: bits, groups, types, and which of its groups a module belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.core.methods.compressed import scheme_number, schemes_in

# quant_method of transformers -> the key in its config that gives the bits
_BITS_KEYS = ("bits", "w_bit", "num_bits", "weight_bits", "nbits")
_GROUP_KEYS = ("group_size", "q_group_size")


def bits_in(settings: Mapping[str, Any]) -> int:
    """Return the bits of a quantization_config, 0 where it does not say: its own, or those of its first group of layers.

    Quark names a dtype: "int4", "fp8_e4m3", for all but what it lists beside.
    """
    said = next((bits for source in _sources(settings) for key in _BITS_KEYS if (bits := believable_bits(source.get(key)))), 0)
    weight = _weight_of(settings.get("global_quant_config"))
    named = re.match(r"[a-z]+(\d+)", str(weight.get("mx_element_dtype") or weight.get("dtype") or ""))
    return said or (believable_bits(int(named[1])) if named else 0)


def bits_of(settings: Mapping[str, Any], module: str) -> int:
    """Return the bits of one module: of the group that names its path, or its own as MLX has it, else as `bits_in` says."""
    own = settings.get(module)
    if isinstance(own, dict):
        return believable_bits(own.get("bits")) or bits_in(settings)
    number = scheme_number(settings, module)
    said = schemes_in(settings)[number]["weights"].get("num_bits") if number is not None else None
    return believable_bits(said) or bits_in(settings)


def group_in(settings: Mapping[str, Any]) -> Any:
    """Return the group size of a quantization_config, wherever it says it."""
    return next((source[key] for source in _sources(settings) for key in _GROUP_KEYS if source.get(key)), None)


def block_in(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the sides of the blocks that are scaled, which settings without a word take for 128 x 128; None: no such blocks."""
    sides = settings.get("weight_block_size", (128, 128))
    return (int(sides[0]), int(sides[1])) if sides else None


def _sources(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return where a quantization_config may describe the weights: at its top, in its first group of layers, in HQQ's own place."""
    weights = next((group["weights"] for group in schemes_in(settings)), None)
    hqq = settings.get("quant_config")
    inner = (
        weights,
        _weight_of(settings.get("global_quant_config")),
        hqq.get("weight_quant_params") if isinstance(hqq, dict) else None,
    )
    return (settings, *(one for one in inner if isinstance(one, dict)))


def _weight_of(layers: Any) -> Mapping[str, Any]:
    """Return what Quark says of the weights of layers."""
    weight = layers.get("weight") if isinstance(layers, dict) else None
    return weight if isinstance(weight, dict) else {}


def believable_bits(value: Any) -> int:
    """Return a believable number of bits, else 0: configs are read before anyone has checked them."""
    return value if type(value) is int and 0 < value <= 32 else 0
