"""When Python looks for objects that hold each other in a cycle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Python's own is 700 in most versions. What modules, tables and plans of a command are made of stays until its end.
_MANY = 50_000


def collect_seldom() -> None:
    """Look for cycles behind many new objects only, in a process that is a command from its start."""
    gc.set_threshold(_MANY)


def leave_uncollected() -> None:
    """Keep Python from looking for cycles among all that is left as it ends: the system takes everything back at once."""
    gc.freeze()


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles meanwhile: among millions of objects, of which hardly any is in one, that takes its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
