"""The test files of cases/ run by pytest in a folder of their own, in a process that ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

RUN_LOG, RUN_RESULTS = "log", "results"  #: in the folder: what pytest says, and the directory of its results

_MARKER = "stage(n): the order of the tests of one case"  # here is no pyproject.toml to say so
_WORDS = ("-p", "harness.plugin", "-p", "no:cacheprovider", "-o", f"markers={_MARKER}", "cases", "--results", RUN_RESULTS)
# Started in the place of pytest: asks the kernel for SIGTERM should the parent die, sees that it has not yet, and becomes pytest.
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; parent = int(sys.argv[1]); "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == parent and os.execv(sys.executable, [sys.executable, '-m', 'pytest', *sys.argv[2:]])"
)


def lay_out(folder: Path, cases: Mapping[str, str]) -> None:
    """Write test files, by name, to the cases/ of a folder. Raises OSError."""
    (folder / "cases").mkdir()
    for name, text in cases.items():
        (folder / "cases" / Path(name).name).write_text(text, encoding="utf-8")


@contextmanager
def measuring(python: str, folder: Path, words: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the cases of a folder by an interpreter; what still runs at the end gets a signal on which it keeps what it has."""
    with (folder / RUN_LOG).open("wb") as log:
        process = subprocess.Popen(
            [python, "-c", _DIES_WITH_PARENT, str(os.getpid()), *_WORDS, *words],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
