"""What watching costs: the watcher's share of a core and its memory, and what the beats cost the worker that is watched."""

from __future__ import annotations

import contextlib
import math
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from fcntl import ioctl
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from harness.catalog import download
from harness.checkpoint import reader
from harness.core.options import DEFAULT_MODEL
from harness.core.records import Case, Workload
from harness.core.units import GIB, KIB, MIB
from harness.machine import probe
from harness.machine.scratch import Scratch
from harness.measure.aggregate import decode_tok_s
from harness.measure.beacon import Pulse
from harness.measure.protocol import GenerateDone
from harness.planning.feasibility import decide
from harness.run import worker_process
from harness.run.case_result import CaseModel, RunContext
from harness.run.runner import Run
from tests.live.growing import growing_worker
from tests.support.reporting import Figure
from tests.support.runs import ROOT

SECONDS, SETTLED_S = 20.0, 4.0
MOST_SHARE, MOST_BYTES = 0.005, 60 * MIB
MOST_CHANGE = 0.005  # of a figure of a run that is watched
LEAST_PAIRS, MOST_PAIRS = 20, 60  # of rounds of two to four seconds


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


def test_a_watched_run_measures_the_same(tmp_path: Path, figures: list[Figure]) -> None:
    """Rounds of one worker, in pairs: one while the watcher runs and one while it is stopped, the first of a pair in turn.

    A stopped watcher takes nothing but its memory, so that the pairs differ by what it does alone, and no round pays for its start.
    Only a change that the pairs show fails: where rounds differ by 5 % among themselves, the interval of 150 pairs is 3 % wide.
    """
    probed = probe.probe()
    work = Workload(prompt_tokens=64, new_tokens=64, repeats=5)
    location = download.fetch(DEFAULT_MODEL)
    plan = decide(Case(model=DEFAULT_MODEL, precision="bf16", placement="cpu", workload=work), probed, reader.read(location))
    with Scratch(tmp_path) as scratch:
        context = RunContext(
            run="bench",
            machine=probed,
            environment=probe.versions(),
            scratch=scratch,
            worker_main=worker_process.torch_worker,
            timeout_s=3600,
        )
        run = Run(plan, CaseModel(location=location), context)
        try:
            run.round()
            pairs = watched_pairs(run)
        finally:
            result = run.finish()
    assert result.outcome == "ok"
    for name, ratios in pairs.items():
        low, middle, high = (f"{ratio - 1:+.2%}" for ratio in median_interval(ratios))
        found = f"{middle} ({low} to {high})"
        figures.append(Figure(what=f"{name}, watched against not", rows=len(ratios), found=found, wanted="0.5 %"))
    for ratios in pairs.values():
        least, _, most = median_interval(ratios)
        assert least <= 1 + MOST_CHANGE, "watching is shown to change it"
        assert most >= 1 - MOST_CHANGE, "watching is shown to change it"


def watched_pairs(run: Run) -> dict[str, list[float]]:
    """Return the ratios of watched rounds to those beside them, until they tell the change well enough or are MOST_PAIRS."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness", "watch", "--json"]
    found: dict[str, list[float]] = {"decode tokens/s": [], "seconds to the first token": []}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env) as watcher:
        assert watcher.stdout is not None
        try:
            assert b"smollm2" in watcher.stdout.readline(), "it watches another run"
            threading.Thread(target=watcher.stdout.read, daemon=True).start()
            while len(found["decode tokens/s"]) < MOST_PAIRS and not all(map(_is_told, found.values())):
                pair = dict[bool, GenerateDone]()
                for watched in (True, False) if len(found["decode tokens/s"]) % 2 else (False, True):
                    watcher.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
                    pair[watched] = run.round()
                found["decode tokens/s"].append(decode_tok_s(pair[True]) / decode_tok_s(pair[False]))
                found["seconds to the first token"].append(pair[True].token_s[0] / pair[False].token_s[0])
        finally:
            watcher.kill()
    return found


def _is_told(ratios: Sequence[float]) -> bool:
    if len(ratios) < LEAST_PAIRS:
        return False
    low, _, high = median_interval(ratios)
    return high - low < MOST_CHANGE


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the 95 % interval around it, by order statistics (Conover, Practical Nonparametric Statistics, 3.2)."""
    ordered, count = sorted(values), len(values)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - reach) - 1), min(count - 1, math.ceil(count / 2 + reach))
    return ordered[low], statistics.median(ordered), ordered[high]


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
