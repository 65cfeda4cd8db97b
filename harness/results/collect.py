"""Where results lie: files, directories of directories as CI's artifacts are downloaded, and zip archives; read line by line."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from harness.checkpoint.formats import zip_directory
from harness.checkpoint.formats.files import LocalFile
from harness.core.errors import CheckpointError, StoreError, UsageError
from harness.core.records import Record, Result
from harness.core.redact import clean_text
from harness.core.units import GIB, MIB, format_size
from harness.results.store import NAME, read_line

_LINE_BYTES = 64 * MIB  # a line of a day's run has some MiB; what is longer is none
_MEMBER_BYTES = 4 * GIB
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
    for given in places:
        if not given.exists():
            raise UsageError(f"{given}: there is no such file or directory; name directories, results.jsonl files or zip archives")
        root = given.resolve()
        for path in _below(given):
            name = clean_text(_decodable(Path(root.name, path.relative_to(given)).as_posix()))
            for artifact in _in_file(path, name):
                found.setdefault(f"{path.resolve()}\0{artifact.member}", artifact)
                if len(found) > _MOST_FILES:
                    raise StoreError(given, f"holds more than {_MOST_FILES:,} files of results; publish fewer at once")
    return list(found.values())


def _decodable(name: str) -> str:
    """Return the name of a file with a question mark for each byte that is no letter of any encoding known here."""
    return name.encode(errors="replace").decode()


def _below(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
        return
    for folder, inner, files in os.walk(place):
        inner.sort()
        yield from (Path(folder, name) for name in sorted(files) if name == NAME or name.endswith(".zip"))


def _in_file(path: Path, name: str) -> Iterator[Artifact]:
    if not path.is_file():  # a pipe would block the reader, and a link may lead nowhere
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
        yield Artifact(path=str(path), name=clean_text(f"{name}/{member}"), member=member)


def _members(path: Path) -> list[str]:
    """List the files of results in an archive; its directory is read under the bounds of `formats.zip_directory` first."""
    file = LocalFile(path, path.name)
    try:
        return sorted(name for name in zip_directory.read_directory(file) if name.rpartition("/")[2] == NAME)
    finally:
        file.close()


def read(artifact: Artifact) -> Iterator[tuple[int, Result | str]]:
    """Yield each result with the number of its line, and for each line that is none why; never more than one line is held."""
    with _opened(artifact) as stream:
        number = 0
        while line := stream.readline(_LINE_BYTES):
            number += 1
            if len(line) == _LINE_BYTES:
                yield number, f"is longer than {format_size(_LINE_BYTES)}, and nothing behind it was read"
                return
            ones = read_line(line.rstrip(b"\n"))
            yield from ((number, one) for one in ones if isinstance(one, Result))
            yield from ((number, one) for one in [one for one in ones if isinstance(one, str)][:1])


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
            with Path(artifact.path).open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(artifact.path) as archive:
            if (size := archive.getinfo(artifact.member).file_size) > _MEMBER_BYTES:
                raise StoreError(artifact.where, f"unpacks to {format_size(size)}: more than any results")
            with archive.open(artifact.member) as packed:
                yield packed
    except OSError as error:
        raise StoreError(artifact.where, f"cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
        raise StoreError(artifact.where, f"cannot be unpacked ({error}); download it again") from None
