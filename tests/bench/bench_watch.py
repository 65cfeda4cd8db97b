"""What watching costs: the watcher's share of a core and its memory, and what the beats cost the worker that is watched."""

from __future__ import annotations

import contextlib
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from harness.core.units import GIB, KIB, MIB
from harness.measure.beacon import Pulse
from tests.live.growing import growing_worker
from tests.support.reporting import Figure
from tests.support.runs import ROOT

SECONDS, SETTLED_S = 20.0, 4.0
MOST_SHARE, MOST_BYTES = 0.005, 60 * MIB


@contextlib.contextmanager
def terminal() -> Iterator[int]:
    """Yield the inner end of a terminal of 100 by 30, whose outer end is read by a thread."""
    outer, inner = pty.openpty()
    ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(outer, 1 << 16):
                pass

    threading.Thread(target=drain, daemon=True).start()
    try:
        yield inner
    finally:
        os.close(inner)
        os.close(outer)


def cost(watcher: subprocess.Popen[bytes]) -> tuple[float, int]:
    """Return the share of a core that a watcher takes once it runs, and the most memory it has had, in bytes."""
    time.sleep(SETTLED_S)
    process = psutil.Process(watcher.pid)
    before, begun = process.cpu_times(), time.monotonic()
    time.sleep(SECONDS)
    after, ended = process.cpu_times(), time.monotonic()
    status = Path(f"/proc/{watcher.pid}/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) * KIB for line in status.splitlines() if line.startswith("VmHWM"))
    watcher.kill()
    watcher.wait()
    return (after.user + after.system - before.user - before.system) / (ended - begun), peak


needs_textual = pytest.mark.skipif(find_spec("textual") is None, reason="needs Textual, the extra watch")


@pytest.mark.parametrize("words", [pytest.param(("--json",), id="json"), pytest.param((), marks=needs_textual, id="screen")])
def test_watching_costs_little(tmp_path: Path, figures: list[Figure], words: tuple[str, ...]) -> None:
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    with growing_worker(tmp_path, limit_bytes=GIB, token_bytes=64 * KIB) as pid, terminal() as inner:
        command = [sys.executable, "-m", "harness", "watch", "--pid", str(pid), *words]
        share, peak = cost(subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=env))
    what = f"fitmatrix watch {' '.join(words)}".rstrip()
    figures.append(Figure(what=f"{what}, share of a core", found=f"{share * 100:.2f} %", wanted=f"{MOST_SHARE * 100:.1f} %"))
    figures.append(Figure(what=f"{what}, memory", found=f"{peak / MIB:.0f} MiB", wanted=f"{MOST_BYTES / MIB:.0f} MiB"))
    assert share <= MOST_SHARE
    assert peak <= MOST_BYTES


def test_a_beat_costs_a_worker_next_to_nothing(tmp_path: Path, figures: list[Figure]) -> None:
    """In seconds of a second: of a model that makes a thousand tokens in it, faster than any that is measured here."""
    pulse, tokens = Pulse(tmp_path, dict), 200_000
    pulse.prompt(1)
    begun = time.process_time()
    for _ in range(tokens):
        pulse.token()
    each = (time.process_time() - begun) / tokens
    share = 1000 * each + 4 * _beat_s(pulse)
    figures.append(Figure(what="telling of 1,000 tokens a second", found=f"{share * 100:.3f} %", wanted="0.5 %"))
    assert share <= 0.005


def _beat_s(pulse: Pulse) -> float:
    begun = time.process_time()
    for _ in range(2000):
        pulse.begin("warm")
    return (time.process_time() - begun) / 2000
