"""Imported first by the fork server: makes it keep order among what it starts, and leave nothing when it ends.

The fork server ends when its parent does, however that came about. It adopts what workers leave behind (PR_SET_CHILD_SUBREAPER),
so whatever they started is below it, and goes with it, and so do the folders and control groups of the run.
"""

import atexit
import contextlib
import ctypes
import os
import sys
import time
import warnings

from harness.machine import cgroup, process_tree, scratch

_PR_SET_CHILD_SUBREAPER = 36
_MOST_S = 5.0  # a process that hangs in the kernel ends when that lets go of it


def keep_watch() -> None:
    """Adopt orphans, and at the end of this very process (not of one forked from it) end them and sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    warnings.filterwarnings("ignore", message="forkserver: waitpid returned")  # an adopted process has ended
    atexit.register(_leave_nothing, os.getpid(), os.getppid())


def _leave_nothing(owner: int, parent: int) -> None:
    if os.getpid() != owner:
        return
    until_s = time.monotonic() + _MOST_S
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < until_s:
            process_tree.kill_below(owner)
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
    if os.getppid() != parent:  # it was killed: it would have removed them itself
        cgroup.remove_groups_of(parent)
    scratch.sweep()


keep_watch()
