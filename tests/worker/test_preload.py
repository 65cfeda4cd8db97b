"""What is imported before a case: how threads wait that others keep from working."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAYS = "import os; from harness.worker import preload; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "30000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(given: dict[str, str], spins: str) -> None:
    usual = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", SAYS]
    done = subprocess.run(command, env=usual | given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{spins}\n"
