"""How models of the catalog lie on the hub, as far as their configs do not say: the rows of `data/stored.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from harness.core.records import Record
from harness.data import DATA


class Stored(Record, frozen=True, kw_only=True):
    """How a model is stored on the hub, as far as its config does not say: a row of `data/stored.toml`."""

    bytes: int
    origin: str
    dtype: str | None = None
    format: str = "safetensors"
    mask: str | None = None  #: name of the boolean causal mask of a layer in its files
    mask_side: int = 0  #: the mask has this many rows and columns
    shard_bytes: int | None = None  #: the most bytes in one file; None if there is one file
    repeats_head: bool = False  #: whether a tied head is stored nevertheless
    float32: str | None = None  #: part of the names of what is stored in float32 whatever the rest is

    @property
    def largest_file(self) -> tuple[str, int]:
        """What its largest file is called, and its bytes at most."""
        if self.shard_bytes is None:
            return f"its only file, a .{self.format},", self.bytes
        return "a file", min(self.bytes, self.shard_bytes)


def published(hub_id: str) -> Stored | None:
    """Return how a model of the catalog lies on the hub, where its config does not tell."""
    return _published().get(hub_id)


@lru_cache(maxsize=1)
def _published() -> Mapping[str, Stored]:
    return msgspec.toml.decode((DATA / "stored.toml").read_bytes(), type=dict[str, Stored])
