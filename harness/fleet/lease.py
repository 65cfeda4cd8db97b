"""The lease of a machine: whoever measures a shard holds it, so that no second attempt runs beside a first.

The kernel lets go when the holder dies, and only then: a process that its cluster has given up still has the machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.core.errors import UsageError
from harness.fleet.contract import utc

LEASE = "FITMATRIX_LEASE"  #: environment variable with the path of the lease, for machines that several users share


def lease_file(node: str = "") -> Path:
    """Return where the lease of this machine lies: one place for all who may measure on it as this user.

    `{node}` in the variable becomes `node`: nodes of a cluster that are simulated on one machine have a lease each.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    given = os.environ.get(LEASE, "").replace("{node}", node)
    return Path(given or Path(tempfile.gettempdir()) / f"fitmatrix-{user}.lease")


@contextmanager
def leased(holder: str, place: Path | None = None) -> Iterator[None]:
    """Hold the machine for a shard; the log beside the lease gets a line when it is taken and when it is given back.

    Raises:
        UsageError: another shard has it.
        OSError: the lease cannot be written.
    """
    place = place or lease_file()
    log, lock = place.with_name(f"{place.name}.log"), FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"this machine measures another shard ({_holder(log)}); wait for it, or end that run") from None
    try:
        _note(log, "taken", holder)
        yield
        _note(log, "given back", holder)
    finally:
        lock.release()


def is_free(place: Path | None = None) -> bool:
    """Say whether nobody measures a shard on this machine now. Raises OSError: the lease cannot be opened."""
    lock = FileLock(place or lease_file())
    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


def _note(log: Path, what: str, holder: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{utc()} {what} by process {os.getpid()}: {holder}\n")


def _holder(log: Path) -> str:
    """Return who took the lease last, in the words of the log."""
    try:
        return log.read_text(encoding="utf-8").splitlines()[-1]
    except (OSError, IndexError):
        return "its log is gone"
