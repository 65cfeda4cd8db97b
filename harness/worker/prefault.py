"""Make a forked worker as resident as a process that did its imports itself.

A fork shares the fork server's anonymous pages, but not its page tables of mapped files: code and data of the libraries
that the imports have touched would be missing from the worker's resident memory (60 MB of 630 for a small model), and a
plain script would seem to need more than the same work measured here. The fork server therefore notes which pages of its
file mappings are present (proc(5), pagemap) when all imports are done, and a worker maps the same pages with
madvise(MADV_POPULATE_READ), Linux 5.14 and later. Older kernels leave the difference; nothing breaks.

The anonymous pages that are shared are charged to the fork server. A worker that is to live within a limit copies them first
(`own`, by MADV_POPULATE_WRITE), so that the limit holds for all that a plain script would need.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.measure import sampler

_PAGE = mmap.PAGESIZE
_PRESENT, _OF_FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
Runs = list[tuple[int, int]]


def _mappings() -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end, permissions and path ("" for none) of every mapping of this process."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, end = fields[0].split("-")
            yield int(start, 16), int(end, 16), fields[1], fields[5].strip() if len(fields) == 6 else ""


def _pages(entries: array.array[int], mask: int, value: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of pages whose flags are `value` under `mask`, as (first, past the last)."""
    first: int | None = None
    for index, entry in enumerate(entries):
        if entry & mask == value:
            first = index if first is None else first
        elif first is not None:
            yield first, index
            first = None
    if first is not None:
        yield first, len(entries)


def _runs(mappings: Iterable[tuple[int, int]], mask: int, value: int) -> Runs:
    """Return the runs of pages in some mappings whose flags are `value` under `mask`, as (address, length in bytes)."""
    runs: Runs = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for start, end in mappings:
            pagemap.seek(start // _PAGE * 8)
            data = pagemap.read((end - start) // _PAGE * 8)
            entries = array.array("Q", data[: len(data) // 8 * 8])
            runs += ((start + first * _PAGE, (last - first) * _PAGE) for first, last in _pages(entries, mask, value))
    return runs


def resident_runs() -> Runs:
    """Return the runs of pages of mapped files that are present in this process, as (address, length in bytes)."""
    of_files = ((start, end) for start, end, may, path in _mappings() if path.startswith("/") and may.startswith("r"))
    return _runs(of_files, _PRESENT, _PRESENT)


def shared_runs() -> Runs:
    """Return the runs of anonymous pages that this process shares with the one it was forked from and may write to."""
    private = ((start, end) for start, end, may, path in _mappings() if may.startswith("rw") and may.endswith("p"))
    return _runs(private, _PRESENT | _OF_FILE | _EXCLUSIVE, _PRESENT)


def replay() -> None:
    """Map in this process what the fork server had mapped."""
    _advise(RUNS, _MADV_POPULATE_READ)


def own() -> int:
    """Copy the anonymous pages that are shared with the fork server, so that they are charged to this process's own group.

    Returns the bytes that stay shared, because the kernel could or would not copy them.
    """
    try:
        _advise(shared_runs(), _MADV_POPULATE_WRITE)
        return sum(length for _, length in shared_runs())
    except PermissionError:  # some containers hide pagemap: what was taken over is all that there is yet
        return sampler.memory(os.getpid()).anon_bytes


def _advise(runs: Runs, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for address, length in runs:
        if libc.madvise(address, length, advice) and ctypes.get_errno() == errno.EINVAL:
            return  # an older kernel: it knows no such advice; other errors are of these pages alone


def _record() -> Runs:
    if sys.platform != "linux":
        return []
    try:
        return resident_runs()
    except PermissionError:  # some containers hide pagemap
        return []


RUNS = _record()
