"""The processes below a process."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from harness.machine import process_tree
from tests.support import scripted

FAMILY = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("listed", [process_tree.children, process_tree._read_children])
def test_children_are_known_by_the_kernel_and_by_psutil(listed: object) -> None:
    assert callable(listed)
    child = subprocess.Popen(["sleep", "600"])
    try:
        assert child.pid in listed(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert listed(child.pid) == []


def test_everything_below_ends_and_what_is_spared_lives() -> None:
    spared = subprocess.Popen(["sleep", "600"])
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    others = set(process_tree.children(os.getpid())) - {parent.pid}
    process_tree.kill_below(os.getpid(), spare=others)
    parent.communicate()
    assert scripted.has_ended(grandchild)
    assert scripted.runs(psutil.Process(spared.pid))
    spared.kill()
    spared.wait()
