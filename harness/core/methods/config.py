"""Where a config says how its weights are quantized, and the method that transformers takes it for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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


class CountedByName(NamedTuple):
    """Which tensors count as packed: all Linears but those that are kept out, and tables where that is asked for."""

    kept: tuple[str, ...] | None  #: names that the config keeps out; None: the head, where tables are not asked for
    tables: bool

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> CountedByName:
        """Read from a config's settings."""
        kept = settings.get("modules_to_not_convert")
        names = tuple(name for name in kept if isinstance(name, str)) if isinstance(kept, list) else None
        return cls(names, bool(settings.get("include_input_output_embeddings")))

    def takes(self, path: str, *, quantizes: bool, head: bool, table: bool) -> bool:
        """Say whether a tensor counts: a Linear that quantizers take, the head, the embedding, or none of them."""
        if self.tables and (head or table):
            return True
        return (quantizes or (head and self.kept is not None)) and is_converted(path, self.kept or ())


def is_converted(name: str, kept: Iterable[str]) -> bool:
    """Say whether none of the names that a config keeps out is meant by one: by its beginning, a pattern, or by its end.

    transformers' `should_convert_module`.
    """
    return not any(_begins(one, name) or name.endswith(one) for one in kept)


def _begins(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False
