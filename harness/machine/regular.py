"""Files that are read only where they are files: a pipe would never open, and a device never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

_STRANGE = "it is no regular file"


def open_regular(path: Path, flags: int = os.O_RDONLY) -> IO[bytes]:
    """Open a file to read it. Raises OSError: it cannot be opened, or is a directory, a pipe or a device."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        code, said = (errno.EISDIR, os.strerror(errno.EISDIR)) if stat.S_ISDIR(kind) else (errno.EINVAL, _STRANGE)
        raise OSError(code, said, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return what a file holds. Raises OSError: as `open_regular`, or it holds more than `most_bytes`."""
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it holds more than {most_bytes:,} bytes", str(path))
    return data
