"""What `tox run -e matrix` prints, without minutes of measuring: a run of the same cases by scripted workers, whose figures are
replaced by those of results that were measured and are kept in the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.docs import tables
from tests.support import runs

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "reports" / "smollm2-135m"
MODEL = "smollm2-135m"


def printed(width: int) -> str:
    """Return the output of a run of the default matrix with the measured figures.

    A scripted worker holds all weights in RAM, which fails the test of some placements; the kept results passed all four tests.
    """
    figures = tables.figures(RECORD)
    lines = scripted(width).splitlines()
    return "\n".join(
        re.sub(r"^(\S+)( +)[.F]{4}  (?:works|check failed)  .+$", lambda found: _line(found, figures), line) for line in lines
    )


def _line(found: re.Match[str], figures: dict[str, str]) -> str:
    return f"{found[1]}{found[2]}....  {figures[found[1]]}"


@cache
def scripted(width: int) -> str:
    """Return the output of `pytest cases` as it comes, the workers scripted, on a machine without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        own = {"HOME": str(there / "home"), "FITMATRIX_CACHE": str(there / "cache"), "COLUMNS": str(width)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "cases", "--model", f"./{MODEL}"],
            cwd=runs.folder(there / "matrix", [MODEL]),
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **own},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout
