"""Whether a machine is what the contract says: of its class, with the versions agreed on, and at about the right time."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from harness.core.placements import PLACEMENTS
from harness.core.records import Machine, Result, Tier
from harness.core.text import plural
from harness.core.units import format_size
from harness.fleet.contract import CLOCK_SLACK, MachineClass, parse_utc
from harness.machine import gpus

MACHINE_NAME = "FITMATRIX_MACHINE"  #: environment variable with the name that a machine goes by in its fleet
PINNED = ("fitmatrix", "torch", "transformers", "accelerate", "bitsandbytes")

_SIZE_SHARE = 0.1  # what firmware and drivers keep: 32 GiB of RAM show as 31.2, 12 GiB of a card as 11.8
_MACHINE_ID = Path("/etc/machine-id")


def not_of_class(kind: MachineClass, machine: Machine) -> str | None:
    """Say in what a machine differs from its class; None if it does not."""
    return next(_differences(kind, machine), None)


def _differences(kind: MachineClass, machine: Machine) -> Iterator[str]:
    wanted, found = gpus.profile(kind.gpus, kind.ram_bytes).gpus, machine.gpus
    if len(wanted) != len(found):
        why = f" ({machine.gpu_problem})" if machine.gpu_problem else ""
        yield f"has {plural(len(found), 'GPU')}{why}, and class {kind.name} {len(wanted) or 'none'}"
    for asked, text, card in zip(wanted, kind.gpus, found, strict=False):
        if not _is_card(asked, card):
            seen = f"{card.model or 'a GPU'} of {_size(card.total_bytes)}"
            yield f"{card.name} is {seen}, and of class {kind.name} {asked.model or text}"
    cpu = machine.tier("cpu")
    if kind.ram_bytes is not None and cpu is not None and not _about(cpu.total_bytes, kind.ram_bytes):
        yield f"has {_size(cpu.total_bytes)} of RAM, and class {kind.name} {format_size(kind.ram_bytes)}"


def _is_card(asked: Tier, card: Tier) -> bool:
    """Say whether a card is the one asked for; a part of it, as MIG makes them, has its name and less memory."""
    if asked.model is not None:
        known = gpus.card_of(card)
        if known is None or known.name != asked.model:
            return False
    return asked.shared or _about(card.total_bytes, asked.total_bytes)


def _about(found: int | None, wanted: int | None) -> bool:
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=_SIZE_SHARE)


def _size(size: int | None) -> str:
    return "unknown size" if size is None else format_size(size)


def other_label(kind: MachineClass, labels: Mapping[str, str]) -> str | None:
    """Name the first label of a class that a node does not carry as its class asks; None if it carries all."""
    for name, values in kind.labels.items():
        if labels.get(name) not in values:
            found = f"is {labels[name]!r}" if name in labels else "is missing"
            return f"its label {name} {found}, and class {kind.name} asks for {' or '.join(map(repr, values))}"
    return None


def other_version(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Name the first package of another version than agreed on, None if there is none; what is built for a device is the same."""
    for name, version in wanted.items():
        here = found.get(name, "absent")
        if here.partition("+")[0] != version.partition("+")[0]:
            return f"{name} is {here}, and the contract says {version}"
    return None


def threads_of(result: Result) -> int | None:
    """Return how many threads torch computed with; None if it is not told, or processes shared the threads among them."""
    return None if result.loaded is None or PLACEMENTS[result.case.placement].parallel else result.loaded.threads


def other_threads(kind: MachineClass, result: Result) -> str | None:
    """Say with how many threads a result was measured, if its class has another number; None if not."""
    found = threads_of(result)
    if kind.threads in (None, found) or found is None:
        return None
    return f"measured with {plural(found, 'thread')}, and class {kind.name} has {kind.threads}: OMP_NUM_THREADS decides"


def wrong_time(moment: str, since: str, now: datetime) -> str | None:
    """Say how far a moment lies before the contract or in the future, None if neither by more than clocks differ."""
    try:
        at = parse_utc(moment)
    except ValueError:
        return f"{moment[:40]!r} is no moment"
    made = parse_utc(since)
    if at < made - CLOCK_SLACK:
        return f"{moment} is before the contract, which was made at {since}"
    return f"{moment} is in the future" if at > now + CLOCK_SLACK else None


def given_name() -> str:
    """Return the name that this machine goes by in its fleet, empty if it was given none."""
    return os.environ.get(MACHINE_NAME, "")


def machine_identity(contract: str) -> str:
    """Return what tells this machine from the others of one contract, and says nothing of it to whoever reads another."""
    try:
        own = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        own = ""
    return hashlib.sha256(f"{contract} {own or uuid.getnode()}".encode()).hexdigest()[:16]
