"""One machine of a cluster, without the cluster: what it sends of a run, in which order, and what its run begins with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.fleet import conformity, lease, pytest_run
from harness.fleet.ray_engine import machine
from harness.fleet.ray_engine.machine import HeldMachine, MachineEvent
from harness.machine import accelerators, probe
from harness.results.store import NAME
from tests.support import fleets

RECEIPT = "receipt.json"


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldMachine:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_POLL_S", 0.01)
    return HeldMachine("lab-1", "node-of-the-test")


def program(*lines: str) -> list[str]:
    """A run that writes results and receipts as the lines say, its folder being the current one."""
    return [sys.executable, "-c", "import pathlib, sys, time; here = pathlib.Path()\n" + "\n".join(lines)]


def followed(tmp_path: Path, *lines: str) -> list[MachineEvent]:
    with subprocess.Popen(program(*lines), cwd=tmp_path) as process:
        return list(machine._followed(process, tmp_path, RECEIPT))


@pytest.mark.usefixtures("held")
def test_lines_are_sent_whole_once_each_and_before_the_receipt_that_vouches_for_them(tmp_path: Path) -> None:
    events = followed(
        tmp_path,
        f"results = (here / {NAME!r}).open('wb', buffering=0)",
        "results.write(b'first\\nsec'); time.sleep(0.2)",
        "results.write(b'ond\\nthird\\ntorn')",
        f"(here / {RECEIPT!r}).write_bytes(b'vouched')",
    )
    assert [one for one in events if one.kind != "beat"] == [
        MachineEvent("result", b"first\n"),
        MachineEvent("result", b"second\n"),
        MachineEvent("result", b"third\n"),
        MachineEvent("receipt", b"vouched"),
    ]


@pytest.mark.usefixtures("held")
def test_a_receipt_is_sent_each_time_that_it_changes_and_not_again(tmp_path: Path) -> None:
    write = f"(here / {RECEIPT!r}).write_bytes"
    events = followed(tmp_path, f"{write}(b'one'); time.sleep(0.3)", f"{write}(b'one'); time.sleep(0.3)", f"{write}(b'two')")
    assert [one.data for one in events if one.kind == "receipt" and one.data] == [b"one", b"two"]


@pytest.mark.usefixtures("held")
def test_a_run_that_writes_nothing_beats_so_that_it_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BEAT_S", 0.1)
    events = followed(tmp_path, "time.sleep(1)")
    assert {one.kind for one in events} == {"beat"}
    assert 2 <= len(events) <= 30
    monkeypatch.setattr(machine, "_BEAT_S", 60.0)
    assert followed(tmp_path, "time.sleep(0.3)") == []


def test_new_lines_go_on_from_what_was_told(tmp_path: Path) -> None:
    path = tmp_path / NAME
    assert machine._new_lines(path, 0) == ([], 0)
    path.write_bytes(b"a\nbc\nd")
    assert machine._new_lines(path, 0) == ([b"a\n", b"bc\n"], 5)
    assert machine._new_lines(path, 2) == ([b"bc\n"], 5)
    assert machine._new_lines(path, 5) == ([], 5)
    path.write_bytes(b"a\nbc\nde\n")
    assert machine._new_lines(path, 5) == ([b"de\n"], 8)


def test_a_run_gets_the_environment_of_the_daemon_without_what_is_ray_s(held: HeldMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of Ray's worker is the node's daemon; here it is whoever started the tests."""
    found = {"HOME": "/home/of-the-daemon", "OMP_NUM_THREADS": "6", "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "0"}
    monkeypatch.setattr(psutil.Process, "environ", lambda one: found if one.pid == os.getppid() else {})
    assert held._environment() == {
        "HOME": "/home/of-the-daemon",
        "OMP_NUM_THREADS": "6",
        conformity.MACHINE_NAME: "lab-1",
        lease.LEASE: str(lease.lease_file("node-of-the-test")),
        "PYTHONUNBUFFERED": "1",
    }


def test_where_the_daemon_is_not_ours_to_read_ray_s_own_settings_are_left_out(
    held: HeldMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> dict[str, str]:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "environ", refused)
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_JOB_ID": "1", "KEPT": "yes"}.items():
        monkeypatch.setenv(name, value)
    given = held._environment()
    assert given["KEPT"] == "yes"
    assert not {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID"} & set(given)


def test_it_describes_this_machine_and_what_ray_holds_of_it(held: HeldMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [("raylet", 100), ("python x/dashboard/agent.py", 20), ("python of-a-user.py", 4000), (None, 5), ("ray::Held.run", None)]

    class Listed:
        def __init__(self, words: str | None, rss: int | None) -> None:
            sizes = None if rss is None else type("Sizes", (), {"rss": rss})
            self.info = {"cmdline": words and words.split(), "memory_info": sizes}

    monkeypatch.setattr(psutil, "process_iter", lambda _: [Listed(*one) for one in here])
    assert machine._ray_bytes() == 120
    described = held.describe()
    assert described.ray_bytes == 120
    assert described.machine.name == accelerators.usable(probe.probe(), ask=False).name
    assert described.versions == probe.versions()
    assert described.clock


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], set[str], str]]:
    """Stands for pytest on this machine: notes how it was begun, and writes a result, a receipt and a long log."""
    begun: list[tuple[list[str], set[str], str]] = []

    def measuring(_: str, folder: Path, words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        begun.append((words, {one.name for one in folder.iterdir()}, environment[conformity.MACHINE_NAME]))
        (folder / pytest_run.RUN_RESULTS).mkdir()
        (folder / pytest_run.RUN_LOG).write_bytes(b"begin" + b"x" * 8190 + b"end")
        return subprocess.Popen(program(f"(here / {pytest_run.RUN_RESULTS!r} / {NAME!r}).write_bytes(b'one\\n')"), cwd=folder)

    monkeypatch.setattr(pytest_run, "measuring", measuring)
    return begun


def kinds(events: Iterator[MachineEvent]) -> list[tuple[str, bytes]]:
    return [(one.kind, one.data) for one in events if one.kind != "beat"]


def test_a_shard_is_measured_with_its_test_files_and_the_end_of_the_log_is_sent(
    held: HeldMachine, measured: list[tuple[list[str], set[str], str]]
) -> None:
    shard = fleets.contract()[1][0]
    events = kinds(held.run(shard, {"test_own.py": "def test_own(): ..."}))
    assert events[0] == ("result", b"one\n")
    assert events[-1] == ("log", b"x" * 8189 + b"end")
    [(words, files, name)] = measured
    assert (words, name) == (["--shard", "shard.json"], "lab-1")
    assert {"shard.json", "cases"} <= files


@pytest.mark.usefixtures("measured")
def test_it_waits_for_who_has_the_machine_and_beats_meanwhile(held: HeldMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True]
    monkeypatch.setattr(lease, "is_free", lambda _: answers.pop(0))
    events = list(held.run(fleets.contract()[1][0], {}))
    assert [one.kind for one in events[:3]] == ["beat", "beat", "result"]
    assert not answers


@pytest.mark.usefixtures("measured")
def test_it_does_not_wait_for_ever(held: HeldMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "is_free", lambda _: False)
    monkeypatch.setattr(machine, "_PATIENCE_S", 0.2)
    begun = time.monotonic()
    assert ("result", b"one\n") in kinds(held.run(fleets.contract()[1][0], {}))
    assert time.monotonic() - begun >= 0.2
