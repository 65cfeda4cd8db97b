"""Receipts: what a machine says it did for a shard. Written when it begins, after each case and at the end, beside its results.

A receipt vouches for lines of the results by their SHA-256, so that a line that was changed on its way is told from what was
measured; whether the shard was asked for at all, the contract alone says.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harness.core.errors import StoreError, UsageError
from harness.core.records import Machine, Record, Result
from harness.fleet.contract import CONTRACT_SCHEMA, read_record
from harness.machine.regular import open_regular
from harness.results import store


class Receipt(Record, frozen=True, kw_only=True):
    """What became of a shard so far. `ended_at` is None while it runs, and for ever if the machine died.

    `results` has, by key, the SHA-256 of the line in `file`, which lies beside the receipt. `problem` is why nothing more came,
    `threads` what OMP_NUM_THREADS held torch to, empty if to nothing.
    """

    schema: int = CONTRACT_SCHEMA
    contract: str
    shard: str
    shard_digest: str
    attempt: int
    machine: str
    identity: str
    described: Machine
    versions: dict[str, str]
    threads: str = ""
    started_at: str
    heard_at: str
    ended_at: str | None = None
    exit_status: int | None = None
    problem: str = ""
    file: str = store.NAME
    results: dict[str, str] = {}


class Line(NamedTuple):
    """One result in a file: where its line begins, how long it is, and its SHA-256."""

    result: Result
    offset: int
    length: int
    digest: str


def file_name(shard: str) -> str:
    """Return the name of the receipt of a shard."""
    return f"receipt-{shard}.json"


def digest_of_line(line: bytes) -> str:
    """Return the SHA-256 of a line of results without what ends it."""
    return hashlib.sha256(line.strip()).hexdigest()


def read_results(path: Path) -> Iterator[Line]:
    """Yield the results of a file with their digests; a line that is no result, or several, is passed over.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        with open_regular(path) as stream:
            offset = 0
            while line := stream.readline(store.LONGEST_BYTES):
                if not offset and line.startswith(codecs.BOM_UTF8):  # as editors of Windows save it
                    offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                match store.read_line(line):
                    case [Result() as one]:
                        yield Line(one, offset, len(line), digest_of_line(line))
                offset += len(line)
    except OSError as error:
        raise StoreError(path, f"cannot be read: {error.strerror or error}") from None


def find_receipts(places: Iterable[Path]) -> list[Path]:
    """Return the receipts that are meant: files themselves, and all below directories.

    Raises:
        UsageError: there is no such place.
    """
    found: dict[Path, None] = {}
    for place in places:
        if not place.exists():
            raise UsageError(f"{place}: there is no such file or directory; name receipts, or directories with results of shards")
        several = sorted(place.rglob(file_name("*"))) if place.is_dir() else [place]
        found.update(dict.fromkeys(one.resolve() for one in several))
    return list(found)


def read_receipt(path: Path) -> Receipt:
    """Read a receipt. Raises UsageError: it is none. OSError: it cannot be read."""
    found = read_record(path, Receipt, "receipt")
    if Path(found.file).name != found.file:
        raise UsageError(f"{path}: names results elsewhere ({found.file[:80]!r}), and they lie beside it; fetch it again")
    return found
