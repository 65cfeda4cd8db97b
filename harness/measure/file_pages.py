"""Pages of files that this process has mapped: whether a weight lies in them, and how many of its libraries' are resident."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.core.units import KIB

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ +(/.*)")
_SIZE = re.compile(r"(Rss|Anonymous): +(\d+) kB")
# Memory by another name: the kernel cannot drop these pages and read them again.
_NO_FILES = ("/dev/", "/memfd:", "/SYSV")


class FileMapping(NamedTuple):
    """A range of addresses that shows a file, and how many bytes of it are resident and still the file's own."""

    start: int
    end: int
    path: str
    executable: bool
    resident_bytes: int


def own_mappings() -> list[FileMapping] | None:
    """Return the files that this process has mapped; None where the system does not tell."""
    try:
        return parse(Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def parse(smaps: str) -> list[FileMapping]:
    """Read the mappings of files from the text of /proc/PID/smaps."""
    found: list[FileMapping] = []
    is_file = False
    for line in smaps.splitlines():
        head = _HEAD.fullmatch(line)
        if head:
            is_file = not head[4].startswith(_NO_FILES)
            if is_file:
                found.append(FileMapping(int(head[1], 16), int(head[2], 16), head[4], "x" in head[3], 0))
        elif line[:1].isdigit() or line[:1] in "abcdef":  # an anonymous range
            is_file = False
        elif is_file and (size := _SIZE.match(line)):
            sign = 1 if size[1] == "Rss" else -1
            found[-1] = found[-1]._replace(resident_bytes=found[-1].resident_bytes + sign * int(size[2]) * KIB)
    return found


def library_bytes(mappings: Iterable[FileMapping]) -> int:
    """Return the resident bytes of files that code runs from: they stay as long as it runs."""
    mappings = list(mappings)
    code = {mapping.path for mapping in mappings if mapping.executable}
    return sum(mapping.resident_bytes for mapping in mappings if mapping.path in code)


def lies_in_file(address: int, mappings: Sequence[FileMapping]) -> bool:
    """Say whether an address shows a file."""
    return any(mapping.start <= address < mapping.end for mapping in mappings)
