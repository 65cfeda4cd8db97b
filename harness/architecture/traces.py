"""Records of traced memory: shipped for the catalog, built once by a worker for other models and kept. Nothing here needs torch.

`data/traces.jsonl` has a line for each architecture and precision, `[key, precision, record]`; where two precisions hold the same
bytes, the name of the other stands for the record. `python -m harness.worker.trace --catalog` rebuilds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.architecture.ask_worker import ask_worker
from harness.architecture.skeleton_source import fingerprint
from harness.architecture.traced_memory import TracedMemory
from harness.data import DATA
from harness.machine.atomic import write_bytes

SHIPPED = DATA / "traces.jsonl"
TRACE_S = 300.0
# What records in the cache are called; another number when they hold more than those of an earlier version did.
_KEPT = "trace1"
# What changes no shape, and so no skeleton, but what an MLP holds while it runs.
_ACTIVATIONS = ("hidden_act", "hidden_activation")

Line = tuple[str, str, TracedMemory | str]


def key_of(config: Mapping[str, Any]) -> str:
    """Hash what a config says about memory; 16 hex digits."""
    said = [fingerprint(config), *(config.get(name) for name in _ACTIVATIONS)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def shipped_trace(config: Mapping[str, Any], precision: str) -> TracedMemory | None:
    """Return the record that is shipped for this config, if any. Reads one line, decodes nothing else."""
    if not SHIPPED.exists():
        return None
    lines, key = SHIPPED.read_bytes(), key_of(config)
    for _ in range(2):  # the second time for the precision that the first stands for
        start = lines.find(b'["%s","%s",' % (key.encode(), precision.encode()))
        if start < 0:
            return None
        found = msgspec.json.decode(lines[start : lines.index(b"\n", start)], type=Line)[2]
        if isinstance(found, TracedMemory):
            return found
        precision = found
    return None


def record_for(config: Mapping[str, Any], precision: str, cache: Path, build: bool = False) -> TracedMemory | None:
    """Return the record of a config in a precision: shipped, kept in `cache`, or with `build` traced by a worker (seconds).

    None if there is none; planning then uses its formulas (`planning.cost.activations`).

    Raises:
        UsageError: the worker could not trace it; only with `build`.
    """
    found = shipped_trace(config, precision)
    if found is not None:
        return found
    if not build and not any(cache.glob(f"{_KEPT}-*-{key_of(config)}-{precision}.json")):
        return None  # without asking which transformers is installed, which takes longer than all else
    kept = cache / f"{_name(config, precision)}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=TracedMemory)
    except (FileNotFoundError, msgspec.DecodeError):  # not built yet, or by a fitmatrix that wrote other fields
        return _built(config, precision, kept) if build else None


def _name(config: Mapping[str, Any], precision: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        libraries = version("transformers")
    except PackageNotFoundError:
        libraries = "none"
    return f"{_KEPT}-{libraries}-{key_of(config)}-{precision}"


def _built(config: Mapping[str, Any], precision: str, kept: Path) -> TracedMemory:
    what = f"no trace for model_type {config.get('model_type')!r} in {precision}"
    text = ask_worker("trace", {"config": config, "precision": precision}, what, TRACE_S)
    write_bytes(kept, text)
    return msgspec.json.decode(text, type=TracedMemory)
