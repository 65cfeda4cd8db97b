"""The processes below a process, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from pathlib import Path

import psutil


def children(pid: int) -> list[int]:
    """Return the ids of the children of `pid`, of all of its threads (proc(5), task/TID/children); none if it is gone."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # no Linux, a kernel without CONFIG_PROC_CHILDREN, or a thread that ended meanwhile
        return _read_children(pid)


def _read_children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def process_status(pid: int) -> str:
    """Say what a process does: "running", "sleeping", "stopped"; "gone" where it has ended."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def kill_below(pid: int, spare: Collection[int] = ()) -> None:
    """Kill whatever lives below `pid`, in groups and sessions of its own too; `spare` are children to leave alone."""
    found, look = [], [child for child in children(pid) if child not in spare]
    while look:
        child = look.pop()
        found.append(child)
        look += children(child)
    for child in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, getattr(signal, "SIGKILL", signal.SIGTERM))
