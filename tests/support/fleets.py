"""Fleets for tests: contracts over scripted cases, and deliveries as machines write them, changed where a test wants them wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harness.core.records import Case, Machine, Result, encode_record
from harness.core.units import GIB
from harness.fleet import shards
from harness.fleet.contract import Contract, Expected, MachineClass, Shard, Terms, digest_of
from harness.fleet.receipt import Receipt, digest_of_line, file_name
from harness.results.store import NAME
from tests.support import builders

MADE, MEASURED = "2026-11-24T08:00:00Z", "2026-11-24T09:00:00Z"
NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
VERSIONS = {"torch": "2.13.0"}


def machine_class(name: str = "small", **changes: Any) -> MachineClass:
    """A class that `builders.machine()` is of."""
    return replace(MachineClass(name=name, ram_bytes=16 * GIB), **changes)


def contract(
    *classes: MachineClass, models: Sequence[str] = ("tiny",), precisions: Sequence[str] = ("bf16", "int8"), **changes: Any
) -> tuple[Contract, list[Shard]]:
    """A contract over RAM-only cases, and its shards, handed out once."""
    classes = classes or (machine_class(),)
    cases = [builders.case(precision, model=model) for model in models for precision in precisions]
    terms = Terms(
        made_at=MADE,
        classes=classes,
        cases=tuple(Expected(machine_class=kind.name, case=case) for kind in classes for case in cases),
        models={model: f"./{model}" for model in models},
        options={},
        versions=VERSIONS,
        attempts=3,
        case_timeout_s=60.0,
    )
    terms = replace(terms, **changes)
    agreed = Contract(digest=digest_of(terms), terms=terms)
    return shards.issue(agreed, [one.key for one in terms.cases])


def measured(of: Case, **changes: Any) -> Result:
    """The result of a case as a machine of the fleet measures it."""
    return builders.result(of, **{"at": MEASURED, "environment": {"torch": "2.13.0+cpu"}} | changes)


def deliver(folder: Path, shard: Shard, results: Sequence[Result] | None = None, **changes: Any) -> Path:
    """Write the results of a shard, all of them unless said, and its receipt; return the receipt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [encode_record(one) for one in ([measured(case) for case in shard.cases] if results is None else results)]
    (folder / NAME).write_bytes(b"".join(line + b"\n" for line in lines))
    described: Machine = builders.machine()
    cases = shard.cases if results is None else [one.case for one in results]
    receipt = Receipt(
        contract=shard.contract,
        shard=shard.name,
        shard_digest=digest_of(shard),
        attempt=shard.attempt,
        machine="",
        identity="machine-1",
        described=described,
        versions=VERSIONS,
        started_at=MADE,
        heard_at=MEASURED,
        ended_at=MEASURED,
        exit_status=0,
        results={shard.key(case): digest_of_line(line) for case, line in zip(cases, lines, strict=True)},
    )
    path = folder / file_name(shard.name)
    path.write_bytes(encode_record(replace(receipt, **changes)))
    return path
