"""The bytes of a model's files, read in small pieces and never as a whole.

A `Folder` has files by name, a `Blob` is one of them and a `Cursor` moves forward through it. The parsers of formats see only
these three, so they read a directory and a hub repository (`checkpoint.hub`) alike. Whatever is wrong with a file leaves here,
and leaves the parsers, as a `CheckpointError` that names it.
"""

from __future__ import annotations

import json
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from harness.core.errors import CheckpointError

FIRST_BYTES = 1 << 16
MOST_FILE_BYTES = 4 << 20

DOWNLOAD_AGAIN = "download it again"
OWN_CONFIG = "use the config.json that belongs to the weights"


class Blob(Protocol):
    """One file. `name` is relative to its folder, `where` is what errors call it."""

    @property
    def name(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes, else raise CheckpointError."""

    def close(self) -> None:
        """Give back what reading needed."""


class Folder(Protocol):
    """Files by name."""

    @property
    def where(self) -> str: ...
    @property
    def remote(self) -> bool: ...

    def names(self, under: str = "") -> list[str]:
        """Return the names of the files at the top level, or of those right in the folder `under`, sorted; none where it is not."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None if there is no such file."""

    def encloses(self, name: str) -> bool:
        """Say whether a file, every link followed, is part of this folder."""

    def open(self, name: str) -> Blob:
        """Open a file that is there."""


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.where = str(path)
        try:
            self._stream = path.open("rb")
            self.size = path.stat().st_size
        except OSError as error:
            raise _unreadable(self.where, error) from error

    def read(self, offset: int, length: int) -> bytes:
        try:
            self._stream.seek(offset)
            data = self._stream.read(length)
        except OSError as error:
            raise _unreadable(self.where, error) from error
        if len(data) != length:
            raise CheckpointError(
                self.where, f"ends at byte {offset + len(data)} while byte {offset + length} is needed: {DOWNLOAD_AGAIN}"
            )
        return data

    def close(self) -> None:
        with suppress(OSError):  # all of it was read
            self._stream.close()


class Directory:
    """A directory of this machine.

    Files that stand in it under the usual names may be links to anywhere: whoever filled the directory put them there. A
    file that an *index* names (`encloses`) must lie in the directory itself; the one way out is into the blobs of a hub
    cache, because `snapshots/COMMIT/FILE` is a link to `blobs/HASH` there.
    """

    remote = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)

    def names(self, under: str = "") -> list[str]:
        try:
            return sorted(str(entry.relative_to(self.path)) for entry in (self.path / under).iterdir() if entry.is_file())
        except (FileNotFoundError, NotADirectoryError) as error:
            if under:
                return []
            raise _unreadable(self.where, error) from error
        except OSError as error:
            raise _unreadable(self.where, error) from error

    def size(self, name: str) -> int | None:
        path = self.path / name
        try:
            # A pipe or a device would block the reader: only regular files count.
            return path.stat().st_size if path.is_file() else None
        except OSError:
            return None

    def encloses(self, name: str) -> bool:
        try:
            root = self.path.resolve()
            target = (root / name).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links is a RuntimeError before Python 3.13
            return False
        in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        return target.is_relative_to(root) or in_cache

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path / name, name)


class Cursor:
    """Moves forward through a blob, from `start` to `end`, and holds one window of it at a time.

    The first window has `first` bytes; each later one is twice as large, up to `MOST_FILE_BYTES`, so that a header costs few
    requests over a network and little more than its own bytes.
    """

    def __init__(self, blob: Blob, *, start: int = 0, end: int | None = None, first: int = FIRST_BYTES) -> None:
        self.blob = blob
        self._end = blob.size if end is None else min(end, blob.size)
        self._base = start
        self._data = b""
        self._at = 0
        self._window = first

    @property
    def position(self) -> int:
        """Return the offset in the blob of the next byte."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Return how many bytes remain."""
        return self._end - self.position

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes, else raise CheckpointError."""
        stop = self._at + length
        if stop > len(self._data):
            self._refill(length)
            stop = length
        piece = self._data[stop - length : stop]
        self._at = stop
        return piece

    def skip(self, length: int) -> None:
        """Move on by `length` bytes without reading what lies outside the window."""
        self._need(length)
        if self._at + length <= len(self._data):
            self._at += length
        else:
            self._base, self._data, self._at = self.position + length, b"", 0

    def skip_strings(self, count: int) -> None:
        """Move on by `count` strings, each behind its length in 64 bits."""
        for _ in range(count):
            stop = self._at + 8
            if stop > len(self._data):
                self._refill(8)
                stop = 8
            length = int.from_bytes(self._data[stop - 8 : stop], "little")
            self._at = stop
            if stop + length <= len(self._data):
                self._at = stop + length
            else:
                self.skip(length)

    def line(self, most: int = 256) -> bytes:
        """Return the bytes up to the next newline, which is consumed and left out."""
        while (stop := self._data.find(b"\n", self._at, self._at + most + 1)) < 0:
            held = len(self._data) - self._at
            if held > most:
                raise damaged(self.blob, f"holds a line longer than {most} bytes")
            self._refill(held + 1)
        piece = self._data[self._at : stop]
        self._at = stop + 1
        return piece

    def unpack(self, layout: str) -> int:
        """Return the next integer, `layout` as in `struct`: "<Q" for 64 bits."""
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def _need(self, length: int) -> None:
        if length > self.left:
            raise CheckpointError(
                self.blob.where,
                f"is cut short or damaged: {length} bytes are needed at byte {self.position}, {self.left} remain: {DOWNLOAD_AGAIN}",
            )

    def _refill(self, length: int) -> None:
        self._need(length)
        start = self.position
        size = min(max(length, self._window), self._end - start)
        self._data = self.blob.read(start, size)
        self._base, self._at = start, 0
        self._window = min(self._window * 2, MOST_FILE_BYTES)


def quote(value: object, most: int = 60) -> str:
    """Show a value out of a file in an error: on one line, without control characters, and short; in JSON's words."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}..."
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return json.dumps(value)
    return "a table" if isinstance(value, dict) else f"a {type(value).__name__}"


def damaged(blob: Blob, what: str) -> CheckpointError:
    """Return the error for a file whose contents contradict themselves."""
    return CheckpointError(blob.where, f"{what}: the file is damaged; {DOWNLOAD_AGAIN}")


def check_enclosed(folder: Folder, where: str, what: str, name: str) -> None:
    """Refuse a name, found in the file `where`, that leads out of its folder; `what` is how the error calls it."""
    parts = re.split(r"[/\\]", name)
    if not name.isprintable() or not all(parts) or ".." in parts or ":" in parts[0] or not folder.encloses(name):
        raise CheckpointError(where, f"names {what}, outside its directory: do not use it, or correct the file")


def check_present(blob: Blob) -> None:
    """Refuse what stands in for a file: nothing at all, or the pointer that Git leaves where LFS was not run."""
    if blob.size == 0:
        raise CheckpointError(blob.where, f"is empty: {DOWNLOAD_AGAIN}")
    marker = b"version https://git-lfs"
    if blob.size < 1024 and blob.read(0, min(blob.size, len(marker))) == marker:
        raise CheckpointError(blob.where, "is a Git LFS pointer, not the file: run `git lfs pull` in its repository")


def _unreadable(where: str, error: OSError) -> CheckpointError:
    return CheckpointError(where, f"cannot be read ({error.strerror or type(error).__name__}): check the path and its permissions")
