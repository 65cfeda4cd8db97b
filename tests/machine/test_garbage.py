"""How seldom Python looks for cycles: commands make many objects that stay, and hardly any of these are in one."""

from __future__ import annotations

import gc
import subprocess
import sys

from harness.machine.garbage import uncollected

_LOOKED = """
import gc, harness.cli

looked = []
gc.callbacks.append(lambda phase, _: looked.append(phase))
import sys
sys.argv = ["fitmatrix", "plan", "smollm2-135m", "--ram", "8GiB", "--json"]
status = harness.cli.main()
print(status, looked.count("start"), gc.get_freeze_count(), file=sys.stderr)
"""


def test_a_command_hardly_looks_for_cycles() -> None:
    done = subprocess.run([sys.executable, "-c", _LOOKED], capture_output=True, text=True, check=True)
    status, looked, frozen = map(int, done.stderr.split()[-3:])
    assert status == 0
    assert looked <= 12  # by the threshold of Python 3.11 some forty times
    assert frozen > 10_000  # what Python would look through once more as it ends


def test_collecting_goes_on_behind_what_was_not_collected() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
