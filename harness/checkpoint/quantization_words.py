"""What a quantization_config says in its own words: bits, groups, types, and which of its groups a module belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.methods.compressed import preset

# quant_method of transformers -> the key in its config that gives the bits
_BITS_KEYS = ("bits", "w_bit", "num_bits", "weight_bits", "nbits")
_GROUP_KEYS = ("group_size", "q_group_size")
# What tells schemes of compressed-tensors apart that are stored otherwise.
_SCHEME_KEYS = ("num_bits", "type", "strategy", "group_size")
_PATTERN = "re:"


def bits_in(settings: Mapping[str, Any]) -> int:
    """Return the bits of a quantization_config, 0 where it does not say: its own, or those of its first group of layers.

    Quark names a dtype: "int4", "fp8_e4m3", for all but what it lists beside.
    """
    said = next((bits for source in _sources(settings) for key in _BITS_KEYS if (bits := believable_bits(source.get(key)))), 0)
    weight = _weight_of(settings.get("global_quant_config"))
    named = re.match(r"[a-z]+(\d+)", str(weight.get("mx_element_dtype") or weight.get("dtype") or ""))
    return said or (believable_bits(int(named[1])) if named else 0)


def schemes_in(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of layers of a quantization_config that say how their weights are packed: compressed-tensors has them."""
    groups = settings.get("config_groups")
    listed = [_whole(name, group) for name, group in groups.items()] if isinstance(groups, dict) else []
    return [group for group in listed if isinstance(group, dict) and isinstance(group.get("weights"), dict)]


def _whole(name: str, group: Any) -> Any:
    """Return a group with its weights, which one that lists targets alone has from its name."""
    return {"targets": group, "weights": preset(name)} if isinstance(group, list) else group


def differ(schemes: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether groups of layers are packed in more than one way."""
    ways = {tuple(str(one["weights"].get(key)) for key in _SCHEME_KEYS) for one in schemes}
    return len(ways) > 1


def is_of_experts(scheme: Mapping[str, Any]) -> bool:
    """Say whether a group of layers singles out the experts of a mixture (transformers' `get_dense_scheme`)."""
    return any(target.startswith(_PATTERN) and "experts" in target for target in _targets(scheme))


def bits_of(settings: Mapping[str, Any], module: str) -> int:
    """Return the bits of one module: of the group that names its path, else as `bits_in` says, which is of the first."""
    named = (scheme for scheme in schemes_in(settings) if any(_meets(target, module) for target in _targets(scheme)))
    found = next((bits for scheme in named if (bits := believable_bits(scheme["weights"].get("num_bits")))), 0)
    return found or bits_in(settings)


def _targets(scheme: Mapping[str, Any]) -> list[str]:
    targets = scheme.get("targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []


def _meets(target: str, module: str) -> bool:
    """Say whether a target names a module by its path, or by a pattern of it."""
    if not target.startswith(_PATTERN):
        return target == module
    try:
        return re.match(target.removeprefix(_PATTERN), module) is not None
    except re.error:
        return False


def group_in(settings: Mapping[str, Any]) -> Any:
    """Return the group size of a quantization_config, wherever it says it."""
    return next((source[key] for source in _sources(settings) for key in _GROUP_KEYS if source.get(key)), None)


def _sources(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return where a quantization_config may describe the weights: at its top, and in its first group of layers."""
    weights = next((group["weights"] for group in schemes_in(settings)), None)
    return (settings, *(one for one in (weights, _weight_of(settings.get("global_quant_config"))) if isinstance(one, dict)))


def _weight_of(layers: Any) -> Mapping[str, Any]:
    """Return what Quark says of the weights of layers."""
    weight = layers.get("weight") if isinstance(layers, dict) else None
    return weight if isinstance(weight, dict) else {}


def bitsandbytes_type(settings: Mapping[str, Any]) -> str:
    """Name the bits and the type of bitsandbytes; where 4 bits have no type, transformers takes fp4."""
    if settings.get("load_in_8bit") is True:
        return "8-bit"
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    nested = ", nested" if settings.get("bnb_4bit_use_double_quant") is True else ""
    return f"4-bit {kind}{nested}" if kind in ("nf4", "fp4") else "4-bit"


def torchao_type(settings: Mapping[str, Any]) -> str:
    """Name the class of torchao's config, as `TorchAoConfig.to_dict` writes it."""
    given = settings.get("quant_type")
    inner = given.get("default") if isinstance(given, dict) else None
    kind = inner.get("_type") if isinstance(inner, dict) else None
    return kind if isinstance(kind, str) and kind.isidentifier() and len(kind) <= 60 else "of unknown type"


def believable_bits(value: Any) -> int:
    """Return a believable number of bits, else 0: configs are read before anyone has checked them."""
    return value if type(value) is int and 0 < value <= 32 else 0
