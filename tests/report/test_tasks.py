"""Work shared among processes: whatever becomes of these, all of it is done, in its order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.core.records import Result
from harness.machine.process_tree import process_status
from harness.report import tasks
from harness.report.page import render
from harness.report.page.cases import write_cases
from tests.support.builders import GOLDEN

# Other tests may have left threads here, which what is done here does not touch.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
PIECES = list(range(200))


def piece_by(number: int) -> tuple[int, int]:
    return number, os.getpid()


def is_killed_at_half(number: int) -> int:
    if number == len(PIECES) // 2 and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.mark.parametrize("is_forked", [True, False])
def test_pieces_come_back_in_their_order_from_other_processes(is_forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "forks", lambda: is_forked)
    with tasks.shared(piece_by, PIECES) as found:
        numbers, processes = zip(*found, strict=True)
    assert list(numbers) == PIECES
    assert os.getpid() not in processes


def test_what_forked_processes_are_begun_with_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "forks", lambda: True)
    unsent: list[Callable[[], int]] = [lambda: 1, lambda: 2]  # pickle refuses these
    with tasks.shared(lambda piece: piece(), unsent, few=2) as found:
        assert list(found) == [1, 2]


def test_what_a_killed_process_leaves_is_done_here() -> None:
    with tasks.shared(is_killed_at_half, PIECES) as found:
        assert list(found) == PIECES


def test_processes_end_with_the_one_that_began_them() -> None:
    program = """
import multiprocessing, os, time
from harness.report import tasks
os.sched_getaffinity = lambda _: {0, 1}
with tasks.shared(time.sleep, [0.0, 600.0, 600.0], few=2) as found:
    next(found)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    next(found)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout
        pids = [int(pid) for pid in begun.stdout.readline().split()]
        begun.kill()
    assert len(pids) >= 2
    until = time.monotonic() + 30
    while any(process_status(pid) not in ("gone", "zombie") for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("begun", [0, 1])
def test_where_no_process_can_be_begun_the_work_is_done_here(begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    fork: Callable[[], int] = os.fork

    def refused() -> int:
        if len(pids) == begun:
            raise BlockingIOError("Resource temporarily unavailable")
        pids.append(pid := fork())
        return pid

    monkeypatch.setattr(os, "fork", refused)
    with tasks.shared(piece_by, PIECES) as found:
        assert list(found) == [(number, os.getpid()) for number in PIECES]
    assert len(pids) == begun
    for child in multiprocessing.active_children():
        child.join(10)
    assert not set(pids) & {child.pid for child in multiprocessing.active_children()}


def test_a_page_is_the_same_by_one_process_and_by_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = [msgspec.json.decode(line, type=Result) for line in GOLDEN.read_bytes().splitlines()]

    def leaves_its_name(*given: Any, **named: Any) -> str:
        (tmp_path / f"{os.getpid()}").touch()
        return write_cases(*given, **named)

    monkeypatch.setattr("harness.report.page.render.write_cases", leaves_its_name)
    monkeypatch.setattr(tasks, "forks", lambda: True)
    alone = render.render(results)
    assert [file.name for file in tmp_path.iterdir()] == [f"{os.getpid()}"]
    monkeypatch.setattr(render, "_MOST_ALONE", 0)
    assert render.render(results) == alone
    assert len(list(tmp_path.iterdir())) > 1
    assert gc.isenabled()
