"""What must be left to the machine: how much memory can still be had, and the floor that no case may take it below."""

from __future__ import annotations

from collections.abc import Callable

from harness.core.units import GIB, MIB
from harness.machine import cgroup

# What is left to the machine: without it the kernel drops the pages that every process runs on, and nothing answers any more.
_FLOOR_BYTES, _FLOOR_SHARE, _FLOOR_MOST_SHARE = 256 * MIB, 0.02, 0.125


# What a system and what starts with it take before anything is loaded, of a machine that nobody can look at: an estimate.
_SYSTEM_BYTES, _SYSTEM_MOST_SHARE = 2 * GIB, 0.125

Available = Callable[[], int]


def available() -> Available:
    """Return a function that says what can be had without swapping: of the machine, or of the container where that is less."""
    import psutil  # slow to import, and a plan for a machine that is described does without

    left_in_container = cgroup.watch()

    def bytes_now() -> int:
        left, free = left_in_container(), int(psutil.virtual_memory().available)
        return free if left is None else min(free, left)

    return bytes_now


def floor_bytes() -> int:
    """Return what is left to the machine, or to the container."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return floor_of(min(total, cgroup.memory()[0] or total))


def floor_of(allowed: int) -> int:
    """Return what is left to the machine of this much memory: 2 %, at least 256 MiB, and never more than an eighth."""
    return int(min(max(_FLOOR_BYTES, _FLOOR_SHARE * allowed), _FLOOR_MOST_SHARE * allowed))


def system_bytes(installed: int) -> int:
    """Return what a system takes of this much RAM before anything is loaded: 2 GiB, and never more than an eighth."""
    return int(min(_SYSTEM_BYTES, _SYSTEM_MOST_SHARE * installed))
