"""Control groups v1 and v2: what the container allows, walking up from our own group, and groups of our own that hold a case.

`root` is where /proc and /sys are looked for; tests lay out trees of their own. Formats: cgroups(7), proc(5) and the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")
_UNLIMITED = 1 << 60  # v1 says "no limit" with the largest multiple of a page that fits 63 bits
_V2 = ""  # /proc/self/cgroup names no controllers for the unified hierarchy
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
_DROPPABLE = ("active_file", "inactive_file", "slab_reclaimable")


def memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Return the least limit on memory that applies to this process, and the least that is left below any such limit.

    What is left is the limit less what a group holds that the kernel cannot drop: page cache does not count, shared memory
    does. Both are bytes, None if nothing limits.
    """
    limits = _limits(root)
    return min(limits.values(), default=None), _left(limits)


def watch(root: Path = ROOT) -> Callable[[], int | None]:
    """Return a function that says what is left below the limits of now, quickly: where nothing limits, it reads nothing."""
    limits = _limits(root)
    return lambda: _left(limits)


def _limits(root: Path) -> dict[Path, int]:
    """Return the limit on memory of every group that has one, by its folder."""
    limits = {}
    for folder in _folders("memory", root):
        # v1 tells of limits above the part of the tree that a container can see
        visible = _read_stat(folder / "memory.stat").get("hierarchical_memory_limit")
        found = [*(_read_int(folder / name) for name in _LIMITS), visible]
        limit = min((size for size in found if size is not None and size < _UNLIMITED), default=None)
        if limit is not None:
            limits[folder] = limit
    return limits


def _left(limits: Mapping[Path, int]) -> int | None:
    used = {folder: _used_bytes(folder, _read_stat(folder / "memory.stat")) for folder in limits}
    return min((max(limit - used[folder], 0) for folder, limit in limits.items()), default=None)


def cores(root: Path = ROOT) -> int:
    """Count the processors this process may use: its affinity mask, or the least quota, rounded up, where that is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for folder in _folders("cpu", root) if (quota := _quota(folder)) is not None]
    return max(min([count, *map(math.ceil, quotas)]), 1)


def withheld(root: Path = ROOT) -> Callable[[], float] | None:
    """Return a function that says how many seconds of CPU quotas have withheld from our groups; None if there is no quota.

    Each CPU that had to wait counts for itself (cpu.stat: throttled_usec in v2, throttled_time in ns in v1).
    """
    limited = [folder for folder in _folders("cpu", root) if _quota(folder) is not None]

    def seconds() -> float:
        stats = [_read_stat(folder / "cpu.stat") for folder in limited]
        return sum(stat.get("throttled_usec", 0) / 1e6 + stat.get("throttled_time", 0) / 1e9 for stat in stats)

    return seconds if limited else None


class _Files(NamedTuple):
    """The files of a group that hold its limits, what it has used and how often the kernel killed in it."""

    limit: str
    swap: str
    peak: str
    events: str


_V1_FILES = _Files("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_V2_FILES = _Files("memory.max", "memory.swap.max", "memory.peak", "memory.events")
_PREFIX = "fitmatrix"
_GONE_S = 2.0  # a killed process leaves its group a moment after its end
_numbers = itertools.count()


class ControlGroup:
    """A group made by `group`: what is in it uses no more memory than it may, page cache and all, and swap does not help."""

    def __init__(self, folder: Path, files: _Files) -> None:
        self._folder, self._files = folder, files

    def add(self, pid: int) -> bool:
        """Move a process of ours into the group, and say whether the kernel let us; what it holds stays charged to where it was."""
        return self._write("cgroup.procs", pid)

    def limit(self, limit_bytes: int) -> bool:
        """Set the limit, and say whether it holds: v1 refuses one below what cannot be dropped, v2 kills. Swap is no way around."""
        v1 = self._files is _V1_FILES  # which limits memory and swap together
        holds = self._write(self._files.limit, max(limit_bytes, 0))
        self._write(self._files.swap, max(limit_bytes, 0) if v1 else 0)  # a kernel may not count swap
        return holds

    def _write(self, name: str, value: int) -> bool:
        try:
            (self._folder / name).write_text(str(value))
        except OSError:
            return False
        return True

    @property
    def oom_kills(self) -> int:
        """How many processes the kernel has killed at the limit."""
        return _read_stat(self._folder / self._files.events).get("oom_kill", 0)

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group has used, None if the kernel does not say."""
        return _read_int(self._folder / self._files.peak)

    def remove(self) -> None:
        """Remove the group; a process that has just been killed leaves it within a moment. Does nothing twice."""
        until_s = time.monotonic() + _GONE_S
        while True:
            with contextlib.suppress(FileNotFoundError):
                try:
                    self._folder.rmdir()
                except OSError:
                    if time.monotonic() < until_s:
                        time.sleep(0.01)
                        continue
            return


def group(limit_bytes: int, root: Path = ROOT) -> ControlGroup | None:
    """Make an empty group with a limit below our own, or beside it if v2 allows none below; None if none can be made.

    Removes what runs that are no more have left behind. The caller removes the group after its processes' end.
    """
    for folder, files in _parents(root):
        _remove_leftovers(folder)
        made = folder / f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        with contextlib.suppress(OSError):  # not ours to write, or a read-only file system
            made.mkdir()
            new = ControlGroup(made, files)
            if new.limit(limit_bytes):
                return new
            new.remove()
    return None


def is_allowed() -> bool:
    """Say whether a group can be made here."""
    made = group(1 << 30)
    if made is not None:
        made.remove()
    return made is not None


def _parents(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield folders that groups with a limit on memory may stand in; v2 has them where `memory` is handed down."""
    for depth, folder in enumerate(_folders("memory", root)):
        if depth == 0 and (folder / _V1_FILES.limit).exists():
            yield folder, _V1_FILES
        elif "memory" in _read(folder / "cgroup.subtree_control").split():
            yield folder, _V2_FILES


def remove_groups_of(owner: int, root: Path = ROOT) -> None:
    """Remove the groups that a process made, which has ended or is about to; what still lives in one keeps it."""
    for folder, files in _parents(root):
        for left in folder.glob(f"{_PREFIX}-{owner}-*"):
            ControlGroup(left, files).remove()


def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(f"{_PREFIX}-*-*"):
        owner = left.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):  # somebody lives in it
                left.rmdir()


def forget_files(folder: Path) -> int:
    """Drop the page cache of the files in `folder`: who reads them next is charged for their pages.

    Returns the bytes that stay, because another process has them mapped and is charged for them. A file that cannot be opened, or
    whose file system knows no such call, is skipped.
    """
    left = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            left += _forget(path) if path.is_file() and path.stat().st_size else 0
    return left


def _forget(path: Path) -> int:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that wait to be written cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # of files that are neither ours nor ours to write, the kernel says nothing true (mincore(2))
        return _cached(file.fileno()) if os.access(path, os.W_OK) else 0


def _cached(descriptor: int) -> int:
    """Return how many bytes of an open file are in the page cache."""
    import ctypes  # slow to import, and planning does without

    with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages)
        del first
        return sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


def _used_bytes(folder: Path, stat: dict[str, int]) -> int:
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
