"""RAM and disks as people describe them: "32GiB DDR4-3200 x2", "nvme 100GiB", and how fast that is read.

A channel of 64 bits carries 8 bytes a transfer (JEDEC): bytes/s = MT/s x 8 x channels. Of that, programs reach a share.
"""

from __future__ import annotations

import re
from functools import cache

import msgspec

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Record
from harness.core.units import parse_capacity
from harness.data import DATA
from harness.machine.described.processors import Processor

CHANNEL_BYTES = 8
USUAL_CHANNELS = 2
# An estimate: reading with all cores, in the STREAM benchmark as in ours, reaches 0.7 to 0.9 of what the channels carry.
READ_SHARE = 0.8

_RAM = re.compile(
    r"\s*(?:(?P<modules>\d)\s*x\s*)?(?P<size>[\d.]+\s*[kmgt]?i?b?)(?:\s+(?P<kind>(?:lp)?ddr\d\w?)(?:-(?P<speed>\d{3,5}))?)?"
    r"(?:\s+(?:x\s*(?P<times>\d+)|(?P<channels>\d+)\s*channels?))?\s*",
    re.IGNORECASE,
)


class Ram(Record, frozen=True, kw_only=True):
    """What is said of a machine's RAM: all its bytes; None is not said."""

    size: int
    kind: str | None = None  #: "DDR4"
    mt_s: int | None = None  #: millions of transfers a second
    channels: int | None = None  #: of 64 bits


class Disk(Record, frozen=True, kw_only=True):
    """What is said of a disk: free bytes and its kind; None is not said."""

    free: int | None = None
    kind: str | None = None


class _MemoryKind(Record, frozen=True, kw_only=True):
    name: str
    usual_mt_s: int
    most_mt_s: int
    origin: str


class _DiskKind(Record, frozen=True, kw_only=True):
    name: str
    bytes_per_s: float
    title: str
    origin: str


class _File(Record, frozen=True, kw_only=True):
    memories: tuple[_MemoryKind, ...]
    disks: tuple[_DiskKind, ...]


@cache
def _kinds() -> _File:
    return msgspec.json.decode((DATA / "memories.json").read_bytes(), type=_File)


def parse_ram(text: str) -> Ram:
    """Read "32GiB", "32GiB DDR4", "32GiB DDR4-3200 x2" (two channels), "2x16GiB DDR5-5600" (two modules, two channels).

    Raises:
        UsageError: it is none of these, or faster than its kind is made.
    """
    found = _RAM.fullmatch(text)
    if not found:
        return Ram(size=_size_alone(text, "32GiB or '32GiB DDR4-3200 x2'"))
    modules, kind = int(found["modules"] or 1), found["kind"] and found["kind"].upper()
    size = parse_capacity(found["size"]) * modules
    channels = found["times"] or found["channels"]
    if kind is None:
        if channels:
            example = f"{found['size']} DDR4-3200 x{channels}"
            raise UsageError(f"{text!r} has channels but no kind of memory: write for example {example!r}")
        return Ram(size=size)
    known = {row.name: row for row in _kinds().memories}
    if kind not in known:
        raise UsageError(f"no memory is called {kind!r}: {did_you_mean(kind, known)}")
    speed = int(found["speed"]) if found["speed"] else None
    most, usual = known[kind].most_mt_s, known[kind].usual_mt_s
    if speed and not 400 <= speed <= most:
        raise UsageError(f"{kind}-{speed} is not sold: {kind} has at most {most:,} MT/s, so write for example {kind}-{usual}")
    if channels and not 1 <= int(channels) <= 24:
        raise UsageError(f"{channels} channels are out of range: a machine has 1 to 24")
    said = int(channels) if channels else min(modules, USUAL_CHANNELS) if modules > 1 else None
    return Ram(size=size, kind=kind, mt_s=speed, channels=said)


def parse_disk(text: str) -> Disk:
    """Read "100GiB", "nvme" or "nvme 100GiB".

    Raises:
        UsageError: it is neither a size nor a kind of disk.
    """
    kinds = {row.name for row in _kinds().disks}
    words = text.split()
    named = [word.casefold() for word in words if word.casefold() in kinds]
    size = " ".join(word for word in words if word.casefold() not in kinds)
    if len(named) > 1:
        raise UsageError(f"{text!r} names two kinds of disk: write one of {', '.join(sorted(kinds))}")
    free = _size_alone(size, f"500GB, {', '.join(sorted(kinds))} or 'nvme 500GB'") if size or not named else None
    return Disk(free=free, kind=named[0] if named else None)


def _size_alone(text: str, examples: str) -> int:
    if not any(letter.isdigit() for letter in text):
        raise UsageError(f"{text!r} is not a size: write for example {examples}")
    return parse_capacity(text)


def ram_speed(ram: Ram | None, processor: Processor | None) -> tuple[float | None, str]:
    """Return the bytes/s that programs read the RAM with, and what was assumed of it; None if nothing but its size is known."""
    if ram is None or (ram.kind is None and processor is None):
        return None, ""
    takes = dict(processor.memory) if processor else {}
    kind = ram.kind or next(iter(takes))
    usual = next(row.usual_mt_s for row in _kinds().memories if row.name == kind)
    speed = ram.mt_s or takes.get(kind) or usual
    channels = ram.channels or (processor.channels if processor else USUAL_CHANNELS)
    lacks = ram.kind is None or ram.mt_s is None or ram.channels is None
    whose = f", the most that {processor.name} takes" if processor else ""
    many = f"{channels} channels" if channels > 1 else "one channel"
    said = f"{kind}-{speed} in {many}{whose}" if lacks else ""
    return speed * 1e6 * CHANNEL_BYTES * channels * READ_SHARE, said


def disk_speed(disk: Disk | None) -> tuple[float | None, str]:
    """Return the bytes/s that a disk of its kind is read with, and what was assumed of it; None if its kind is not said."""
    row = next((row for row in _kinds().disks if disk and row.name == disk.kind), None)
    return (row.bytes_per_s, f"{row.title}, {row.bytes_per_s / 1e9:g} GB/s") if row else (None, "")
