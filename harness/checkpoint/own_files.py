"""What packages say of quantization in a file of their own, of which the config and transformers know nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from harness.checkpoint import settings_check
from harness.checkpoint.formats.files import Folder
from harness.checkpoint.formats.safetensors_header import parse_config
from harness.core.methods.config import settings_of

Read = Callable[[Mapping[str, Any]], dict[str, Any] | None]


def _modelopt(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what NVIDIA ModelOpt exports beside the weights."""
    inner = said.get("quantization")
    return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) and inner else None


def _quanto(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the map from modules to dtypes ("qint4") that optimum-quanto's QuantizedModelForCausalLM saves."""
    dtypes = {str(one["weights"]) for one in said.values() if isinstance(one, dict) and "weights" in one}
    bits = {int(found[1]) for found in (re.search(r"(\d+)", dtype) for dtype in dtypes) if found}
    if not dtypes:
        return None
    return {"quant_method": "quanto", **({"bits": min(bits)} if bits else {}), "modules_to_not_convert": None}


FILES: Mapping[str, Read] = {"hf_quant_config.json": _modelopt, "quanto_qmap.json": _quanto}


def with_own_file(folder: Folder, config: dict[str, Any]) -> dict[str, Any]:
    """Add what a package says in a file of its own, where the config says nothing of quantization. Raises CheckpointError."""
    for name, read in FILES.items():
        if settings_of(config) is None and folder.size(name) is not None:
            with closing(folder.open(name)) as blob:
                said = read(parse_config(blob))
            config = {**config, settings_check.KEY: said} if said else config
    return config
