"""PackedScheme: how Linear weights are packed, as far as kernels go by it, and how a config of GPTQ or AWQ says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.records import Record

_USUAL_AWQ = "gemm"  # the version whose weights the kernels take


class PackedScheme(Record, frozen=True, kw_only=True):
    """How the Linear weights of a checkpoint are packed, as far as kernels are chosen by it."""

    method: str
    bits: int
    group: int  #: inputs that share a scale; 0: all
    symmetric: bool = True  #: without zero points
    reorders: bool = False  #: inputs are sorted before the product (act-order)


def gptq_scheme(settings: Mapping[str, Any]) -> PackedScheme:
    """Return how a config says that GPTQ's weights are packed."""
    group = _group(settings)
    symmetric, reorders = bool(settings.get("sym", True)), bool(settings.get("desc_act", False)) and group > 0
    return PackedScheme(method="gptq", bits=_bits(settings), group=group, symmetric=symmetric, reorders=reorders)


def awq_scheme(settings: Mapping[str, Any]) -> PackedScheme | None:
    """Return how a config says that AWQ's weights are packed; None of its other layouts than "gemm"."""
    if str(settings.get("version", _USUAL_AWQ)).lower() != _USUAL_AWQ:
        return None
    symmetric = not settings.get("zero_point", True)
    return PackedScheme(method="awq", bits=_bits(settings), group=_group(settings), symmetric=symmetric)


def _bits(settings: Mapping[str, Any]) -> int:
    return int(settings.get("bits", settings.get("w_bit", 4)))


def _group(settings: Mapping[str, Any]) -> int:
    return max(0, int(settings.get("group_size", settings.get("q_group_size", 128))))
