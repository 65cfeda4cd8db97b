"""Results on disk: one JSON object a line in `results.jsonl`, appended whole and at once, never rewritten.

Runs may share a directory: each line is written under a lock, `results.jsonl.lock`, which the kernel lets go when its holder
dies, so a lock file that was left behind locks nobody out. Whatever a file holds, each whole result in it is read.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from harness.core.errors import StoreError
from harness.core.placements import PLACEMENTS
from harness.core.records import SCHEMA, Case, Result, encode_record
from harness.core.units import KIB, MIB, format_size
from harness.measure.protocol import MOST_ROUND_TOKENS
from harness.results.needed import completed

NAME = "results.jsonl"

# The most that a line takes, all but always less: the log's tail, each byte of it escaped, and timeline, phases, maps, answers.
_LINE_BYTES = 320 * KIB
_SAMPLE_BYTES = 24  # a float, written out
_PATIENCE_S = 60.0  # another run holds the lock for some milliseconds a result
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = "choose another directory with --results"
# Where a result begins. In the text of another one the quotes would be escaped.
_BEGIN = re.compile(rb'(?=\{"schema"\s*:)')

# From a schema number to what turns its plain form into that of the next; old lines are upgraded on read.
UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_LINES: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class Store:
    """The results of one directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def prepare(self, to_come_bytes: int = 0) -> None:
        """Make the directory and the file, before anything is measured, and try what appending will need.

        Raises:
            StoreError: the place cannot be written to or locked, or has no room for `to_come_bytes`.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
            _sync(folder)
        except OSError as error:
            raise StoreError(self.path, f"cannot write results here ({error.strerror}); {_ELSEWHERE}") from None
        try:
            with self._locked():
                pass
        except OSError as error:
            raise StoreError(f"{self.path}.lock", f"cannot be opened ({error.strerror}); remove it, or {_ELSEWHERE}") from None
        check_room(folder, to_come_bytes, "the results of this run", "--results")

    def append(self, result: Result) -> None:
        """Add one result: under a lock, in one write, and on the disk when this returns.

        Raises:
            StoreError: the disk is full or the file cannot be written; what was there before is intact.
        """
        line = encode_record(result) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up meanwhile
            with self._locked(), self.path.open("a+b", buffering=0) as file:
                _append(file.fileno(), line)
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise StoreError(self.path, f"cannot append the result of {result.id}: {why}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the file.

        Raises:
            StoreError: the file system has no locks, or another process does not let go.
            OSError: the lock file cannot be opened.
        """
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            raise StoreError(
                self.path, f"another process has held {self.path.name}.lock for {_PATIENCE_S:.0f} s; end that run, or {_ELSEWHERE}"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            raise StoreError(
                self.path, "the file system has no locks, and two runs could mix their lines; choose a local disk with --results"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def read(self) -> tuple[list[Result], list[StoreError]]:
        """Return the results in file order, and one error for each line that is none.

        Raises:
            StoreError: there is no such file.
        """
        return read(self.path)


def _append(descriptor: int, line: bytes) -> None:
    """Write at the end; a line that an earlier run left without its newline is closed first, and a short write undone.

    The descriptor must be open for appending: even a writer that knows no lock then cannot write over another's line.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end:
        os.lseek(descriptor, end - 1, os.SEEK_SET)
        if os.read(descriptor, 1) != b"\n":
            line = b"\n" + line
    with ExitStack() as undo:
        undo.callback(os.ftruncate, descriptor, end)
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        undo.pop_all()  # Ctrl-C from here on loses nothing
    try:
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _sync(folder: Path) -> None:
    """Have the name of a new file on the disk too, where the system lets a directory be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def most_bytes(case: Case) -> int:
    """Return what the line of a case takes at most: a constant, and one sample a token and a round, of which noise adds some."""
    load, on_gpu = case.workload, "gpu" in PLACEMENTS[case.placement].devices
    tokens = max(load.new_tokens, MOST_ROUND_TOKENS) if on_gpu else load.new_tokens
    return _LINE_BYTES + _SAMPLE_BYTES * load.most_rounds * (tokens + 4)


def check_room(folder: Path, need_bytes: int, what: str, option: str) -> None:
    """Check that so many bytes can be written: by what is free, and by writing them, because of quotas and limits.

    The file of the trial has no name where the system can do without, and is gone in any case.

    Raises:
        StoreError: there is no room; nothing was left there.
    """
    try:
        short = shutil.disk_usage(folder).free < need_bytes
        if not short:
            _try_to_write(folder, need_bytes)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise StoreError(folder, f"cannot be written to ({error.strerror}); choose another place with {option}") from None
        short = True
    if short:
        need, free = format_size(need_bytes), format_size(shutil.disk_usage(folder).free)
        raise StoreError(
            folder, f"no room for {what}: up to {need} needed, {free} free; free some, or choose another place with {option}"
        )


def _try_to_write(folder: Path, need_bytes: int) -> None:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as trial:
        while (left := need_bytes - trial.tell()) > 0:
            trial.write(bytes(min(left, MIB)))


def file_of(place: Path) -> Path:
    """Return the file of results that a user means: the file itself, or that of a directory."""
    return place / NAME if place.is_dir() else place


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
        read_ones = read_line(line)
        results += (one for one in read_ones if isinstance(one, Result))
        wrong = [one for one in read_ones if isinstance(one, str)]
        problems += (StoreError(path, why, number) for why in wrong[:1])
    return results, problems


def read_line(line: bytes) -> list[Result | str]:
    """Return the result of a line, or why it is none.

    Behind a line that was cut short another may stand, and so it may behind the zeros that a journalled file system leaves where
    it had promised room and written nothing. Then the line is taken apart where results begin, and the whole ones are taken.
    """
    if not line.strip():
        return []
    alone = _read_one(line)
    if isinstance(alone, Result):
        return [alone]
    return [_read_one(piece.strip(b"\0 \t\r")) for piece in _BEGIN.split(line) if piece.strip()]


def _read_one(text: bytes) -> Result | str:
    try:
        return decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        words = repr(str(error))[1:-1][:300]  # it may quote the line, and that may hold anything
        if words.startswith("Object contains unknown field"):
            return f"has fields that this version does not know ({words}); update fitmatrix"
        return f"not a result, set aside: {words}"
    except _TooNew as error:
        return str(error)


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
    return completed(msgspec.convert(plain, Result))
