"""The models whose skeletons are shipped: their configs as published, and how many parameters they have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Record
from harness.data import DATA


class ShippedModel(Record, frozen=True, kw_only=True):
    """A model of the catalog: its config and its number of parameters, as published (`source` says by whom)."""

    parameters: int
    source: str
    config: dict[str, Any]


@lru_cache(maxsize=1)
def catalog() -> Mapping[str, ShippedModel]:
    """Read the catalog: hub id -> entry."""
    return msgspec.json.decode((DATA / "configs.json").read_bytes(), type=dict[str, ShippedModel])


def hub_id(name: str) -> str:
    """Turn a short name ("qwen2.5-7b-instruct") or a hub id, in any case, into the hub id.

    Raises:
        UsageError: the catalog has no such model.
    """
    known = {}
    for full in catalog():
        known[full.casefold()] = known[full.casefold().rpartition("/")[2]] = full
    if name.casefold() in known:
        return known[name.casefold()]
    raise UsageError(f"no model {name!r} in the catalog: {did_you_mean(name, known)}")
