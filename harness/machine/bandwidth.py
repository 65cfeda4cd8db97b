"""How fast RAM and disk are read here, and what a CUDA context takes: measured once, kept in the cache, measured again on request.

The figures bound what a model can do: decoding on the CPU reads all weights from RAM for each token, loading and offloading read
them from disk. What was measured while other programs worked is a lower bound: it is marked, gives way to any higher figure, and is
measured again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from harness.core.units import MIB
from harness.machine.cache import cache_dir, keep, kept

if TYPE_CHECKING:
    from concurrent.futures import Executor

# Others at work on this share of the processors take bandwidth that is counted as missing.
_BUSY_SHARE = 0.1
_SHORTEST_S = 0.05  # processors' times are counted in hundredths of a second
_UNDER_LOAD = ", under load"
BUFFER_BYTES = 512 * MIB  # beyond the caches of nearly every processor
FILE_BYTES = 256 * MIB
_BLOCK = 8 * MIB
_ROUNDS = 3


def ram(identity: str, threads: int, room_bytes: int, measure: bool = False) -> float | None:
    """Return the bytes of RAM that `threads` threads read per second together, None if it was never measured and is not now."""
    return _remembered(f"ram, {identity}", partial(measure_ram, threads, room_bytes) if measure else None)


def disk(identity: str, folder: Path, room_bytes: int, measure: bool = False) -> float | None:
    """Return the bytes per second that a file in `folder` is read with, None if it was never measured and is not now."""
    return _remembered(f"disk, {identity}", partial(measure_disk, folder, room_bytes) if measure else None)


def gpu_context(identity: str, measured: int | None = None) -> int | None:
    """Return the bytes that a CUDA context takes on a card, None if nobody measured; what was `measured` just now is kept."""
    found = _remembered(f"context, {identity}", partial(float, measured) if measured else None)
    return None if found is None else int(found)


def measure_ram(threads: int, room_bytes: int = BUFFER_BYTES) -> float | None:
    """Measure how fast `threads` threads read RAM: the best of three sums over a buffer.

    Takes about half a second, and `room_bytes` of memory at most; None without numpy or room.
    """
    size = min(BUFFER_BYTES, room_bytes) // 8
    try:
        import numpy as np
    except ImportError:
        return None
    if size < threads:
        return None
    from concurrent.futures import ThreadPoolExecutor

    # Ones, because pages of zeros that nobody wrote are all the same page and come from the cache.
    numbers = np.ones(size, dtype=np.uint64)
    parts = np.array_split(numbers, threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = min(_sum(pool, parts, np.add.reduce) for _ in range(_ROUNDS))
    return float(numbers.nbytes / seconds)


def measure_disk(folder: Path, room_bytes: int = FILE_BYTES, patience_s: float = 1.0) -> float | None:
    """Measure how fast a new file in `folder` is read, front to back, past the page cache: the best of three times.

    Writes `room_bytes` at most, for about `patience_s` seconds. None if the file cannot be made, and where the system has no
    way to leave the cache out: a figure from the cache would be one of RAM. A cache below us, of a host or a controller, is not
    left out.
    """
    size = min(FILE_BYTES, room_bytes)
    if not hasattr(os, "posix_fadvise") or size <= 0:
        return None
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            written = _fill(file.fileno(), size, patience_s)
            seconds = min(_read_through(file.fileno(), written) for _ in range(_ROUNDS))
    except OSError:
        return None
    return written / seconds


def is_under_load(kind: str, identity: str) -> bool:
    """Say whether all that is kept of a "ram" or a "disk" was measured while others worked."""
    figures, key = _figures(_cache_file()), f"{kind}, {identity}"
    return key not in figures and key + _UNDER_LOAD in figures


def _remembered(key: str, measure: Callable[[], float | None] | None) -> float | None:
    """Return what is kept under `key`, or what `measure` finds, and keep that: under load only what is more than was known."""
    place, marked = _cache_file(), key + _UNDER_LOAD
    before = _figures(place)
    known = before.get(key, before.get(marked))
    if measure is None:
        return known
    with OthersAtWork() as others:
        figure = measure()
    if figure is None:
        return None
    if others.are_many:
        if known is not None and known >= figure:
            return known
        keep(place, msgspec.json.encode({**before, (key if key in before else marked): figure}))
        return figure
    keep(place, msgspec.json.encode({**{name: one for name, one in before.items() if name != marked}, key: figure}))
    return figure


class OthersAtWork:
    """Watches, while it is entered, which share of all processors other processes take."""

    def __enter__(self) -> OthersAtWork:
        self._begun_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        took, own = time.monotonic() - self._begun_s, time.process_time() - self._own_s
        others = _busy_s() - self._busy_s - own
        self.are_many = took > _SHORTEST_S and others > _BUSY_SHARE * took * (os.cpu_count() or 1)


def _busy_s() -> float:
    """Return the seconds that all processors together have worked, or were taken by a hypervisor."""
    import psutil  # slow to import, and who plans for a machine that is described measures nothing

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _figures(place: Path) -> dict[str, float]:
    """Return the figures kept that something may have been measured as."""
    return {key: figure for key, figure in (kept(place, dict[str, float]) or {}).items() if figure > 0}


def _fill(file: int, size: int, patience_s: float) -> int:
    """Write `size` bytes that do not compress, fewer if the time is up, down to the disk; return how many."""
    block = os.urandom(min(_BLOCK, size))
    start, written = time.perf_counter(), 0
    while written < size and (not written or time.perf_counter() - start < patience_s):
        written += os.write(file, block)
        os.fdatasync(file)
    return written


def _read_through(file: int, size: int) -> float:
    """Read the file from the disk, front to back; return the seconds it took."""
    buffer = bytearray(min(_BLOCK, size))
    os.lseek(file, 0, os.SEEK_SET)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    while os.readv(file, [buffer]):
        pass
    return time.perf_counter() - start


def _sum(pool: Executor, parts: Iterable[Any], add: Callable[[Any], Any]) -> float:
    """Sum all parts at once; return the seconds it took."""
    start = time.perf_counter()
    list(pool.map(add, parts))
    return time.perf_counter() - start


def _cache_file() -> Path:
    return cache_dir() / "bandwidth.json"
