"""Results on disk: one JSON object a line in `results.jsonl`, appended whole and at once, never rewritten."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from harness.case import SCHEMA, Result, encode
from harness.errors import StoreError

NAME = "results.jsonl"

# From a schema number to what turns its plain form into that of the next; old lines are upgraded on read.
UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_LINES: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class Store:
    """The results of one directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def prepare(self) -> None:
        """Make the directory and the file, before anything is measured.

        Raises:
            StoreError: the place cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise StoreError(
                self.path, f"cannot write results here ({error.strerror}); choose another directory with --results"
            ) from None

    def append(self, result: Result) -> None:
        """Add one result: under a lock, in one write, and on the disk when this returns.

        Raises:
            StoreError: the disk is full or the file cannot be written; what was there before is intact.
        """
        line = encode(result) + b"\n"
        try:
            with FileLock(f"{self.path}.lock"), self.path.open("r+b" if self.path.exists() else "w+b", buffering=0) as file:
                _append(file.fileno(), line)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise StoreError(self.path, f"cannot append the result of {result.id}: {why}") from None

    def read(self) -> tuple[list[Result], list[StoreError]]:
        """Return the results in file order, and one error for each line that is none.

        Raises:
            StoreError: there is no such file.
        """
        return read(self.path)


def _append(descriptor: int, line: bytes) -> None:
    """Write at the end; a line that an earlier run left without its newline is closed first, and a short write undone."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end:
        os.lseek(descriptor, end - 1, os.SEEK_SET)
        if os.read(descriptor, 1) != b"\n":
            line = b"\n" + line
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def read(path: Path) -> tuple[list[Result], list[StoreError]]:
    """Return the results of a file in file order, and one error for each line that is none.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(path, "no results here; run: pytest cases/ --results DIR") from None
    except OSError as error:
        raise StoreError(path, f"cannot be read: {error.strerror}") from None
    results: list[Result] = []
    problems: list[StoreError] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            results.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            words = repr(str(error))[1:-1][:300]  # it may quote the line, and that may hold anything
            problems.append(StoreError(path, f"not a result, set aside: {words}", number))
        except _TooNew as error:
            problems.append(StoreError(path, str(error), number))
    return results, problems


class _TooNew(Exception):
    pass


def decode(line: bytes) -> Result:
    """Read one line of any schema up to ours.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: not a result.
    """
    plain = _LINES.decode(line)
    schema = plain.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise msgspec.ValidationError("it has no schema number")
    if schema > SCHEMA:
        raise _TooNew(f"has format {schema}, and this version reads up to {SCHEMA}; update fitmatrix")
    for version in range(schema, SCHEMA):
        plain = UPGRADES[version](plain)
    return msgspec.convert(plain, Result)
