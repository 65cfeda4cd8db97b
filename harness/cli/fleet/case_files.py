"""`--cases DIR`: the test files that run elsewhere, on the machines of a cluster or in the environments of releases."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.core.errors import UsageError


def add_case_files(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument("--cases", type=Path, default=Path("cases"), metavar="DIR", help="test files to run (default cases)")


def read_case_files(directory: Path) -> dict[str, str]:
    """Return the text of each test file of a directory, by its name.

    Raises:
        UsageError: there is none.
        OSError: one cannot be read.
    """
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.py"))}
    if not files:
        raise UsageError(f"--cases {directory}: has no test files; name the directory cases/ of a clone")
    return files
