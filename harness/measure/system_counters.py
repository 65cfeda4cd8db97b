"""What the system counts while a measurement runs: seconds of its CPUs and of a tree of processes, swapping, clocks, throttling.

Everything is cheap enough to be read before and after each request. What a system does not report is None.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.machine import process_tree

LINUX = sys.platform == "linux"
_CPUS = Path("/sys/devices/system/cpu")
_LOOKED_AT = 8  # CPUs whose clocks are read: they speak for the rest, and reading all of many would cost too much


class Cpu(NamedTuple):
    """Seconds that CPUs have idled, were taken by a hypervisor and ran programs (in user mode; None if not counted separately)."""

    cpus: int
    idle_s: float
    stolen_s: float
    user_s: float | None


class Used(NamedTuple):
    """Seconds of CPU that processes have used, and the part of them in user mode."""

    all_s: float
    user_s: float


class Swap(NamedTuple):
    """Bytes of swap in use, and bytes that were swapped in and out since boot."""

    used_bytes: int
    moved_bytes: int


def usable_cpus() -> frozenset[int] | None:
    """Return the CPUs that this process and its children may run on, None for all: what others do elsewhere takes none of ours."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    mine = frozenset(os.sched_getaffinity(0))
    return mine if len(mine) < (os.cpu_count() or 0) else None


def cpu(only: frozenset[int] | None = None) -> Cpu:
    """Read what the CPUs have done since boot.

    On Linux idle time is exact, while user and system are told apart by looking at each tick (proc(5), /proc/stat). In a container
    the CPUs are the host's, which is right: others on the host disturb as well. Where /proc/stat lists none of `only` (a container
    may number its CPUs anew) all that it lists count.
    """
    if not LINUX:
        times = psutil.cpu_times()
        return Cpu(psutil.cpu_count() or 1, times.idle, 0.0, None)
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    by_cpu = [list(map(int, words[1:])) for words in lines[1:] if only is None or int(words[0].removeprefix("cpu")) in only]
    if only is None or not by_cpu:
        cpus, whole = len(lines) - 1, list(map(int, lines[0][1:]))
    else:
        cpus, whole = len(by_cpu), [sum(column) for column in zip(*by_cpu, strict=True)]
    user, nice, _, idle, iowait, _, _, stolen = whole[:8]
    tick = os.sysconf("SC_CLK_TCK")
    return Cpu(cpus, (idle + iowait) / tick, stolen / tick, (user + nice) / tick)


def used(pid: int) -> Used:
    """Add up what a process and everything below it has used, with what those have left to it that have ended.

    Raises:
        psutil.Error: no such process, or it may not be looked at.
    """
    all_s = user_s = 0.0
    for each in tree(pid):
        try:
            times = psutil.Process(each).cpu_times()
        except psutil.NoSuchProcess:
            if each == pid:
                raise
            continue  # ended since it was found: the one who waits for it takes its time
        user_s += times.user + times.children_user
        all_s += times.user + times.children_user + times.system + times.children_system
    return Used(all_s, user_s)


def tree(pid: int) -> Iterator[int]:
    """Yield the ids of a process and of everything below it."""
    yield pid
    for child in process_tree.children(pid):
        yield from tree(child)


def swap() -> Swap | None:
    """Read the use of swap."""
    try:
        found = psutil.swap_memory()
    except (OSError, RuntimeWarning):  # it warns where a container hides the counters
        return None
    return Swap(found.used, found.sin + found.sout)


def cpu_mhz(only: frozenset[int] | None = None) -> float | None:
    """Return the clock of the fastest CPU, which is a busy one; None if the system sets none, as in virtual machines."""
    clocks = _numbers("cpufreq/scaling_cur_freq", only)
    return max(clocks) / 1000 if clocks else None


def cpu_throttles(only: frozenset[int] | None = None) -> int:
    """Return how often the CPUs were slowed down for heat since boot, 0 if the system does not count it."""
    return sum(_numbers("thermal_throttle/core_throttle_count", only))


def _numbers(name: str, only: frozenset[int] | None) -> list[int]:
    found = []
    for number in sorted(only if only is not None else range(os.cpu_count() or 1))[:_LOOKED_AT]:
        with contextlib.suppress(OSError, ValueError):
            found.append(int((_CPUS / f"cpu{number}" / name).read_text()))
    return found
