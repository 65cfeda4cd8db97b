"""Results on disk: one JSON object a line in `results.jsonl`, appended whole and at once, never rewritten.

Runs may share a directory: each line is written under a lock, `results.jsonl.lock`, which the kernel lets go when its holder
dies, so a lock file that was left behind locks nobody out. Whatever a file holds, each whole result in it is read.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec
from filelock import FileLock, Timeout

from harness.core.errors import StoreError
from harness.core.placements import PLACEMENTS
from harness.core.records import SCHEMA, Case, Result, encode_record
from harness.core.text import plural
from harness.core.units import KIB, MIB, format_size
from harness.machine.garbage import uncollected
from harness.machine.regular import open_regular
from harness.measure.protocol import MOST_ROUND_TOKENS
from harness.results.needed import completed

NAME = "results.jsonl"

# The most that a line takes, all but always less: the log's tail, each byte of it escaped, and timeline, phases, maps, answers.
_LINE_BYTES = 320 * KIB
LONGEST_BYTES = 64 * MIB  # what a day's run takes is some MiB; what is longer is no line of ours
_MOST_TORN = 100  # whole results behind torn ones on one line
_MOST_TOLD = 10  # lines that are no results, each told by itself
_SAMPLE_BYTES = 24  # a float, written out
_PATIENCE_S = 60.0  # another run holds the lock for some milliseconds a result
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZIP = b"PK\x03\x04"
_ELSEWHERE = "choose another directory with --results"
# Where a result begins. In the text of another one the quotes would be escaped.
_BEGIN = re.compile(rb'(?=\{"schema"\s*:)')

# From a schema number to what turns its plain form into that of the next; old lines are upgraded on read.
UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


class _Numbered(msgspec.Struct):
    """A line of any schema, of which the number alone is read."""

    schema: Any = None


_NUMBERS, _RESULTS = msgspec.json.Decoder(_Numbered), msgspec.json.Decoder(Result)
_OLDER: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class Store:
    """The results of one directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.unwritten: list[Result] = []  #: what could not be appended so far, oldest first
        self.late = 0  #: how many results could not be appended at once

    def prepare(self, to_come_bytes: int = 0) -> None:
        """Make the directory and the file, before anything is measured, and try what appending will need.

        Raises:
            StoreError: the place cannot be written to or locked, or has no room for `to_come_bytes`.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.path.touch()
            open_regular(self.path, os.O_RDWR | os.O_APPEND).close()
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
        """Add one result, behind those that could not be added before; each is on the disk when this returns.

        Raises:
            StoreError: the disk is full or the file cannot be written; what was there is intact, and what was to be added is kept.
        """
        self.unwritten.append(result)
        try:
            self.settle()
        except StoreError:
            self.late += 1
            raise

    def settle(self) -> None:
        """Add what could not be added so far. Raises StoreError: some of it still cannot."""
        while self.unwritten:
            self._append(self.unwritten[0])
            del self.unwritten[0]

    def _append(self, result: Result) -> None:
        """Add a result under a lock, in one write."""
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
            with suppress(OSError):  # what was written is written
                lock.release()

    def read(self) -> tuple[list[Result], list[StoreError]]:
        """Return the results in file order, and one error for each line that is none.

        Raises:
            StoreError: there is no such file.
        """
        return read(self.path)


def settle(store: Store) -> str | None:
    """Write what could not be written during a run, where it belongs or else anywhere; say what became of it, if there is any."""
    try:
        store.settle()
    except StoreError as error:
        return _rescue(store, str(error))
    return f"{plural(store.late, 'result')} could not be written at once; now all are in {store.path}" if store.late else None


def _rescue(store: Store, why: str) -> str:
    """Write what a store does not take to a directory for temporary files; say in a sentence where it is, or that it is nowhere."""
    count = plural(len(store.unwritten), "result")
    try:
        other = Store(Path(tempfile.mkdtemp(prefix="fitmatrix-rescued-")))
        for result in store.unwritten:
            other.append(result)
    except (OSError, StoreError):
        names = ", ".join(result.id for result in store.unwritten)
        return f"{why}; nor could a temporary directory take it, so {count} of this run are lost: {names}"
    return f"{why}; {count} of this run: {other.path}; make room, then: cat {other.path} >> {store.path}"


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


@uncollected()
def read(path: Path) -> tuple[list[Result], list[StoreError]]:
    """Return the results of a file in file order, and one error for each line that is none; where they are many, one for all.

    Raises:
        StoreError: the file cannot be read.
    """
    results: list[Result] = []
    problems: list[StoreError] = []
    wrong = 0
    try:
        with open_regular(path) as stream:
            for number, one in read_lines(stream):
                if isinstance(one, Result):
                    results.append(one)
                elif (wrong := wrong + 1) <= _MOST_TOLD:
                    problems.append(StoreError(path, one, number))
    except FileNotFoundError:
        raise StoreError(path, "no results here; run: pytest cases/ --results DIR") from None
    except NotADirectoryError:
        raise StoreError(path.parent, f"is a file: name the directory that holds {NAME}") from None
    except OSError as error:
        raise StoreError(path, f"cannot be read: {error.strerror or error}") from None
    if wrong > _MOST_TOLD:
        first = str(problems[0]).removeprefix(f"{path}:")
        problems = [StoreError(path, f"{wrong:,} lines are no results; the first is line {first}")]
    return results, problems


def read_telling(path: Path, tell: Callable[[str], None]) -> list[Result]:
    """Return the results of a file in file order; `tell` hears of each line that is none. Raises StoreError: it cannot be read."""
    results, problems = read(path)
    for problem in problems:
        tell(str(problem))
    return results


def read_lines(stream: IO[bytes]) -> Iterator[tuple[int, Result | str]]:
    """Yield each result with the number of its line, and for each line that is none why; never more than one line is held."""
    number = 0
    while line := stream.readline(LONGEST_BYTES):
        number += 1
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield number, "is in UTF-16, as an editor or a shell of Windows saves it, and nothing was read: save it as UTF-8"
            return
        if number == 1 and line.startswith(_ZIP):
            yield number, "is a zip archive, and nothing was read: unpack it, and name what was in it"
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == LONGEST_BYTES:
            yield number, f"is longer than {format_size(LONGEST_BYTES)}, and nothing behind it was read"
            return
        ones = read_line(line)
        yield from ((number, one) for one in ones if isinstance(one, Result))
        yield from ((number, one) for one in [one for one in ones if isinstance(one, str)][:1])


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
    return [_read_one(piece.strip(b"\0 \t\r\n")) for piece in _BEGIN.split(line, _MOST_TORN) if piece.strip()]


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
    schema = _NUMBERS.decode(line).schema
    if not isinstance(schema, int) or schema < 1:
        raise msgspec.ValidationError("it has no schema number")
    if schema > SCHEMA:
        raise _TooNew(f"has format {schema}, and this version reads up to {SCHEMA}; update fitmatrix")
    if schema == SCHEMA:
        return completed(_RESULTS.decode(line))
    plain = _OLDER.decode(line)
    for version in range(schema, SCHEMA):
        plain = UPGRADES[version](plain)
    return completed(msgspec.convert(plain, Result))
