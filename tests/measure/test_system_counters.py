"""What the system counts: CPU time of the machine and of a tree of processes, clocks, swapping; with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.measure import system_counters

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
BURN_S, TICKS_S = 0.5, 0.05
BURN = f"import time\nwhile time.process_time() < {BURN_S}: pass"
# Starts a process that burns, waits for it, says so, and lives on.
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\nprint('done', flush=True)\nsys.stdin.read()"
# Starts a process that burns from a thread, says so once it has burned, and lives on beside it.
BESIDE = f"""
import subprocess, sys, threading
code = {BURN!r} + "; print('done', flush=True); import sys; sys.stdin.read()"
threading.Thread(target=lambda: subprocess.run([sys.executable, "-c", code.replace("; print", chr(10) + "print")])).start()
"""
STAT = """cpu  300 30 60 5000 200 7 8 90 0 0
cpu0 100 10 20 2000 100 3 4 30 0 0
cpu1 50 5 10 1500 50 2 2 20 0 0
cpu7 150 15 30 1500 50 2 2 40 0 0
intr 12345 0 0
ctxt 99
"""


@contextmanager
def process(code: str) -> Iterator[int]:
    """Run a program until it says that it is done, and let it live meanwhile."""
    running = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with running:
        assert running.stdout
        assert running.stdout.readline() == "done\n"
        yield running.pid
        running.communicate("")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a system that is not Linux."""
    monkeypatch.setattr(system_counters, "LINUX", False)


# Processes


def test_what_a_process_has_used() -> None:
    before = system_counters.used(os.getpid())
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = system_counters.used(os.getpid())
    assert 0.15 < after.all_s - before.all_s < 5
    assert after.user_s <= after.all_s


@LINUX_ONLY
@pytest.mark.parametrize("code", [PARENT, BESIDE], ids=["ended and waited for", "still there, started by a thread"])
def test_what_a_process_has_started_counts_with_it(code: str) -> None:
    with process(code) as pid:
        assert BURN_S - TICKS_S <= system_counters.used(pid).all_s < BURN_S + 5


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_children_are_found_too() -> None:
    with process(BESIDE) as pid:
        assert len(list(system_counters.tree(pid))) == 2
        assert system_counters.used(pid).all_s >= BURN_S - TICKS_S


@pytest.mark.parametrize("linux", [pytest.param(True, marks=LINUX_ONLY), False])
def test_a_process_that_is_gone_has_used_nothing_that_could_be_told(monkeypatch: pytest.MonkeyPatch, linux: bool) -> None:
    monkeypatch.setattr(system_counters, "LINUX", linux)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(psutil.NoSuchProcess):
        system_counters.used(gone.pid)


# The machine


@LINUX_ONLY
def test_time_of_the_machine_s_cpus_goes_by() -> None:
    before, begun_s = system_counters.cpu(), time.monotonic()
    time.sleep(0.3)
    after, took_s = system_counters.cpu(), time.monotonic() - begun_s
    assert before.cpus == after.cpus == psutil.cpu_count()
    assert 0 <= after.idle_s - before.idle_s <= after.cpus * (took_s + 0.02)
    assert after.stolen_s >= before.stolen_s


@LINUX_ONLY
def test_only_the_cpus_that_may_be_used_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: STAT)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    assert system_counters.cpu() == (3, 52.0, 0.9, 3.3)
    assert system_counters.cpu(frozenset({0, 7})) == (2, 36.5, 0.7, 2.75)
    assert system_counters.cpu(frozenset({12, 13})) == system_counters.cpu()


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_machine_s_time_is_psutil_s() -> None:
    found = system_counters.cpu()
    assert found.cpus == psutil.cpu_count()
    assert found.idle_s == pytest.approx(psutil.cpu_times().idle, abs=2)
    assert found.user_s is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to CPUs")
def test_a_process_bound_to_some_cpus_looks_at_those() -> None:
    code = "import os; from harness.measure.system_counters import usable_cpus; os.sched_setaffinity(0, {0}); print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("frozenset({0})" if (os.cpu_count() or 1) > 1 else "None")


def test_swap_is_known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = system_counters.swap()
    assert found is None or min(found) >= 0

    def refuse() -> Any:
        raise RuntimeWarning("'sin' and 'sout' swap memory stats couldn't be determined")

    monkeypatch.setattr(psutil, "swap_memory", refuse)
    assert system_counters.swap() is None


def test_clock_is_that_of_the_fastest_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system_counters, "_CPUS", tmp_path)
    assert system_counters.cpu_mhz(frozenset({0, 1})) is None
    assert system_counters.cpu_throttles(frozenset({0, 1})) == 0
    for number, khz, count in ((0, 800_000, 2), (1, 3_600_000, 3), (2, 4_000_000, 50)):
        for name, value in (("cpufreq/scaling_cur_freq", khz), ("thermal_throttle/core_throttle_count", count)):
            file = tmp_path / f"cpu{number}" / name
            file.parent.mkdir(parents=True)
            file.write_text(f"{value}\n")
    assert system_counters.cpu_mhz(frozenset({0, 1})) == 3600
    assert system_counters.cpu_throttles(frozenset({0, 1})) == 5
