"""Reads models as a user's command does and reports how each reading went: `python -m tests.faults.reading < folders > report`.

A process of its own, without torch: what is counted is the cost of reading, and what a file makes happen is seen by an audit hook.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from harness.cli.entry import main
from harness.core.text import visible

MOST_BYTES = 1 << 30
# What running code or looking elsewhere would come through. `compile` and `exec` are Python's own imports as well.
RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
    "socket.connect",
)


def memory(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


class Watch:
    """Keeps what a file of a model made happen."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on, self.secret = False, ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in RUNS or (event == "open" and self.secret and str(arguments[0]).endswith(self.secret))):
            self.seen.append(f"{event} {arguments!r}"[:200])


def read(watch: Watch, command: list[str], folder: str) -> dict[str, Any]:
    """Run one command on one model, as the command line does."""
    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")
    before, start, failure, status = memory("VmRSS"), time.perf_counter(), "", None
    watch.seen, watch.on = [], True
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([*command, folder])
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001 whatever comes out here is what is looked for
            failure = traceback.format_exc()[-2000:]
    watch.on = False
    seconds = time.perf_counter() - start
    said = err.getvalue()
    if not failure and status not in (0, 1, 2):
        failure = f"exit status {status}"
    if not failure and status == 2 and not (said.startswith("fitmatrix: ") and said.count("\n") == 1 and len(said) < 2000):
        failure = f"not one sentence: {said!r}"[:500]
    if not failure and visible(said + out.getvalue()) != said + out.getvalue():
        failure = "prints what a terminal obeys"
    grown = memory("VmHWM") - before
    return {
        "folder": folder,
        "command": command[0],
        "status": status,
        "seconds": seconds,
        "bytes": grown,
        "failure": failure,
        "ran": watch.seen,
    }


def serve() -> None:
    request = json.load(sys.stdin)
    watch = Watch()
    watch.secret = request["secret"]
    sys.addaudithook(watch)
    for package in () if request["with_torch"] else ("torch", "transformers"):
        sys.modules[package] = None  # type: ignore[assignment] # as on a laptop that only plans
    commands = [["inspect"], ["plan", "--gpu", "8GiB", "--ram", "16GiB"]]
    for command in commands:  # the imports are not the file's doing
        read(watch, command, request["warm"])
    held = memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, held + MOST_BYTES))
    found = [read(watch, command, folder) for folder in request["folders"] for command in commands]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    serve()
