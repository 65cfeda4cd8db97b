"""Trace what a model holds on a GPU that is not there.

    python -m harness.worker.trace < {"config": {...}, "precision": "bf16"} > record.json
    python -m harness.worker.trace < {"config": ..., "precision": ..., "workloads": [{"prompt_tokens": 64, "batch": 1}, ...]}
    python -m harness.worker.trace --catalog [MODEL ...]    # rebuilds harness/data/traces.jsonl, and says what changed
    python -m harness.worker.trace --reserved [MODEL ...]   # only what torch's allocator takes beyond, in the records there are

A request may name an `attention` implementation and a compute `capability`. With workloads, all layers are run for each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture import traces
from harness.architecture.traced_memory import TracedMemory, evaluate
from harness.catalog import shipped
from harness.core.records import Record, Workload
from harness.worker.trace.direct import trace
from harness.worker.trace.record import record
from harness.worker.trace.reserve import reserved_of

TRACED_PRECISIONS = ("bf16", "fp16", "fp32", "int8", "int4")  # of the records that are shipped
COMPARED = ((1, 64, 16), (1, 4096, 16), (8, 4096, 16), (1, 32768, 16))  # batch, prompt, new tokens
CHANGED = 0.001


class TraceRequest(Record, frozen=True, kw_only=True):
    """What a trace is asked for."""

    config: dict[str, Any]
    precision: str
    workloads: tuple[Workload, ...] = ()
    attention: str | None = None
    capability: str = "8.0"


def main() -> None:
    """Answer one request from the standard input, or rebuild the records that are shipped."""
    parser = argparse.ArgumentParser(
        prog="harness.worker.trace", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", default=TRACED_PRECISIONS, help="of the shipped records")
    parser.add_argument("--catalog", nargs="*", metavar="MODEL", help="rebuild the shipped records, of these models or of all")
    parser.add_argument("--reserved", nargs="*", metavar="MODEL", help="replay the shipped records, of these models or of all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if asked.catalog is not None:
        rebuild(asked.catalog, asked.precision)
        return
    if asked.reserved is not None:
        replay_again(asked.reserved, asked.precision)
        return
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TraceRequest)
    given = request.config, request.precision
    more = request.attention, request.capability
    answer: Any = trace(*given, request.workloads, *more) if request.workloads else record(*given, *more)
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def rebuild(names: Sequence[str], precisions: Sequence[str]) -> None:
    """Trace models of the catalog, all if none is named, and put their records into data/traces.jsonl, printing what changed."""
    lines = _lines()
    for name, config in _wanted(names):
        key = traces.key_of(config)
        before = {precision: traces.shipped_trace(config, precision) for precision in TRACED_PRECISIONS}
        made = {precision: one for precision, one in before.items() if one is not None and precision not in precisions}
        for precision in precisions:
            start = time.monotonic()
            try:
                made[precision] = record(config, precision)
            except (
                ValueError,
                RuntimeError,
                TypeError,
                AttributeError,
                NotImplementedError,
            ) as error:  # told, and left to the formulas
                print(f"{name} {precision}: no record: {str(error).splitlines()[0][:200]}", flush=True)
                continue
            same = next((other for other, one in made.items() if other != precision and _alike(one, made[precision])), None)
            lines[key, precision] = msgspec.json.encode([key, precision, same or made[precision]])
            change = _change(before[precision], made[precision])
            print(f"{name} {precision}: {change}, {time.monotonic() - start:.0f} s", flush=True)
        _write(lines)


def replay_again(names: Sequence[str], precisions: Sequence[str]) -> None:
    """Put into the shipped records of these models what torch's allocator takes beyond what is allocated, printing it."""
    lines = _lines()
    for name, config in _wanted(names):
        key = traces.key_of(config)
        for precision in precisions:
            line = lines.get((key, precision))
            found = msgspec.json.decode(line, type=traces.Line)[2] if line else None
            if not isinstance(found, TracedMemory):
                continue
            made = msgspec.structs.replace(found, reserved=reserved_of(config, precision))
            lines[key, precision] = msgspec.json.encode([key, precision, made])
            print(f"{name} {precision}: {made.reserved}", flush=True)
            _write(lines)


def _wanted(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and configs of models of the catalog; of all if none is named."""
    known = shipped.catalog()
    wanted = [shipped.hub_id(name) for name in names] or list(known)
    yield from ((name, known[name].config) for name in dict.fromkeys(wanted))


def _alike(one: TracedMemory, other: TracedMemory) -> bool:
    plain = [msgspec.structs.replace(record, precision="", names=()) for record in (one, other)]
    rows = [msgspec.json.encode([_sizes(record), record.layers, record.weights_bytes, record.conditions]) for record in plain]
    return rows[0] == rows[1]


def _sizes(record: TracedMemory) -> list[Any]:
    passes = (record.prefill, record.first, record.later)
    return [
        [regime.lengths, regime.batches, regime.before, regime.cached, [(row.place, row.nbytes, row.condition, row.extra)]]
        for regimes in passes
        for regime in regimes
        for row in regime.rows
    ]


def _change(before: TracedMemory | None, after: TracedMemory) -> str:
    """Say what a record gives that the one before it did not."""
    if before is None:
        return "new"
    told = []
    for batch, prompt, new in COMPARED:
        old, now = (evaluate(one, batch, prompt, new) for one in (before, after))
        if old and now and abs(now.allocated_bytes / old.allocated_bytes - 1) > CHANGED:
            change = now.allocated_bytes / old.allocated_bytes - 1
            told.append(f"{change:+.1%} at {batch} x {prompt} ({old.allocated_bytes} -> {now.allocated_bytes} bytes)")
    return f"changed from {before.source}: {'; '.join(told)}" if told else "as before"


def _lines() -> dict[tuple[str, str], bytes]:
    if not traces.SHIPPED.exists():
        return {}
    lines = traces.SHIPPED.read_bytes().splitlines()
    return {tuple(msgspec.json.decode(line)[:2]): line for line in lines}


def _write(lines: dict[tuple[str, str], bytes]) -> None:
    partial = traces.SHIPPED.with_suffix(".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in lines.values()))
    partial.replace(traces.SHIPPED)


if __name__ == "__main__":
    main()
