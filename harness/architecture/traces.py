"""Records of traced memory: shipped for the catalog, built once by a worker for other models and kept. Nothing here needs torch.

`data/traces.jsonl` has a line for each architecture, `[key, packed]`: its records as JSON, deflated, as they say much alike. A
record is found by precision and family of cards; where another holds the same bytes, the name of that one stands for it.
`python -m harness.worker.trace --catalog` rebuilds them.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from harness.architecture.ask_worker import ask_worker
from harness.architecture.card_kernels import family, kernels_of
from harness.architecture.skeleton_source import fingerprint
from harness.architecture.traced_memory import TracedMemory
from harness.core.methods.config import settings_of
from harness.core.precisions import PRECISIONS
from harness.core.text import as_written
from harness.data import DATA
from harness.machine.cache import keep, kept, kept_names

SHIPPED = DATA / "traces.jsonl"
TRACE_S = 300.0
# What records in the cache are called; another number when they hold other fields than those of an earlier version did.
_KEPT = "trace2"
# What changes no shape, and so no skeleton, but what an MLP holds while it runs.
_ACTIVATIONS = ("hidden_act", "hidden_activation")
# What was built in this process, for a cache that cannot be written: by key, precision and family of cards.
_BUILT: dict[tuple[str, str, str], TracedMemory] = {}

Records = dict[str, TracedMemory | str]  # by "precision capability"; a name stands for another record


def key_of(config: Mapping[str, Any]) -> str:
    """Hash what a config says about memory; 16 hex digits."""
    said = [fingerprint(config), *(config.get(name) for name in _ACTIVATIONS)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def packed_key(config: Mapping[str, Any], precision: str) -> str:
    """Return the key of one precision: where weights are stored packed, how they are is part of it."""
    if not PRECISIONS[precision].is_packed_for_cards:
        return key_of(config)
    said = json.dumps([key_of(config), settings_of(config)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def shipped_records(key: str) -> Records:
    """Return the records that are shipped under a key (`key_of`); unpacks one line."""
    try:
        found = SHIPPED.stat()
    except FileNotFoundError:
        return {}
    return _shipped_records(key, (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=8)  # every precision and every card asks for the records of the same model
def _shipped_records(key: str, _: tuple[int, int]) -> Records:
    """Return what lies under a key in a file that was written at this time, and is of this size."""
    lines = SHIPPED.read_bytes()
    start = lines.find(b'["%s",' % key.encode())
    return unpack(lines[start : lines.index(b"\n", start)])[1] if start >= 0 else {}


def pack(key: str, records: Records) -> bytes:
    """Write the line of an architecture."""
    packed = zlib.compress(msgspec.json.encode(records), 9)
    return msgspec.json.encode([key, binascii.b2a_base64(packed, newline=False).decode()])


def unpack(line: bytes) -> tuple[str, Records]:
    """Read the line of an architecture."""
    key, packed = msgspec.json.decode(line, type=tuple[str, str])
    return key, msgspec.json.decode(zlib.decompress(binascii.a2b_base64(packed)), type=Records)


def record_name(precision: str, capability: str | None) -> str:
    """Return what the record of a precision for cards of a compute capability goes by."""
    return f"{precision} {family(kernels_of(capability), precision)}"


def shipped_trace(
    config: Mapping[str, Any], precision: str, capability: str | None = None, attention: str | None = None
) -> TracedMemory | None:
    """Return the record that is shipped for this config and cards of this compute capability, if any.

    `attention` is the implementation that is asked for; None is what transformers chooses.
    """
    found = find(shipped_records(packed_key(config, precision)), precision, capability)
    return found if found is not None and attention in (None, found.attention) else None


def find(records: Records, precision: str, capability: str | None = None) -> TracedMemory | None:
    """Return one of the records of an architecture, or what stands for it."""
    found = records.get(record_name(precision, capability))
    while isinstance(found, str):
        found = records.get(found)
    return None if found is None else _standing(found, precision, family(kernels_of(capability), precision))


def _standing(record: TracedMemory, precision: str, cards: str) -> TracedMemory:
    """Let a record stand for another precision, or other cards, that hold the same bytes."""
    dtypes = PRECISIONS[record.precision].dtype, PRECISIONS[precision].dtype
    names = tuple(name.replace(f" {dtypes[0]}[", f" {dtypes[1]}[") for name in record.names)
    return msgspec.structs.replace(record, precision=precision, capability=cards, names=names)


def record_for(
    config: Mapping[str, Any], precision: str, cache: Path, capability: str | None = None, attention: str | None = None
) -> TracedMemory | None:
    """Return the record of a config in a precision for cards of a compute capability, shipped or kept in `cache`; starts nothing.

    `attention` is the implementation that is asked for; None is what transformers chooses. None if there is none; planning then
    uses its formulas (`planning.cost.activations`).
    """
    shipped = shipped_trace(config, precision, capability, attention)
    return built_trace(config, precision, cache, capability, attention) if shipped is None else shipped


def built_trace(
    config: Mapping[str, Any], precision: str, cache: Path, capability: str | None = None, attention: str | None = None
) -> TracedMemory | None:
    """Return the record that was built for this config before, and is kept in `cache`, if any; starts nothing."""
    cards, key = _cards(precision, capability, attention), packed_key(config, precision)
    if (built := _BUILT.get((key, precision, cards))) is not None:
        return built
    end = f"-{key}-{precision}-{cards}.json"
    if not any(name.startswith(f"{_KEPT}-") and name.endswith(end) for name in kept_names(cache)):
        return None  # without asking which transformers is installed, which takes longer than all else
    return kept(cache / _name(config, precision, cards), TracedMemory)


def build_record(
    config: Mapping[str, Any], precision: str, cache: Path, capability: str | None = None, attention: str | None = None
) -> TracedMemory:
    """Return the record of a config as `record_for` does, else have a worker trace it (seconds) and keep it in `cache`.

    Raises:
        UsageError: the worker could not trace it.
    """
    found = record_for(config, precision, cache, capability, attention)
    if found is not None:
        return found
    cards, of = _cards(precision, capability, attention), family(kernels_of(capability), precision)
    what = f"no trace for model_type {as_written(config.get('model_type'))} in {precision}"
    asked = {"config": config, "precision": precision, "capability": of, "attention": attention}
    text = ask_worker("trace", asked, what, TRACE_S)
    keep(cache / _name(config, precision, cards), text)
    built = msgspec.json.decode(text, type=TracedMemory)
    _BUILT[packed_key(config, precision), precision, cards] = built
    return built


def _cards(precision: str, capability: str | None, attention: str | None) -> str:
    """Return what the records of one family of cards go by, and of an attention that is asked for."""
    return "-".join((family(kernels_of(capability), precision), *([attention] if attention else [])))


def _name(config: Mapping[str, Any], precision: str, cards: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        libraries = version("transformers")
    except PackageNotFoundError:
        libraries = "none"
    return f"{_KEPT}-{libraries}-{packed_key(config, precision)}-{precision}-{cards}.json"
