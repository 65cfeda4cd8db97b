"""How transformers calls the KV cache: `cache` since 5.24, `past_key_values` before, in arguments and in outputs alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD = "past_key_values"
_NAMES = ("cache", OLD, "cache_params")  # the last is Mamba's, before 5.24
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward method with the argument `cache` be called by the older name as well."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if OLD in kwargs:
            kwargs["cache"] = kwargs.pop(OLD)
        return forward(*args, **kwargs)

    return renamed


def kv_cache_of(output: Any) -> Any:
    """Return the cache of a model's output, whatever its class calls it, or None."""
    return next((output[name] for name in _NAMES if name in output), None)
