"""Records of traced memory: shipped for the catalog, built once by a worker for other models and kept. Nothing here needs torch.

`data/traces.jsonl` has a line for each architecture and precision, `[key, precision, record]`; where two precisions hold the same
bytes, the name of the other stands for the record. `python -m harness.worker.trace --catalog` rebuilds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.architecture.skeleton import fingerprint
from harness.architecture.traced_memory import TracedMemory
from harness.core.errors import UsageError
from harness.data import DATA

SHIPPED = DATA / "traces.jsonl"
BUILD_S = 300.0
# What records in the cache are called; another number when they hold more than those of an earlier version did.
_KEPT = "trace1"
# What changes no shape, and so no skeleton, but what an MLP holds while it runs.
_ACTIVATIONS = ("hidden_act", "hidden_activation")

Line = tuple[str, str, TracedMemory | str]


def key_of(config: Mapping[str, Any]) -> str:
    """Hash what a config says about memory; 16 hex digits."""
    said = [fingerprint(config), *(config.get(name) for name in _ACTIVATIONS)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def shipped(config: Mapping[str, Any], precision: str) -> TracedMemory | None:
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

    None where there is none; the formulas of `planning.cost.memory` then have to do.

    Raises:
        UsageError: the worker could not trace it; only with `build`.
    """
    found = shipped(config, precision)
    if found is not None:
        return found
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
    text = _run_worker({"config": config, "precision": precision})
    found = msgspec.json.decode(text, type=TracedMemory)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(text)
    partial.replace(kept)
    return found


def _run_worker(asked: Mapping[str, Any]) -> bytes:
    from harness.machine.scratch import Scratch  # tempfile is slow to import

    what = f"no trace for model_type {asked['config'].get('model_type')!r} in {asked['precision']}"
    command, text = [sys.executable, "-m", "harness.worker.trace"], json.dumps(asked).encode()
    # `-m` looks in the current directory first: not the user's, which may hold anything, but the one this package lies in.
    home = DATA.parent.parent
    try:
        with Scratch() as scratch:  # importing torch makes a folder for temporary files
            settings = {**os.environ, "TMPDIR": str(scratch)}
            done = subprocess.run(command, input=text, capture_output=True, timeout=BUILD_S, check=False, cwd=home, env=settings)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{what}: its worker did not answer in {BUILD_S:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"{what}: {last.strip().removeprefix('ValueError: ')}")
    return done.stdout
