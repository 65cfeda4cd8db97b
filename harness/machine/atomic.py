"""Files and directories that are written whole or not at all: made beside their place, then swapped in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from harness.core.errors import UsageError

_NEW, _OLD = "new", "old"


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, with the text's own ends of lines, as `write_bytes` does. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, making its folder if need be, and remove drafts whose writers were killed.

    Raises:
        OSError: it cannot be written there; what was there stays as it was.
    """
    draft = path.parent / f".{path.name}.{os.getpid()}"  # the name may be empty, as that of . is
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_dead_drafts(path)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def _drop_dead_drafts(path: Path) -> None:
    for draft in path.parent.glob(f".{escape(path.name)}.*"):
        pid = draft.name.rpartition(".")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            draft.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    import psutil  # slow to import, and most who write find no draft of another process

    return psutil.pid_exists(pid)


@contextmanager
def draft_directory(place: Path) -> Iterator[Path]:
    """Yield a directory beside `place` that is gone afterward. What a killed run left goes first: the caller has the lock."""
    draft = place.with_name(f".{place.name}.partial")
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def replace_directory(place: Path, *, marker: str, ours: Set[str], option: str) -> Iterator[Path]:
    """Yield a new directory to fill, which takes the place of an old one when the block ends; on an error the old one stays.

    An old directory is replaced only if it is empty or holds the file `marker`, which each new one gets. What lies in it beside the
    names of `ours`, such as `.git` and `CNAME`, moves on into the new one. `option` is what named the place, for errors.

    Raises:
        UsageError: something else is there, or it cannot be written to.
    """
    place = place.resolve()
    if not place.name:
        raise UsageError(
            f"{option} {place} is the root of the file system, which nothing takes the place of; name another directory"
        )
    draft = _beside(place, _NEW)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_up_after_the_killed(place, marker, ours)
        _check(place, marker, option)
        draft.mkdir()
        (draft / marker).touch()
        yield draft
        _check(place, marker, option)
        _swap(place, draft, ours)
    except OSError as error:
        raise UsageError(f"{option} {place}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}.{os.getpid()}")


def _check(place: Path, marker: str, option: str) -> None:
    if not place.exists() or (place.is_dir() and (not any(place.iterdir()) or (place / marker).is_file())):
        return
    what = f"a directory without {marker}, so not one of ours," if place.is_dir() else "a file"
    raise UsageError(f"{option} {place} is {what} and stays as it is; name a new or empty directory")


def _swap(place: Path, draft: Path, ours: Set[str]) -> None:
    if not place.exists():
        draft.rename(place)
        return
    old = _beside(place, _OLD)
    place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        old.rename(place)
        raise
    _retire(old, place, ours)


def _retire(old: Path, place: Path, ours: Set[str]) -> None:
    """Move on what is not ours, and remove the rest."""
    for entry in old.iterdir():
        if entry.name not in ours and not (place / entry.name).exists():
            entry.rename(place / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _clear_up_after_the_killed(place: Path, marker: str, ours: Set[str]) -> None:
    """Bring back a directory that a process killed between its two renames had set aside, and remove drafts of the dead."""
    for found in list(place.parent.iterdir()):
        name, _, pid = found.name.rpartition(".")
        if not pid.isdecimal() or not (found / marker).is_file() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if name == f".{place.name}.{_NEW}":
            shutil.rmtree(found, ignore_errors=True)
        elif name == f".{place.name}.{_OLD}" and not place.exists():
            found.rename(place)
        elif name == f".{place.name}.{_OLD}":
            _retire(found, place, ours)
