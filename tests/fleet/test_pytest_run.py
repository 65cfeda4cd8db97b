"""The test files of another machine, run in a folder of their own by a process that ends with whoever started it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

from harness.fleet import pytest_run
from tests.support import runs

_SLOW = "import os, pathlib, time\npathlib.Path('began').write_text(str(os.getpid()))\ntime.sleep(100)\n"


def test_files_are_laid_out_in_the_folder_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pytest_run.lay_out(tmp_path / "run", {"test_load.py": "", "../../test_elsewhere.py": "x = 1\n"})
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")) == [
        Path("run/cases/test_elsewhere.py"),
        Path("run/cases/test_load.py"),
    ]


def test_what_still_runs_at_the_end_is_ended(tmp_path: Path) -> None:
    """By a signal on which it could keep what it has; what it said is in the log."""
    pytest_run.lay_out(tmp_path, {"conftest.py": _SLOW})
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    deadline = time.monotonic() + 120
    with pytest_run.measuring(sys.executable, tmp_path, [], environment) as process:
        while not (tmp_path / "began").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "began").read_text(encoding="utf-8") == str(process.pid), (tmp_path / pytest_run.RUN_LOG).read_text()
        assert process.poll() is None
    assert process.returncode
    assert not psutil.pid_exists(process.pid)
