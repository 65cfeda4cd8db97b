"""Where results lie: files, directories of directories as CI's artifacts are downloaded, and zip archives; read line by line."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from harness.checkpoint.formats import zip_directory
from harness.checkpoint.formats.files import LocalFile
from harness.core.errors import CheckpointError, StoreError, UsageError
from harness.core.records import Record, Result
from harness.core.redact import cleaner
from harness.core.units import GIB, MIB, format_size
from harness.machine.regular import open_regular
from harness.results.store import NAME, read_lines

# Results are packed to a seventh or less. What small archives may unpack to is so little that it does not matter.
_MEMBER_BYTES, _PACKED_BYTES, _MOST_RATIO = 4 * GIB, MIB, 50
# The directory of an archive is read once for each of its files of results.
_MOST_LOOKUPS = 1_000_000
MOST_WRONG = 1_000  # lines of a file that are no results, after which the rest is not worth reading
_MOST_FILES = 100_000


class Artifact(Record, frozen=True, kw_only=True):
    """A file of results: where it lies, as the user named it, and what it is called where others read of it.

    `member` is its name in the zip archive `path`, `damage` what is wrong with an archive that cannot be read at all.
    """

    path: str
    name: str
    member: str | None = None
    damage: str = ""

    @property
    def where(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"


def find_artifacts(places: Iterable[Path]) -> list[Artifact]:
    """Return all files of results that are meant: a file itself, and each `results.jsonl` below a directory or in an archive.

    Links to directories are not followed. A file that several places lead to is there once.

    Raises:
        UsageError: there is no such place.
        StoreError: there are more files than any project's.
    """
    found: dict[str, Artifact] = {}
    clean = cleaner()
    for given in places:
        if not given.exists():
            raise UsageError(f"{given}: there is no such file or directory; name directories, results.jsonl files or zip archives")
        root = given.resolve()
        for path, damage in _below(given):
            name = _decodable(Path(root.name, path.relative_to(given)).as_posix())
            for artifact in [Artifact(path=str(path), name=name, damage=damage)] if damage else _in_file(path, name):
                known = msgspec.structs.replace(artifact, name=clean(artifact.name))
                found.setdefault(f"{os.path.realpath(path)}\0{artifact.member}", known)
                if len(found) > _MOST_FILES:
                    raise StoreError(given, f"holds more than {_MOST_FILES:,} files of results; publish fewer at once")
    return list(found.values())


def _decodable(name: str) -> str:
    """Return the name of a file with a question mark for each byte that is no letter of any encoding known here."""
    return name.encode(errors="replace").decode()


def _below(place: Path) -> Iterator[tuple[Path, str]]:
    """Yield what may be a file of results, and what is wrong with it where it cannot be one or could not be looked into."""
    if not place.is_dir():
        yield place, ""
        return
    unread: list[OSError] = []
    for folder, inner, files in os.walk(place, onerror=unread.append):
        inner.sort()
        yield from ((Path(error.filename), f"cannot be looked into ({error.strerror})") for error in unread)
        unread.clear()
        yield from ((Path(folder, name), "") for name in sorted(files) if name == NAME or name.endswith(".zip"))
    yield from ((Path(error.filename), f"cannot be looked into ({error.strerror})") for error in unread)


def _in_file(path: Path, name: str) -> Iterator[Artifact]:
    if not path.is_file():  # a pipe would block the reader, and a link may lead nowhere
        what = "is a link that leads nowhere" if not path.exists() else "is no regular file, and was not read"
        yield Artifact(path=str(path), name=name, damage=what)
        return
    if path.suffix != ".zip":
        yield Artifact(path=str(path), name=name)
        return
    try:
        members = _members(path)
    except CheckpointError as error:
        yield Artifact(path=str(path), name=name, damage=str(error).removeprefix(f"{path}: "))
        return
    for member in members:
        yield Artifact(path=str(path), name=f"{name}/{member}", member=member)


def _members(path: Path) -> list[str]:
    """List the files of results in an archive; its directory is read under the bounds of `formats.zip_directory` first.

    Raises:
        CheckpointError: it is no archive, or one that is made to be slow to read.
    """
    file = LocalFile(path, path.name)
    try:
        members = zip_directory.read_directory(file)
        found = {name: member.size for name, member in members.items() if name.rpartition("/")[2] == NAME}
        if len(found) * len(members) > _MOST_LOOKUPS:
            raise CheckpointError(path, f"holds {len(found):,} files of results among {len(members):,}; unpack it first")
        if sum(found.values()) > max(_PACKED_BYTES, _MOST_RATIO * file.size):
            sizes = f"{format_size(sum(found.values()))} from {format_size(file.size)}"
            raise CheckpointError(path, f"unpacks to {sizes}, which no results do; unpack it first if you trust it")
        return sorted(found)
    finally:
        file.close()


def read(artifact: Artifact) -> Iterator[tuple[int, Result | str]]:
    """Yield each result with the number of its line, and for each line that is none why, up to MOST_WRONG of these.

    Raises:
        StoreError: it cannot be read, or the archive that it is in is damaged.
    """
    wrong = 0
    with _opened(artifact) as stream:
        for number, one in read_lines(stream):
            yield number, one
            wrong += isinstance(one, str)
            if wrong == MOST_WRONG:
                raise StoreError(
                    artifact.where, f"has {wrong:,} lines that are no results, and nothing behind line {number:,} was read"
                )


class Contents(NamedTuple):
    """What a file held when it was looked at, and what the system said of it then, by which a change is noticed."""

    digest: str
    stamp: tuple[int, int, int]


def contents(path: str) -> Contents | None:
    """Look at what a file holds; None if it cannot be read."""
    try:
        stamp = stamp_of(path)
        with open_regular(Path(path)) as file:
            found = hashlib.sha256()
            while piece := file.read(MIB):
                found.update(piece)
    except OSError:
        return None
    return Contents(found.hexdigest(), stamp)


def stamp_of(path: str) -> tuple[int, int, int]:
    """Return what changes when a file is written: its size, its time and which file it is. Raises OSError."""
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def _opened(artifact: Artifact) -> Iterator[IO[bytes]]:
    """Open a file of results.

    Raises:
        StoreError: it cannot be read, or the archive that it is in is damaged.
    """
    if artifact.damage:
        raise StoreError(artifact.where, artifact.damage)
    try:
        if artifact.member is None:
            with open_regular(Path(artifact.path)) as file:
                yield file
            return
        with zipfile.ZipFile(artifact.path) as archive:
            member = archive.getinfo(artifact.member)
            if member.file_size > _MEMBER_BYTES:
                raise StoreError(artifact.where, f"unpacks to {format_size(member.file_size)}: more than any results")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise StoreError(artifact.where, "is packed by another method than deflate; pack it anew")
            with archive.open(artifact.member) as packed:
                yield packed
    except OSError as error:
        raise StoreError(artifact.where, f"cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
        raise StoreError(artifact.where, f"cannot be unpacked ({error}); download it again") from None
