"""Work on many pieces in as many processes as there are cores."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

# Fewer pieces of work than these are done before other processes have started.
WORTH_SHARING = 32
# Of the work each core takes so many: the last one works alone for as long as one of them takes.
_SHARES = 64
# Objects that are left over by pieces of work before Python looks for cycles among them.
_COLLECTED_AFTER = 100_000
T = TypeVar("T")
R = TypeVar("R")


class _Given:
    """What a process was begun with: the work, and if it was forked all pieces of it."""

    work: Callable[[Any], Any]
    pieces: Sequence[Any]


def forks() -> bool:
    """Tell whether processes begin with all that this one holds, which need not be sent: on Linux, beside no other thread."""
    return sys.platform == "linux" and psutil.Process().num_threads() == 1


@contextmanager
def shared(work: Callable[[T], R], pieces: Sequence[T], few: int = WORTH_SHARING) -> Iterator[Iterator[R]]:
    """Do pieces of work, if they are not few in as many processes as there are cores; give what comes of each, in their order.

    This process does alone what is left where no more can be had, or where one of them is killed.
    """
    import multiprocessing  # slow to import, and hardly any page is shared

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(pieces) < few or cores < 2 or multiprocessing.parent_process():
        yield map(work, pieces)
        return
    before = multiprocessing.active_children()
    try:
        pool, found = _pooled(cores, work, pieces)
    except (OSError, NotImplementedError):  # no semaphores, or no more processes; some may have begun
        for child in set(multiprocessing.active_children()).difference(before):
            child.kill()
        yield map(work, pieces)
        return
    try:
        yield _with_rest(found, work, pieces)
    finally:
        pool.shutdown(cancel_futures=True)


def _pooled(cores: int, work: Callable[[T], R], pieces: Sequence[T]) -> tuple[ProcessPoolExecutor, Iterator[R]]:
    """Begin processes and their work."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    forked, at_once = forks(), max(len(pieces) // (cores * _SHARES), 1)
    context = multiprocessing.get_context("fork" if forked else None)
    pool = ProcessPoolExecutor(cores, context, _begin, (work, pieces if forked else ()))
    if forked:
        return pool, pool.map(_do_piece, range(len(pieces)), chunksize=at_once)
    return pool, pool.map(functools.partial(_tidily, work), pieces, chunksize=at_once)


def _with_rest(found: Iterator[R], work: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """Yield what processes have done, and if one of them was killed do here what is left."""
    from concurrent.futures.process import BrokenProcessPool

    done = 0
    try:
        for result in found:
            done += 1
            yield result
    except BrokenProcessPool:
        yield from map(work, pieces[done:])


def _begin(work: Callable[[Any], Any], pieces: Sequence[Any]) -> None:
    """Leave Ctrl-C to the process that began this one, end with it, and do not look for cycles during work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()
    gc.disable()
    _Given.work, _Given.pieces = work, pieces


def _end_with_parent() -> None:
    """End this process when the one that began it has, however that came about: else it would wait for work for ever."""
    import multiprocessing

    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do_piece(number: int) -> Any:
    return _tidily(_Given.work, _Given.pieces[number])


def _tidily(work: Callable[[T], R], piece: T) -> R:
    """Do a piece of work, and look for cycles behind it: then next to nothing is left of the many objects that a page takes."""
    done = work(piece)
    if gc.get_count()[0] > _COLLECTED_AFTER:
        gc.collect()
    return done
