"""How long a token takes while others work, with the spinning of OpenMP's threads that a case has and with that of libgomp.

Both take turns: alone, beside a program that takes a core, and two models at once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.reporting import Figure

ROUNDS = 3
# A model of the size of SmolLM2-135M, without its attention: threads meet after each of 240 products. Prints seconds a token.
TOKENS = """
import statistics, sys, time
if sys.argv[1] == "ours":
    from harness.worker import preload
import torch

layers = [torch.randn(rows, columns) for rows, columns in [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576),
    (576, 1536), (576, 1536)] * 30]
inputs = {columns: torch.randn(1, columns) for columns in (576, 1536)}

def token():
    for weight in layers:
        torch.nn.functional.silu(torch.nn.functional.linear(inputs[weight.shape[1]], weight))

with torch.inference_mode():
    token()
    took, begun = [], time.perf_counter()
    while time.perf_counter() - begun < 3:
        start = time.perf_counter()
        token()
        took.append(time.perf_counter() - start)
print(statistics.median(took))
"""


def started(whose: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", TOKENS, whose]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def seconds(whose: str, at_once: int) -> float:
    runs = [started(whose) for _ in range(at_once)]
    return statistics.fmean(float(run.communicate()[0]) for run in runs)


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """Take `count` cores meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


@pytest.mark.parametrize(
    ("situation", "busy", "at_once", "least", "wanted"),
    [
        ("alone", 0, 1, 0.95, "not slower: 0.95 or more"),
        ("beside a program that takes a core", 1, 1, 1.0, "1 or more"),
        ("two models at once", 0, 2, 5.0, "5 or more"),
    ],
)
def test_waiting_threads_leave_the_core_to_others(
    situation: str, busy: int, at_once: int, least: float, wanted: str, figures: list[Figure]
) -> None:
    with neighbors(busy):
        pairs = [(seconds("libgomp", at_once), seconds("ours", at_once)) for _ in range(ROUNDS)]
    faster = statistics.median(theirs / ours for theirs, ours in pairs)
    found = f"{faster:.2f} times as fast ({1e3 * statistics.median(ours for _, ours in pairs):.0f} ms)"
    what = f"a token on all cores, {situation}: with a case's environment against libgomp's own"
    figures.append(Figure(what=what, found=found, wanted=wanted, rows=ROUNDS))
    assert faster >= least
