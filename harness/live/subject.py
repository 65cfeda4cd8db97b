"""Whom to watch: the worker of a case of ours, found by the folder that it works in, or any process and what it has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from harness.core.errors import UsageError
from harness.core.records import Record
from harness.machine.scratch import is_scratch
from harness.measure.beacon import CASE
from harness.measure.system_counters import LINUX, tree


class Subject(Record, frozen=True, kw_only=True):
    """A process and those below it. `folder` is that of its case, None of a process that is none of our workers."""

    pid: int
    pids: tuple[int, ...]
    folder: Path | None = None
    others: int = 0  #: how many other cases run at the same time


class WatchTarget:
    """What was asked for: one process by its id, or whichever case of this user runs."""

    def __init__(self, pid: int | None = None) -> None:
        """Raises UsageError: there is no such process."""
        self.pid = pid
        self._now: Subject | None = None
        self._born_s = None if pid is None else _born_s(pid)
        if pid is not None and self._born_s is None:
            raise UsageError(f"--pid {pid}: there is no such process; leave --pid out to watch a run of yours")

    def look(self) -> Subject | None:
        """Return what to watch at this moment; None if nothing of ours runs.

        Raises:
            ProcessLookupError: the process that was asked for has ended.
        """
        if self.pid is None:
            return self._any_case()
        if _born_s(self.pid) != self._born_s:
            raise ProcessLookupError(self.pid)
        below = tuple(tree(self.pid))
        worker = next((pid for pid in below if case_folder(pid) is not None), None)
        if worker is None:
            return Subject(pid=self.pid, pids=below)
        return _subject(worker)

    def _any_case(self) -> Subject | None:
        """Stay with a case as long as it runs, then take the one that began last."""
        if self._now is not None and case_folder(self._now.pid) == self._now.folder:
            self._now = _subject(self._now.pid, self._now.others)
            return self._now
        found = running()
        self._now = _subject(found[-1], len(found) - 1) if found else None
        return self._now


def _born_s(pid: int) -> float | None:
    """Return when a process began, which tells it from another that has its id later; None if there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())  # ended, and not yet waited for
    except psutil.NoSuchProcess:
        return None


def _subject(worker: int, others: int = 0) -> Subject:
    return Subject(pid=worker, pids=tuple(tree(worker)), folder=case_folder(worker), others=others)


def running() -> list[int]:
    """Return the workers of this user, one a case, in the order in which their cases began."""
    found: dict[Path, int] = {}
    for pid in sorted(_every_pid()):
        folder = case_folder(pid)
        if folder is not None:
            found.setdefault(folder, pid)  # what it has started works there as well, and has a higher id
    return sorted(found.values(), key=lambda pid: (_born_s(pid) or 0.0, pid))


def case_folder(pid: int) -> Path | None:
    """Return the folder of the case that a process works on; None if it is no worker of this user."""
    place = _working_directory(pid)
    return place if place is not None and place.name.startswith(CASE) and is_scratch(place.parent) else None


def _working_directory(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd") if LINUX else psutil.Process(pid).cwd())  # noqa: PTH115  # of every process
    except (OSError, psutil.Error):  # another user's, or ended
        return None


def _every_pid() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal()) if LINUX else iter(psutil.pids())  # noqa: PTH208
