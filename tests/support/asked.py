"""Answers as `python -m harness.worker.MODULE` does, by forks of one process that has imported transformers.

Importing takes seconds, and hundreds of tests ask. `start` is for the tests; this module run by itself is that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PAUSE_S = 0.005  # between two looks at whether a fork has ended
Answer = Callable[[Sequence[str], bytes, float, Mapping[str, str]], "subprocess.CompletedProcess[bytes]"]


@contextlib.contextmanager
def answering(scratch: Path) -> Iterator[Answer]:
    """Yield what stands for `harness.architecture.ask_worker.run`; its process starts with the first question."""
    server: list[subprocess.Popen[bytes]] = []
    lock = threading.Lock()

    def answer(
        command: Sequence[str], text: bytes, limit_s: float, settings: Mapping[str, str]
    ) -> subprocess.CompletedProcess[bytes]:
        with lock:
            if not server:
                server.append(_start())
            names = {name: str(scratch / name) for name in ("in", "out", "err")}
            Path(names["in"]).write_bytes(text)
            asked = {"module": command[-1], "limit_s": limit_s, "settings": dict(settings), **names}
            to, back = server[0].stdin, server[0].stdout
            assert to is not None
            assert back is not None
            to.write(json.dumps(asked).encode() + b"\n")
            to.flush()
            status = json.loads(back.readline())
            if status is None:
                raise subprocess.TimeoutExpired(command, limit_s)
            return subprocess.CompletedProcess(command, status, Path(names["out"]).read_bytes(), Path(names["err"]).read_bytes())

    try:
        yield answer
    finally:
        for process in server:
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)


def main() -> None:
    """Import, then fork for each line that is read; say the exit status of the fork, or null if its time was over."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what packages print while they are imported is no reply
    import torch

    import harness.worker.build_skeleton
    import harness.worker.trace.__main__  # noqa: F401 all that a fork needs

    torch.set_num_threads(1)  # threads do not live on in forks
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_answered(json.loads(line))).encode() + b"\n")


def _answered(asked: dict[str, Any]) -> int | None:
    child = os.fork()
    if child == 0:
        os._exit(_run(asked))
    until = time.monotonic() + asked["limit_s"]
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_PAUSE_S)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(asked: dict[str, Any]) -> int:
    """Be what `python -m MODULE` is, in a fork; return its exit status."""
    for number, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC))):
        os.dup2(os.open(asked[name], mode, 0o600), number)
    os.dup2(os.open(asked["err"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate(("r", "w", "w")))
    os.environ.clear()
    os.environ.update(asked["settings"])
    sys.argv = [asked["module"]]
    status = 0
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 as the interpreter does at the end of a script
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
