"""Sizes, seconds and rates: text in, base units inside, text out. The only place that formats a quantity."""

from __future__ import annotations

import functools
import math
import re

from harness.core.errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BINARY = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_WRITTEN = (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgt]?)(i?)(b?))?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Turn "12GiB", "12GB", "12G" or "4096" into bytes.

    GiB and the bare letter G are binary (2**30), GB is decimal (10**9), a bare number is bytes. A lower-case b after a
    prefix ("12Gb") is refused: it means bits to some libraries.

    Raises:
        UsageError: not a size, zero, or too large to be one.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is not a size: write for example 8GiB, 512MiB or 12GB")
    number, prefix, binary, unit = match.groups()
    prefix, binary, unit = (prefix or "").lower(), binary or "", unit or ""
    if prefix and not binary and unit == "b":
        raise UsageError(f"{text!r} could mean bits: write {number}{prefix.upper()}iB or {number}{prefix.upper()}B")
    if binary and not prefix:
        raise UsageError(f"{text!r} is not a size: write for example 8GiB, 512MiB or 12GB")
    factor = _DECIMAL[prefix] if prefix and unit and not binary else _BINARY[prefix]
    size = float(number) * factor
    if not 1 <= size < 1 << 60:
        raise UsageError(f"{text!r} is out of range: a size is more than 0 and less than 1 EiB")
    return int(size)


def parse_capacity(text: str) -> int:
    """Read the size of a memory, a disk or a file as `parse_size` does, but no bare number that only a slip can mean as bytes.

    Raises:
        UsageError: not a size, or a number below 1 MiB without a unit; the sentence says how to write it.
    """
    size = parse_size(text)
    if size >= MIB or not text.strip()[-1].isdigit():
        return size
    meant = f"{text.strip()}{'GiB' if size < 4096 else 'MiB'}"
    raise UsageError(f"{text!r} without a unit is {size:,} bytes: write {meant}")


def exact_size(size: int) -> str:
    """Write bytes so that `parse_capacity` gives the same back: 8GiB, 1536MiB, 12GB, else a bare number, or 512B."""
    factors = [(unit, factor) for unit, factor in (("GiB", GIB), ("MiB", MIB), ("GB", 10**9), ("MB", 10**6)) if size % factor == 0]
    unit, factor = factors[0] if factors else ("" if size >= MIB else "B", 1)
    return f"{size // factor}{unit}"


# A number that is shown once is shown several times: in a cell, in a row of figures, in what sums them up.
@functools.lru_cache(4096)
def significant(value: float, digits: int = 3) -> str:
    """Write a number with `digits` significant digits, without exponent: 0.0123, 1.23, 123, 12,300."""
    if value == 0 or not math.isfinite(value):
        return f"{value or 0:.0f}"
    plain = f"{value:#,.{digits}g}"
    if "e" not in plain:
        return plain.removesuffix(".")
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of ten, after rounding: 9.999 is written as 10.0
    return f"{value:,.{min(max(digits - 1 - power, 0), 15)}f}"


def significant_step(value: float, digits: int = 3) -> float:
    """Return what the last digit is worth that `significant` writes of a value above 0: 0.01 of 1.23."""
    return float(10.0 ** (int(f"{value:.{digits - 1}e}".partition("e")[2]) - digits + 1))


def format_gib(size: float) -> str:
    """Write bytes as a bare number of GiB, for places that name the unit once."""
    return significant(size / GIB)


def format_size(size: float) -> str:
    """Write bytes with the binary unit that suits them: 1.50 GiB, 512 MiB, 3.00 KiB, 12 bytes."""
    for unit, factor in _WRITTEN:
        if abs(size) >= factor:
            return f"{significant(size / factor)} {unit}"
    return f"{size:.0f} bytes"


def format_seconds(seconds: float) -> str:
    """Write a duration: 3.1 ms, 2.20 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 1:
        return f"{significant(seconds * 1000)} ms"
    if seconds < 100:
        return f"{significant(seconds)} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def format_rate(tokens_per_second: float) -> str:
    """Write a speed in tokens/s."""
    return f"{significant(tokens_per_second)} tokens/s"


def format_share(share: float) -> str:
    """Write a share of one as a percentage: 98.5 %."""
    return f"{share * 100:.1f} %"


def format_bandwidth(bytes_per_s: float) -> str:
    """Write bytes per second in decimal GB/s, as the makers of cards and disks do: 360 GB/s, 0.512 GB/s."""
    return f"{significant(bytes_per_s / 1e9)} GB/s"


def format_instant(at: str) -> str:
    """Write an instant of UTC in ISO 8601 to the minute: 2026-11-24 10:12 UTC."""
    return f"{at[:16].replace('T', ' ')} UTC"


def format_count(count: int) -> str:
    """Write a number of parameters: 6.17 B, 135 M, 35,136."""
    for letter, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= factor:
            return f"{significant(count / factor)} {letter}"
    return f"{count:,}"
