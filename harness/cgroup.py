"""What the container allows: memory and processors by cgroup v1 and v2, walking up from our own group.

`root` is where /proc and /sys are looked for; tests lay out trees of their own. Formats: cgroups(7), proc(5) and the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
_UNLIMITED = 1 << 60  # v1 says "no limit" with the largest multiple of a page that fits 63 bits
_V2 = ""  # /proc/self/cgroup names no controllers for the unified hierarchy
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
_DROPPABLE = ("active_file", "inactive_file", "slab_reclaimable")


def memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Return the least limit on memory that applies to this process, and the least that is left below any such limit.

    What is left is the limit less what a group holds that the kernel cannot drop: page cache does not count, shared memory
    does. Both are bytes, None where nothing limits.
    """
    limits: list[int] = []
    left: list[int] = []
    for folder in _folders("memory", root):
        stat = _read_stat(folder / "memory.stat")
        # v1 tells of limits above the part of the tree that a container can see
        found = [*(_read_int(folder / name) for name in _LIMITS), stat.get("hierarchical_memory_limit")]
        limit = min((size for size in found if size is not None and size < _UNLIMITED), default=None)
        if limit is None:
            continue
        limits.append(limit)
        left.append(max(limit - _held(folder, stat), 0))
    return min(limits, default=None), min(left, default=None)


def cores(root: Path = ROOT) -> int:
    """Count the processors this process may use: its affinity mask, or the least quota, rounded up, where that is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for folder in _folders("cpu", root) if (quota := _quota(folder)) is not None]
    return max(min([count, *map(math.ceil, quotas)]), 1)


def _held(folder: Path, stat: dict[str, int]) -> int:
    """Bytes that the group at `folder` and those below it hold and the kernel cannot drop."""
    used = next((size for name in _USED if (size := _read_int(folder / name)) is not None), 0)
    # v1 counts a group alone under the plain names and with all below it under total_*
    droppable = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _DROPPABLE)
    return max(used - droppable, 0)


def _quota(folder: Path) -> float | None:
    """Processors that the group at `folder` may keep busy; v2 writes "QUOTA PERIOD" or "max PERIOD", v1 two files, -1 for none."""
    words = _read(folder / "cpu.max").split() or [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return None
    return int(words[0]) / int(words[1])


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of our groups that have a say over `controller`, our own first, then its ancestors that are visible."""
    ours = _memberships(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        mount, system = left.split(), right.split()
        if len(mount) < 5 or len(system) < 3:
            continue
        v1 = system[0] == "cgroup" and controller in system[2].split(",")
        path = ours.get(controller if v1 else _V2) if v1 or system[0] == "cgroup2" else None
        if path is not None:
            yield from _upward(root / _unescape(mount[4]).lstrip("/"), _below(path, _unescape(mount[3])))


def _memberships(root: Path) -> dict[str, str]:
    """Map controllers to the path of our group, from lines such as "4:memory:/a/b" (v1) and "0::/a/b" (v2)."""
    fields = (line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines())
    return {controller: path for _, names, path in (each for each in fields if len(each) == 3) for controller in names.split(",")}


def _below(path: str, top: str) -> tuple[str, ...]:
    """Return the parts of a group's `path` below the part of the hierarchy, `top`, that is mounted.

    Nothing where the group lies outside: a container that sees paths of its host has its own group mounted.
    """
    if ".." in PurePosixPath(path).parts:
        return ()
    try:
        return PurePosixPath(path).relative_to(top).parts
    except ValueError:
        return ()


def _upward(mount: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _unescape(field: str) -> str:
    """Undo what mountinfo does to blanks and backslashes: three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # not this version, no such controller, or hidden from us
        return ""


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read_stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
