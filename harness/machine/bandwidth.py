"""How fast RAM and disk are read here, and what a CUDA context takes: measured once, kept in the cache, measured again on request.

The figures bound what a model can do: decoding on the CPU reads all weights from RAM for each token, loading and offloading read
them from disk.
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


def _remembered(key: str, measure: Callable[[], float | None] | None) -> float | None:
    """Return what is kept under `key`, or what `measure` finds, and keep that."""
    place = _cache_file()
    if measure is None:
        return _figures(place).get(key)
    figure = measure()
    if figure is not None:
        keep(place, msgspec.json.encode({**_figures(place), key: figure}))
    return figure


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
