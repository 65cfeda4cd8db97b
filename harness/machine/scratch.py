"""The folder of a run for what goes with it: logs, offloaded weights, sockets. What dead runs left is removed.

The owner holds a lock on a file in its folder (flock(2)). The kernel gives it back however the owner ends, and sees it across
containers that share the disk, so a folder whose lock is free belongs to nobody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.core.errors import UsageError

if sys.platform != "win32":
    import fcntl

_PREFIX = "fitmatrix-"
_LOCK = ".fitmatrix-scratch"  # what has no such file was not made here, whatever it is called
_IN_RAM = ("tmpfs", "ramfs")


class Scratch:
    """A new folder, locked until `remove`; making it removes what dead runs left beside it.

    Raises:
        UsageError: there is no temporary directory, or it takes no more.
    """

    def __init__(self, parent: Path | None = None) -> None:
        try:
            parent = parent or scratch_place()
            sweep(parent)
            self._make(parent)
        except OSError as error:
            where, why = parent or "any temporary directory", error.strerror or error
            raise UsageError(f"cannot make temporary files in {where} ({why}): set TMPDIR to a directory that takes them") from None

    def _make(self, parent: Path) -> None:
        self._lock: int | None = None
        while self._lock is None:
            self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True)
            self.path = Path(self._folder.name)
            self._lock = _locked_anew(self.path / _LOCK)
            if self._lock is None:
                self._folder.cleanup()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder and all that is in it; safe to call twice."""
        if sys.platform == "win32":  # where no open file can be removed, and nobody sweeps
            self._unlock()
        self._folder.cleanup()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def is_scratch(folder: Path) -> bool:
    """Say whether a folder is one of a run of this user, which removes it at its end."""
    try:
        return (folder / _LOCK).lstat().st_uid == os.geteuid()
    except (OSError, AttributeError):  # there is none, or Windows, which has no such ids
        return (folder / _LOCK).exists()


def scratch_place() -> Path:
    """Return where scratch folders go: the directory that TMPDIR names, else the system's own.

    Where that keeps its files in RAM (tmpfs), offloaded weights would take up what they are to spare: then it is /var/tmp.
    """
    usual, other = Path(tempfile.gettempdir()), Path("/var/tmp")
    if any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")) or not _in_ram(usual):
        return usual
    return other if os.access(other, os.W_OK | os.X_OK) and not _in_ram(other) else usual


def _in_ram(folder: Path) -> bool:
    """Say whether the files of `folder` lie in RAM, by the type of its file system (proc(5), mountinfo)."""
    try:
        device = folder.stat().st_dev
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(mount[2] == number and mount[mount.index("-") + 1] in _IN_RAM for mount in mounts)


def sweep(parent: Path | None = None) -> None:
    """Remove the folders of runs that have ended; one that is locked, or is not ours, is left alone.

    Called within such a folder it is those beside it, itself among them.
    """
    if sys.platform == "win32":
        return
    parent = parent or scratch_place()
    if (parent / _LOCK).exists():
        parent = parent.parent
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), _locked(lock):
            if lock.parent.lstat().st_uid == os.geteuid() and not lock.parent.is_symlink():
                _remove(lock)


def _remove(lock: Path) -> None:
    """Remove a folder, its lock last: what cannot be removed now stays known as ours."""
    for entry in lock.parent.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != lock:
            entry.unlink()
    if [*lock.parent.iterdir()] == [lock]:
        lock.unlink()
        lock.parent.rmdir()


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold a lock that is there already. Raises OSError: somebody else has it, or it is gone."""
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _locked_anew(lock: Path) -> int | None:
    """Make a lock and hold it; None if another run took the folder for a dead one's in between, and removed it."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks: nobody will sweep here
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return None
    return descriptor
