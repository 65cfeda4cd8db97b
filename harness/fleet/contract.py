"""The contract of a fleet: which cases must come back from which machines, and which shards were handed out for them.

The driver keeps it, and it alone decides: a shard or a receipt counts if its digest stands here. `terms` never change, `digest` is
theirs; `issued` grows with each attempt. A shard repeats what a machine needs of it, and repeating gives no authority.
"""

from __future__ import annotations

import codecs
import hashlib
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from harness.core.errors import UsageError
from harness.core.records import Case, Record
from harness.core.text import as_written
from harness.core.units import MIB
from harness.machine import atomic
from harness.machine.regular import read_regular

CONTRACT_SCHEMA = 1
CONTRACT, SHARDS = "contract.json", "shards"

MAP = "device-map"  #: the option whose value in a contract is the map itself, as JSON, and not the name of a file

CLOCK_SLACK = timedelta(minutes=5)  # clocks that are kept by NTP differ by less than a second
_MOST_BYTES = 256 * MIB  # a contract of a million cases
_R = TypeVar("_R", bound=Record)
Words = dict[str, str | list[str] | bool]  #: options of a run by name, as they are typed


class MachineClass(Record, frozen=True, kw_only=True):
    """A kind of machine: its cards by name or size, its RAM, and how the engines reach one.

    `machines` are names that its machines go by; `runs_on` are labels of a GitHub runner, `sbatch` options of Slurm's sbatch,
    `labels` what a node of Ray must be labeled with, by key one value or one of several.
    `threads` are those that torch computes with there; None: as many as in most results of the class.
    """

    name: str
    gpus: tuple[str, ...] = ()
    ram_bytes: int | None = None
    threads: int | None = None
    machines: tuple[str, ...] = ()
    runs_on: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    labels: dict[str, tuple[str, ...]] = {}


class Expected(Record, frozen=True, kw_only=True):
    """A case that one machine of a class must show."""

    machine_class: str
    case: Case

    @property
    def key(self) -> str:
        return f"{self.machine_class}:{self.case.id}"


class Terms(Record, frozen=True, kw_only=True):
    """What was agreed on. `models` says how each model was asked for, `faults` why a class of the fleet file has no cases."""

    made_at: str
    classes: tuple[MachineClass, ...]
    cases: tuple[Expected, ...]
    models: dict[str, str]
    options: Words
    versions: dict[str, str]
    attempts: int
    case_timeout_s: float
    faults: dict[str, str] = {}


class Shard(Record, frozen=True, kw_only=True):
    """Cases for one machine of a class. `contract` is the digest of the terms, `attempt` counts from 1."""

    schema: int = CONTRACT_SCHEMA
    contract: str
    name: str
    attempt: int
    made_at: str
    deadline_s: float
    machine_class: MachineClass
    models: dict[str, str]
    options: Words
    versions: dict[str, str]
    cases: tuple[Case, ...]

    @property
    def since(self) -> str:
        """The moment before which no result is one of this contract's."""
        return utc(parse_utc(self.made_at) - CLOCK_SLACK)

    def key(self, case: Case) -> str:
        """Return what a case goes by in the contract."""
        return Expected(machine_class=self.machine_class.name, case=case).key


class Issued(Record, frozen=True, kw_only=True):
    """A shard that was handed out, by its digest."""

    shard: str
    digest: str
    machine_class: str
    attempt: int
    at: str
    deadline_s: float
    keys: tuple[str, ...]


class Contract(Record, frozen=True, kw_only=True):
    """The terms, their digest, and what was handed out so far."""

    schema: int = CONTRACT_SCHEMA
    digest: str
    terms: Terms
    issued: tuple[Issued, ...] = ()

    def machine_class(self, name: str) -> MachineClass:
        """Return the class of this name."""
        return next(one for one in self.terms.classes if one.name == name)

    def by_key(self) -> dict[str, list[Issued]]:
        """Return the shards that each case was handed out with, oldest first."""
        found: dict[str, list[Issued]] = {one.key: [] for one in self.terms.cases}
        for issued in self.issued:
            for key in issued.keys:
                found[key].append(issued)
        return found


def digest_of(record: Record) -> str:
    """Return the SHA-256 of a record's JSON, with the keys of its dicts in order."""
    return hashlib.sha256(msgspec.json.encode(record, order="deterministic")).hexdigest()


def utc(moment: datetime | None = None) -> str:
    """Write a moment, or this one, as all files of a fleet do: 2026-11-29T18:54:13Z."""
    return f"{moment or datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def parse_utc(text: str) -> datetime:
    """Read what `utc` wrote, and the moments of results. Raises ValueError: it is no such moment."""
    return datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)


def read_contract(place: Path) -> Contract:
    """Read a contract, or that of a directory.

    Raises:
        UsageError: it is none, or its terms were changed after they were agreed on.
        OSError: it cannot be read.
    """
    path = place / CONTRACT if place.is_dir() else place
    found = read_record(path, Contract, "contract")
    if (now := digest_of(found.terms)) != found.digest:
        raise UsageError(f"{path}: its terms have the digest {now[:12]}, not {found.digest[:12]}: it was changed; plan it again")
    return found


def read_record(path: Path, kind: type[_R], what: str) -> _R:
    """Read a file of a fleet.

    Raises:
        UsageError: there is none, or it holds something else or what another version wrote.
        OSError: it cannot be read.
    """
    try:
        text = read_regular(path, _MOST_BYTES).removeprefix(codecs.BOM_UTF8)  # as editors of Windows save it
        plain: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
        if (schema := plain.get("schema")) != CONTRACT_SCHEMA:
            raise UsageError(f"{path}: has format {as_written(schema)}, and this version reads {CONTRACT_SCHEMA}; is it a {what}?")
        return msgspec.convert(plain, kind)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no {what} here; fitmatrix fleet plan writes them") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is no {what} ({str(error)[:200]}); fetch it again from where it was written") from None


def write_record(path: Path, record: Record) -> None:
    """Write a file of a fleet whole or not at all. Raises OSError: it cannot be written."""
    atomic.write_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
