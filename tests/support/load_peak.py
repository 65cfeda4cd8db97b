"""The most memory that loading takes and no kernel can drop: `python load_peak.py DIRECTORY` runs the code on its standard input.

A process of its own, so that nothing of what was freed before is used again unseen.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from harness.measure import sampler
from harness.measure.protocol import Load


def measure(folder: Path, code: str) -> int:
    """Load by this code, with the model in MODEL, as the worker does; return the bytes of anonymous memory that it took at most."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.load_peak", folder],
        input=code,
        text=True,
        capture_output=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
    )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    import harness.models  # noqa: F401 what is imported here is not counted
    from harness.worker import model as work

    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, sampler.memory(os.getpid()).anon_bytes)

    request = Load(model=sys.argv[1], code=sys.stdin.read(), tokenizer=False)
    watching = threading.Thread(target=sample)
    before = sampler.memory(os.getpid()).anon_bytes
    watching.start()
    work.load(request, lambda _: contextlib.nullcontext())
    ended.set()
    watching.join()
    print(max(peak, sampler.memory(os.getpid()).anon_bytes) - before)


if __name__ == "__main__":
    main()
