"""Rebuild the records that are shipped, and print what changed: for a new release of transformers, or of what traces."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import msgspec

from harness.architecture import traces
from harness.architecture.ask_worker import ask_worker
from harness.architecture.card_kernels import BEFORE_FLASH, WITH_FLASH
from harness.architecture.traced_memory import TracedMemory, evaluate
from harness.architecture.traces import Records
from harness.catalog import shipped
from harness.core.errors import UsageError
from harness.machine.atomic import write_bytes
from harness.worker.trace.record import source
from harness.worker.trace.reserve import reserved_of

SHIPPED_PRECISIONS = ("bf16", "int8", "int4", "fp16", "fp32")
BEFORE_FLASH_TOO = ("fp16", "int8", "int4")  # bfloat16 is emulated on old cards, and float32 needs no record of its own there
COMPARED = ((1, 64, 16), (1, 4096, 16), (8, 4096, 16), (1, 32768, 16))  # batch, prompt, new tokens
CHANGED, ALIKE = 0.001, 0.0005
LIMIT_S = 3600.0  # of one record: minutes where nobody else computes

# Records that may hold the same bytes as another.
STAND_INS = {
    f"fp16 {WITH_FLASH}": f"bf16 {WITH_FLASH}",
    f"fp16 {BEFORE_FLASH}": f"fp16 {WITH_FLASH}",
    f"int8 {BEFORE_FLASH}": f"int8 {WITH_FLASH}",
}


def rebuild(names: Sequence[str], precisions: Sequence[str], capabilities: Sequence[str], missing: bool = False) -> int:
    """Trace models of the catalog, all if none is named, and put their records into data/traces.jsonl, printing what changed.

    With `missing` those stay that the libraries that are installed have made. Returns 1 if a model is left without a record in some
    precision, else 0.
    """
    known = shipped.catalog()
    by_key, kinds = dict[str, str](), dict[str, str]()  # the first model of each key, and the first key of each type
    for name, entry in known.items():
        by_key.setdefault(traces.key_of(entry.config), name)
        kinds.setdefault(str(entry.config["model_type"]), traces.key_of(entry.config))
    shelf, done = _shelf(), Counter[str]()
    for gone in shelf.keys() - by_key.keys():
        print(f"{gone}: gone, no model of the catalog has this key any more")
        del shelf[gone]
    wanted = {traces.key_of(known[shipped.hub_id(name)].config) for name in names} or by_key
    for key in (key for key in by_key if key in wanted):
        config, records = known[by_key[key]].config, shelf.setdefault(key, {})
        for precision, capability in product(precisions, capabilities):
            old = traces.find(records, precision, capability)
            if (capability == WITH_FLASH or precision in BEFORE_FLASH_TOO) and not (missing and old and old.source == source()):
                check = precision == "bf16" and kinds[str(config["model_type"])] == key  # one of each kind with all its layers
                outcome, told = _remade(records, config, (precision, capability), check)
                done[outcome] += 1
                print(f"{by_key[key]} {precision} {capability}: {told}", flush=True)
        _write(shelf)
    print(", ".join(f"{count} {outcome}" for outcome, count in done.items()), f"{traces.SHIPPED.stat().st_size} bytes")
    return int(done["without a record"] > 0)


def replay_again(names: Sequence[str], precisions: Sequence[str]) -> None:
    """Put into the shipped records of these models, or of all, what torch's allocator takes beyond what is allocated; print it.

    A record that stands for others tells for all of them.
    """
    known, shelf = shipped.catalog(), _shelf()
    for name in [shipped.hub_id(name) for name in names] or known:
        records = shelf.get(traces.key_of(known[name].config), {})
        for goes_by, one in list(records.items()):
            if isinstance(one, TracedMemory) and one.precision in precisions and one.reserved is None:
                gaps = reserved_of(known[name].config, one.precision, one.capability)
                records[goes_by] = msgspec.structs.replace(one, reserved=gaps)
                print(f"{name} {goes_by}: {gaps}", flush=True)
                _write(shelf)


def _remade(records: Records, config: Mapping[str, Any], wanted: tuple[str, str], check: bool) -> tuple[str, str]:
    """Trace one record of an architecture anew, in a process of its own; return what became of it, in a word and in a sentence.

    Whatever ends that process is the architecture's: an error of any kind, a crash of torch's, a lack of memory. It is printed,
    and the formulas are left.
    """
    precision, capability = wanted
    start, before, name = time.monotonic(), traces.find(records, *wanted), traces.record_name(*wanted)
    asked = {"config": config, "precision": precision, "capability": capability, "check": check}
    try:
        text = ask_worker("trace", asked, "no record", LIMIT_S)
    except UsageError as error:
        records.pop(name, None)
        return "without a record", str(error)[:200]
    made = msgspec.json.decode(text, type=TracedMemory)
    other = _stand_in(records, made)
    records[name] = other or made
    told = _change(before, made)
    return told.split()[0], f"{told}{f', as {other}' if other else ''}, {time.monotonic() - start:.0f} s"


def _stand_in(records: Records, made: TracedMemory) -> str | None:
    """Return the name of the record that holds the same bytes for every workload that is compared, if there is one."""
    other = STAND_INS.get(traces.record_name(made.precision, made.capability))
    kept = traces.find(records, *other.split()) if other else None
    if kept is None or kept.attention != made.attention:
        return None
    changes = _changes(msgspec.structs.replace(kept, capability=made.capability), made)
    return other if all(abs(change) <= ALIKE for change in changes) else None


def _changes(before: TracedMemory, after: TracedMemory) -> Iterator[float]:
    """Yield by how much the allocated bytes of each compared workload change, as a share; infinite where one says nothing."""
    for workload in COMPARED:
        old, now = (evaluate(one, *workload) for one in (before, after))
        yield now.allocated_bytes / old.allocated_bytes - 1 if old and now else float("inf") if old or now else 0.0


def _change(before: TracedMemory | None, after: TracedMemory) -> str:
    """Say what a record gives that the one before it did not."""
    if before is None:
        return "added"
    told = [f"{change:+.2%} at {load[0]} x {load[1]}" for load, change in zip(COMPARED, _changes(before, after), strict=True)
            if abs(change) > CHANGED]  # fmt: skip
    return f"changed from {before.source}: {', '.join(told)}" if told else "unchanged"


def _shelf() -> dict[str, Records]:
    """Read all that is shipped; nothing of what an earlier fitmatrix wrote in another form."""
    try:
        return dict(traces.unpack(line) for line in traces.SHIPPED.read_bytes().splitlines())
    except (FileNotFoundError, msgspec.DecodeError):
        return {}


def _write(shelf: Mapping[str, Records]) -> None:
    lines = (traces.pack(key, records) + b"\n" for key, records in sorted(shelf.items()) if records)
    write_bytes(traces.SHIPPED, b"".join(lines))
