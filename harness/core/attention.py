"""ATTENTIONS and KV_FORMS: how attention can be computed, and how its keys and values are kept while a model generates.

Sizes of KV caches are those of transformers 5.24, cache_utils.py: `QuantizedLayer` keeps the prompt quantized, and what comes later
as it is until that is `residual_length` tokens, when all is quantized anew; `Fp8QuantizedLayer` keeps every token in 8 bits, with
one scale for the keys of a layer and one for its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.core.records import USUAL_KV, Record
from harness.data import DATA

RESIDUAL_TOKENS = 128  # `residual_length` of QuantizedLayer: so many and what follows are quantized anew
GROUP = 64  # `q_group_size` of QuantizedLayer: elements that share a scale and a zero point
_SCALE_BYTES = 4  # of a layer and of keys or values, by Fp8QuantizedLayer


class Implementation(Record, frozen=True, kw_only=True):
    """One row: its name in transformers (`attn_implementation`), and what it needs."""

    name: str
    help: str
    needs: tuple[str, ...] = ()  #: modules beside torch
    gpu_only: bool = False
    least_capability: float = 0.0
    dtypes: tuple[str, ...] = ()  #: the only ones it takes; empty if all
    most_head_dim: int | None = None


_HALF = ("float16", "bfloat16")
# The limits of flash-attn 2 are in its README ("NVIDIA CUDA Support"), those of 3 in that of its folder hopper.
_IMPLEMENTATIONS = (
    Implementation(name="eager", help="step by step, with all scores in memory: the reference"),
    Implementation(name="sdpa", help="torch's scaled dot product attention, what transformers takes where a model has it"),
    Implementation(
        name="flash_attention_2",
        help="the package flash-attn, on NVIDIA cards since Ampere in 16 bits",
        needs=("flash_attn",),
        gpu_only=True,
        least_capability=8.0,
        dtypes=_HALF,
        most_head_dim=256,
    ),
    Implementation(
        name="flash_attention_3",
        help="flash-attn 3, on Hopper in 16 bits",
        needs=("flash_attn_interface",),
        gpu_only=True,
        least_capability=9.0,
        dtypes=_HALF,
        most_head_dim=256,
    ),
)
ATTENTIONS: Mapping[str, Implementation] = {row.name: row for row in _IMPLEMENTATIONS}


def own_attention(config: Mapping[str, Any]) -> str | None:
    """Return the implementation that a config.json names, which transformers then takes; None if it names none of the table."""
    said = (config.get(key) for key in ("attn_implementation", "_attn_implementation"))
    return next((name for name in said if isinstance(name, str) and name in ATTENTIONS), None)


@cache
def _lacking() -> Mapping[str, list[str]]:
    """Read which classes of transformers lack which implementation (`python -m harness.worker.attention_support` writes it)."""
    lacking: Mapping[str, list[str]] = json.loads((DATA / "attention.json").read_bytes())
    return lacking


def lacks(model_class: str, name: str) -> bool:
    """Say whether a class of transformers lacks an implementation: every class computes eagerly."""
    kind = name.partition("_")[0]  # flash in all its versions is one flag of a class
    return kind != "eager" and model_class in _lacking()[kind]


class KvForm(Record, frozen=True, kw_only=True):
    """One row: its name, what `generate` takes for it, and what becomes of keys and values.

    `temporary_bytes` was traced once through transformers 5.24 on a fake card, of fp8 and quanto; HQQ is taken to be like quanto.
    `moved_bytes` counts its code: growing copies the cache (read, write), and attention reads it. What is static is read alone, but
    with a mask that rules out faster kernels: it is taken to be as fast until it is measured.
    `bits` is what an element takes once it is quantized; None: nothing is, and it keeps the model's dtype. `grouped`: whether
    groups of elements share a scale and a zero point in the model's dtype, and the latest tokens stay as they are.
    """

    name: str
    title: str
    help: str
    arguments: Mapping[str, Any] = {}
    bits: int | None = None
    grouped: bool = False
    in_pairs: bool = False  #: whether two groups are packed into one, so that an odd number of them ends in an error
    needs: tuple[str, ...] = ()  #: modules that quantize
    full_attention_only: bool = False  #: refused for sliding windows and linear attention
    in_ram: bool = False  #: kept in RAM, and brought to the GPU layer by layer
    temporary_bytes: float = 0.0  #: for an element of one layer: what a step holds beside what growing in the dtype would
    moved_bytes: float = 6.0  #: for an element: what a step reads and writes of it, in 16 bits
    quality_kept: float = 1.0  #: by the general rule, where nothing was measured

    def kept_bytes(self, elements: int, tokens: int, new_tokens: int, element_bytes: int) -> float:
        """Return the bytes of `elements` keys and values that were cached for `tokens` tokens, the last `new_tokens` one by one.

        At its largest since the prompt was read: of a grouped form that is just before all is quantized anew.
        """
        if self.bits is None:
            return elements * element_bytes
        if not self.grouped:
            return elements * self.bits / 8 + 2 * _SCALE_BYTES
        plain = min(new_tokens, RESIDUAL_TOKENS - 1)
        share = plain / tokens if tokens else 0.0
        packed = self.bits / 8 + 2 * element_bytes / GROUP
        return elements * (share * element_bytes + (1 - share) * packed)

    @property
    def is_quantized(self) -> bool:
        return self.bits is not None

    @property
    def moved_per_byte(self) -> float:
        """Bytes that a step reads and writes for a byte that is kept."""
        return self.moved_bytes / (2.0 if self.bits is None else self.bits / 8 + (4 / GROUP if self.grouped else 0.0))


def _quantized(backend: str, **settings: Any) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}


def _in_groups(name: str, package: str, module: str, *, quality_kept: float, in_pairs: bool = False, **settings: int) -> KvForm:
    """Return a row of integers that share a scale and a zero point in groups."""
    bits = settings["nbits"]
    return KvForm(
        name=name,
        title=f"int{bits} ({package})",
        help=f"{bits}-bit integers in groups of {GROUP}, by {package}",
        arguments=_quantized(name.partition("-")[0], **settings),
        bits=bits,
        grouped=True,
        in_pairs=in_pairs,
        needs=(module,),
        full_attention_only=True,
        temporary_bytes=4.7,
        moved_bytes=15.0,
        quality_kept=quality_kept,
    )


_FORMS = (
    KvForm(name=USUAL_KV, title="as computed", help="in the model's dtype, growing token by token: what generate does by itself"),
    KvForm(
        name="static",
        title="static",
        help="in the model's dtype, allocated once for the whole length: nothing is copied as it grows",
        arguments={"cache_implementation": "static", "disable_compile": True},
    ),
    KvForm(
        name="offloaded",
        title="in RAM",
        help="in RAM, one layer ahead on the GPU: the longest contexts, and every token waits for the link",
        arguments={"cache_implementation": "offloaded"},
        in_ram=True,
        moved_bytes=8.0,
    ),
    KvForm(
        name="fp8",
        title="fp8",
        help="8-bit floats with one scale for a layer; needs no package",
        arguments=_quantized("fp8"),
        bits=8,
        full_attention_only=True,
        temporary_bytes=5.0,
        moved_bytes=23.0,
        quality_kept=0.995,
    ),
    _in_groups("hqq-int8", "HQQ", "hqq", quality_kept=0.999, nbits=8, axis_key=1, axis_value=1),
    # hqq 0.2.8, core/bitpack.py, pack_4bit_u8
    _in_groups("hqq-int4", "HQQ", "hqq", quality_kept=0.98, in_pairs=True, nbits=4, axis_key=1, axis_value=1),
    _in_groups("quanto-int4", "optimum-quanto", "optimum.quanto", quality_kept=0.98, nbits=4),
)

KV_FORMS: Mapping[str, KvForm] = {row.name: row for row in _FORMS}


def modules_for(kv: str, attention: str | None) -> tuple[str, ...]:
    """Return the modules that a form of the KV cache and an implementation of attention need beside torch and transformers."""
    return (*KV_FORMS[kv].needs, *(ATTENTIONS[attention].needs if attention else ()))
