"""A worker in small, in a folder of a case: what it holds grows with every token, and it tells so as a real one does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.core.records import Workload
from harness.core.units import MIB
from harness.machine.scratch import Scratch
from harness.measure import beacon
from harness.measure.beacon import Announced, Outlook
from tests.support.runs import ROOT

_GROWS = """
import sys, time
from pathlib import Path
from harness.measure.beacon import Pulse

each, pulse, cache = int(sys.argv[1]), Pulse(Path.cwd(), dict), []
pulse.begin("load")
pulse.begin("warm")
pulse.prompt(1)
print("grows", flush=True)
while True:
    cache.append(b"\\1" * each)
    pulse.token()
    time.sleep(0.03)
"""


@contextlib.contextmanager
def growing_worker(place: Path, limit_bytes: int, token_bytes: int = MIB) -> Iterator[int]:
    """Yield the id of a worker that makes thirty tokens a second, of `token_bytes` each; the run is below `place`."""
    with Scratch(place) as run:
        folder = run / "case-1"
        folder.mkdir()
        said = Announced(
            case="tiny/bf16/cpu",
            workload=Workload(),
            outlook=Outlook(kv={"cpu": [(1, token_bytes), (1000, 1000 * token_bytes)]}, lighter={"cpu": "Try --kv fp8."}),
            limits_bytes={"cpu": limit_bytes},
        )
        beacon.announce(folder, said)
        child = subprocess.Popen(
            [sys.executable, "-c", _GROWS, str(token_bytes)],
            cwd=folder,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"grows\n"
            yield child.pid
        finally:
            child.kill()
            child.wait(timeout=20)
            child.stdout.close()
