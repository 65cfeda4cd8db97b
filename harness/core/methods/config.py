"""Where a config says how its weights are quantized, and the method that transformers takes it for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where a config keeps that of its text model (transformers' get_text_config).
TEXT_CONFIGS = ("decoder", "generator", "text_config")


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


def bitsandbytes_type(settings: Mapping[str, Any]) -> str:
    """Name the bits and the type of bitsandbytes; where 4 bits have no type, transformers takes fp4."""
    if settings.get("load_in_8bit") is True:
        return "8-bit"
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    nested = ", nested" if settings.get("bnb_4bit_use_double_quant") is True else ""
    return f"4-bit {kind}{nested}" if kind in ("nf4", "fp4") else "4-bit"
