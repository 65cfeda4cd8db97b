"""Make a forked worker as resident as a process that did its imports itself.

A fork shares the fork server's anonymous pages, but not its page tables of mapped files: code and data of the libraries
that the imports have touched would be missing from the worker's resident memory (60 MB of 630 for a small model), and a
plain script would seem to need more than the same work measured here. The fork server therefore notes which pages of its
file mappings are present (proc(5), pagemap) when all imports are done, and a worker maps the same pages with
madvise(MADV_POPULATE_READ), Linux 5.14 and later. Older kernels leave the difference; nothing breaks.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

_PAGE = mmap.PAGESIZE
_PRESENT = 1 << 63
_MADV_POPULATE_READ = 22


def _file_mappings() -> Iterator[tuple[int, int]]:
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/") and fields[1].startswith("r"):
                start, end = fields[0].split("-")
                yield int(start, 16), int(end, 16)


def _present(start: int, end: int, entries: array.array[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of present pages of one mapping as (address, length)."""
    first: int | None = None
    for index, entry in enumerate(entries):
        if entry & _PRESENT:
            first = index if first is None else first
        elif first is not None:
            yield start + first * _PAGE, (index - first) * _PAGE
            first = None
    if first is not None:
        yield start + first * _PAGE, end - start - first * _PAGE


def resident_runs() -> list[tuple[int, int]]:
    """Return the runs of pages of mapped files that are present in this process, as (address, length in bytes)."""
    runs: list[tuple[int, int]] = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for start, end in _file_mappings():
            pagemap.seek(start // _PAGE * 8)
            data = pagemap.read((end - start) // _PAGE * 8)
            runs += _present(start, end, array.array("Q", data[: len(data) // 8 * 8]))
    return runs


def replay() -> None:
    """Map in this process what the fork server had mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for address, length in RUNS:
        if libc.madvise(address, length, _MADV_POPULATE_READ):
            return  # an older kernel: it knows no such advice


def _record() -> list[tuple[int, int]]:
    if sys.platform != "linux":
        return []
    try:
        return resident_runs()
    except PermissionError:  # some containers hide pagemap
        return []


RUNS = _record()
