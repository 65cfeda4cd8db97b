"""The models whose skeletons are shipped: their configs as published, and how many parameters they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Record
from harness.data import DATA

_START = re.compile(rb'^"([^"]+)": ', re.MULTILINE)


# What a plan rests on, by the field that `source` calls from memory or not confirmed.
_UNSURE = {
    "torch_dtype": "dtype not confirmed: no public file that could be read says {}, and the bytes of its files are counted by it",
    "max_position_embeddings": "context not confirmed: no public file that could be read says how many tokens it takes in all, and "
    "{} are planned at most",
}


class ShippedModel(Record, frozen=True, kw_only=True):
    """A model of the catalog: its config, and how many parameters that makes, tied ones once.

    `published` is what others say of that number, `published_by` who does; `source` is where the config stands.
    """

    parameters: int
    published: int
    published_by: str
    source: str
    config: dict[str, Any]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Say which fields of the config no public file that was read gives, as far as a figure rests on them."""
        unsure = (field for field in _UNSURE if f"{field} from memory" in self.source or f"{field} not confirmed" in self.source)
        return tuple(_UNSURE[field].format(self.config.get(field)) for field in unsure)


class _Lines(Mapping[str, ShippedModel]):
    """The entries of a JSON object that has a line for each: only those that are asked for are decoded."""

    def __init__(self, text: bytes) -> None:
        starts = list(_START.finditer(text))
        ends = [start.start() for start in starts[1:]] + [text.rindex(b"}")]
        self._places = {start[1].decode(): slice(start.end(), end) for start, end in zip(starts, ends, strict=True)}
        self._text = text
        self._decoded: dict[str, ShippedModel] = {}

    def __getitem__(self, hub_id: str) -> ShippedModel:
        if hub_id not in self._decoded:
            line = self._text[self._places[hub_id]].rstrip().removesuffix(b",")
            self._decoded[hub_id] = msgspec.json.decode(line, type=ShippedModel)
        return self._decoded[hub_id]

    def __contains__(self, hub_id: object) -> bool:
        return hub_id in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@lru_cache(maxsize=1)
def catalog() -> Mapping[str, ShippedModel]:
    """Read the catalog: hub id -> entry."""
    return _Lines((DATA / "configs.json").read_bytes())


@lru_cache(maxsize=1)
def renamed() -> Mapping[str, str]:
    """Read which hub ids of the catalog were called otherwise before: old -> new; the hub answers to both."""
    return msgspec.toml.decode((DATA / "renamed.toml").read_bytes(), type=dict[str, str])


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
