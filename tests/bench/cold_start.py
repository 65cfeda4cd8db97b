"""What a command takes of the processor from the interpreter's start, its modules compiled as pip leaves them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path


class ColdStart:
    """Runs commands of fitmatrix, each in a process of its own; compiled modules lie in `folder` from the first on."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._environment = {**kept, "PYTHONPYCACHEPREFIX": str(folder)}

    def processor_s(self, *words: str) -> float:
        """Run a command and return the seconds of the processor that it took."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "harness", *words]
        subprocess.run(command, capture_output=True, check=True, env=self._environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
