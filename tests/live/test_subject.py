"""Whom to watch: workers are found by the folder they work in, and any process by its id."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.records import Workload
from harness.live import reading, subject
from harness.live.subject import WatchTarget, case_folder, running
from harness.machine.scratch import Scratch
from harness.measure import beacon
from harness.measure.beacon import Announced
from harness.measure.system_counters import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="looks into /proc")

_WAITS = "import sys; print(flush=True); sys.stdin.read()"

Starter = Callable[..., "subprocess.Popen[str]"]


def _starting(folder: Path) -> str:
    """A program that starts the one that waits, in a folder, and waits for it."""
    return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_WAITS!r}], cwd={str(folder)!r})"


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a child in a folder, which ends when the test does; return when it runs."""
    found: list[subprocess.Popen[str]] = []

    def started(folder: Path, code: str = _WAITS) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdin=pipe, stdout=pipe, text=True)
        found.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return child

    yield started
    for child in found:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        child.wait(timeout=20)
        child.stdout.close()


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Path]:
    """The folder of a case within that of a run."""
    with Scratch(tmp_path) as run:
        folder = run / "case-1"
        folder.mkdir()
        yield folder


def test_a_worker_is_found_by_its_folder(case: Path, start: Starter) -> None:
    worker = start(case)
    assert case_folder(worker.pid) == case
    assert worker.pid in running()
    found = WatchTarget(worker.pid).look()
    assert found is not None
    assert (found.pid, found.pids, found.folder) == (worker.pid, (worker.pid,), case)


def test_the_process_of_a_run_leads_to_its_worker(case: Path, tmp_path: Path, start: Starter) -> None:
    """As pytest does, which starts a fork server that starts the worker."""
    parent = start(tmp_path, _starting(case))
    found = WatchTarget(parent.pid).look()
    assert found is not None
    assert found.folder == case
    assert found.pid != parent.pid


def test_a_folder_that_only_looks_like_one_is_none(tmp_path: Path, start: Starter) -> None:
    (tmp_path / "fitmatrix-x" / "case-1").mkdir(parents=True)
    child = start(tmp_path / "fitmatrix-x" / "case-1")
    assert case_folder(child.pid) is None
    assert child.pid not in running()


def test_the_case_that_began_last_is_watched_until_it_ends(case: Path, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those of this test: others may run as well."""
    started: list[int] = []
    monkeypatch.setattr(subject, "_every_pid", lambda: iter(started))
    first = start(case)
    started.append(first.pid)
    (case.parent / "case-2").mkdir()
    target = WatchTarget()
    seen = target.look()
    assert seen is not None
    assert seen.pid == first.pid
    second = start(case.parent / "case-2")
    started.append(second.pid)
    seen = target.look()
    assert seen is not None
    assert seen.pid == first.pid
    newer = WatchTarget().look()
    assert newer is not None
    assert (newer.pid, newer.others) == (second.pid, 1)
    assert first.stdin is not None
    first.stdin.close()
    first.wait(timeout=20)
    seen = target.look()
    assert seen is not None
    assert seen.pid == second.pid


def test_what_a_process_has_started_counts_with_it(tmp_path: Path, start: Starter) -> None:
    parent = start(tmp_path, _starting(tmp_path))
    found = WatchTarget(parent.pid).look()
    assert found is not None
    assert found.folder is None
    assert len(found.pids) == 2
    with reading.sensors() as sensors:
        memory = sensors.read(found).memory
        alone = sensors.read(replace(found, pids=(parent.pid,))).memory
    assert memory is not None
    assert alone is not None
    assert memory.anon_bytes > alone.anon_bytes > 0


def test_there_is_no_such_process() -> None:
    with pytest.raises(UsageError, match=r"--pid 4194303: there is no such process; leave --pid out"):
        WatchTarget((1 << 22) - 1)


def test_a_process_that_ends_is_missed(tmp_path: Path, start: Starter) -> None:
    child = start(tmp_path)
    target = WatchTarget(child.pid)
    assert target.look() is not None
    assert child.stdin is not None
    child.stdin.close()
    child.wait(timeout=20)
    with pytest.raises(ProcessLookupError):
        target.look()


def test_another_process_of_the_same_id_is_not_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    target = WatchTarget(os.getpid())
    assert target.look() is not None
    monkeypatch.setattr(target, "_born_s", 1.0)
    with pytest.raises(ProcessLookupError):
        target.look()


def test_what_a_case_announces_is_read_again_when_it_says_more(case: Path, start: Starter) -> None:
    found = WatchTarget(start(case).pid).look()
    with reading.sensors() as sensors:
        assert sensors.announced(found) is None
        beacon.announce(case, Announced(case="tiny/bf16/cpu", workload=Workload()))
        said = sensors.announced(found)
        assert said is not None
        assert sensors.announced(found) is said
        beacon.announce(case, Announced(case="tiny/bf16/cpu", workload=Workload(), weights_bytes={"cpu": 5}))
        again = sensors.announced(found)
        assert again is not None
        assert again.weights_bytes == {"cpu": 5}


def test_what_a_worker_has_started_in_its_folder_is_no_worker(case: Path, start: Starter) -> None:
    worker = start(case, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_WAITS!r}])")
    below = tree_of(worker.pid)
    assert len(below) == 2
    assert [pid for pid in running() if pid in below] == [worker.pid]


def tree_of(pid: int) -> list[int]:
    return [int(one) for one in subject.tree(pid)]


def test_a_process_that_has_ended_and_was_not_waited_for_is_over(case: Path, start: Starter) -> None:
    worker = start(case)
    target = WatchTarget(worker.pid)
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it stays in the table of processes
    with pytest.raises(ProcessLookupError):
        target.look()
