"""What spares this user time the next time: a cache is a convenience, and no failure of it is anybody's.

Nothing here raises: what cannot be kept is made again, and what cannot be read is not there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.machine import atomic
from harness.machine.regular import read_regular

MOST_BYTES = 64 << 20  # of a file in the cache; a skeleton has some hundred kilobytes
Kept = TypeVar("Kept")


def cache_dir() -> Path:
    """Return the directory of what is measured, built or made once: FITMATRIX_CACHE, else the system's place for this user."""
    named = os.environ.get("FITMATRIX_CACHE")
    if not named:
        from platformdirs import user_cache_path  # slow to import

        return user_cache_path("fitmatrix")
    place = Path(named)
    with suppress(RuntimeError, OSError):  # ~ of a user that there is not; the directory one stands in is gone
        place = place.expanduser()
        place = place.absolute()
    return place


def kept(path: Path, kind: type[Kept]) -> Kept | None:
    """Return what is kept in a file of the cache; None if nothing is, or nothing that can be read as one of `kind`."""
    try:
        return msgspec.json.decode(read_regular(path, MOST_BYTES), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # of another version, cut short, or not to be had
        return None


def keep(path: Path, data: bytes) -> None:
    """Keep `data` in a file of the cache, whole or not at all, if that is possible."""
    with suppress(OSError):
        atomic.write_bytes(path, data)


def kept_names(folder: Path) -> list[str]:
    """Return the names of what a directory of the cache holds; none if it cannot be read."""
    try:
        return os.listdir(folder)  # noqa: PTH208  # names alone are asked for, and often
    except OSError:
        return []
