"""One worker process: whatever it does, the parent hears of it in time, and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.core.errors import WorkerError
from harness.core.units import MIB
from harness.machine import cgroup
from harness.measure.protocol import Failed, Generate, GenerateDone, Load, LoadDone, Request, Score, ScoreDone
from harness.run import forkserver, worker_process
from harness.run.deadline import Deadline
from harness.run.worker_process import Ended, Worker, WorkerMain
from tests.support import scripted

ROOT = Path(__file__).parents[2]
LOAD = Load(model="tiny", code='dtype="bfloat16"')
WARM = Generate(prompt_tokens=4, new_tokens=3, batch=2)
LONG_S, SHORT_S = 60.0, 0.5

Start = Callable[[str | WorkerMain], Worker]


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_GRACE_S", SHORT_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a worker by its behavior or its program; it ends with the test, and a test that leaves one behind fails."""
    with contextlib.ExitStack() as stack:

        def started(main: str | WorkerMain) -> Worker:
            program = scripted.worker(main) if isinstance(main, str) else main
            worker = Worker(program, log=tmp_path / "log", scratch=tmp_path)
            stack.callback(worker.stop)
            return worker

        yield started
    assert not scripted.workers()


def ask(worker: Worker, request: Request, limit_s: float = LONG_S) -> object:
    return worker.ask(request, Deadline(case_s=limit_s))


def grandchild(worker: Worker) -> int:
    words = worker.log_tail().split()
    return int(words[words.index("grandchild") + 1])


# Conversation


@pytest.mark.parametrize(("request_", "answer"), [(LOAD, LoadDone), (WARM, GenerateDone), (Score(), ScoreDone)])
def test_every_request_has_its_answer(start: Start, request_: Request, answer: type) -> None:
    assert isinstance(ask(start("ok"), request_), answer)


def test_the_last_phase_is_known(start: Start) -> None:
    worker = start("ok")
    assert worker.phase == "start"
    ask(worker, LOAD)
    assert worker.phase == "load"
    ask(worker, WARM)
    assert worker.phase == "warm"


def test_failure_is_an_answer_and_the_worker_goes_on(start: Start) -> None:
    worker = start("memory_error")
    failed = ask(worker, LOAD)
    assert isinstance(failed, Failed)
    assert failed.types == ("MemoryError",)
    assert isinstance(ask(worker, WARM), GenerateDone)


def test_worker_has_no_torch(start: Start) -> None:
    worker = start("ok")
    ask(worker, LOAD)
    assert "torch is imported: False" in worker.log_tail()


# Ends


@pytest.mark.parametrize(
    ("behavior", "request_", "exit_code"),
    [
        ("killed", Generate(prompt_tokens=1, new_tokens=2, batch=1, phase="cold"), -signal.SIGKILL),
        ("segfault", WARM, -signal.SIGSEGV),
        ("bad_alloc", LOAD, -signal.SIGABRT),
        ("exit", Score(), 3),
    ],
)
def test_death_is_told_with_its_exit_code(start: Start, behavior: str, request_: Request, exit_code: int) -> None:
    with pytest.raises(Ended) as caught:
        ask(start(behavior), request_)
    assert (caught.value.exit_code, caught.value.ended_by) == (exit_code, None)


def test_death_between_requests_is_told_by_the_next(start: Start) -> None:
    worker = start("ok")
    ask(worker, LOAD)
    psutil.Process(worker.pid).kill()
    with pytest.raises(Ended) as caught:
        ask(worker, WARM)
    assert (caught.value.exit_code, caught.value.ended_by) == (-signal.SIGKILL, None)


def test_a_worker_that_is_ended_from_another_thread_says_the_first_reason(start: Start) -> None:
    worker = start("grandchild_hangs")

    def end_twice() -> None:
        worker.end("ram-limit")
        worker.end("machine-memory")

    threading.Timer(0.5, end_twice).start()
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD)
    assert (caught.value.exit_code, caught.value.ended_by) == (-signal.SIGKILL, "ram-limit")
    assert scripted.has_ended(grandchild(worker))


def test_time_is_honored(start: Start) -> None:
    worker = start("hang_in_load")
    child, begun = psutil.Process(worker.pid), time.monotonic()
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD, SHORT_S)
    assert caught.value.ended_by == "timeout"
    assert SHORT_S <= time.monotonic() - begun < LONG_S
    assert worker.phase == "load"
    assert scripted.ends(child)


def test_time_is_honored_in_the_middle_of_a_message(start: Start) -> None:
    worker = start("hang_in_a_message")
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD, SHORT_S)
    assert caught.value.ended_by == "timeout"


def test_stopped_worker_runs_out_of_time(start: Start) -> None:
    worker = start("slow")
    psutil.Process(worker.pid).suspend()
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD, SHORT_S)
    assert caught.value.ended_by == "timeout"


@pytest.mark.parametrize("behavior", ["nonsense", "unknown_message", "past_the_framing"])
def test_nonsense_ends_the_worker(start: Start, behavior: str) -> None:
    worker = start(behavior)
    child = psutil.Process(worker.pid)
    with pytest.raises(WorkerError, match="no message"):
        ask(worker, LOAD)
    assert scripted.ends(child)


def test_worker_that_closes_its_pipe_and_stays_is_ended(start: Start) -> None:
    with pytest.raises(Ended) as caught:
        ask(start("closed_pipe"), LOAD)
    assert caught.value.ended_by == "protocol"


@pytest.mark.parametrize(
    "behavior", ["grandchild", "grandchild_killed", "grandchild_hangs", "grandchild_apart", "grandchild_apart_killed"]
)
def test_what_the_worker_started_goes_with_it(start: Start, behavior: str) -> None:
    worker = start(behavior)
    with contextlib.suppress(Ended):
        ask(worker, LOAD, SHORT_S if "hangs" in behavior else LONG_S)
    worker.stop()
    assert scripted.has_ended(grandchild(worker))


@pytest.mark.parametrize("behavior", ["ok", "killed", "hang_in_cold"])
def test_ending_twice_is_safe(start: Start, behavior: str) -> None:
    worker = start(behavior)
    with contextlib.suppress(Ended):
        ask(worker, Generate(prompt_tokens=1, new_tokens=2, batch=1, phase="cold"), SHORT_S)
    for end in (worker.stop, worker.kill, worker.stop):
        end()
    assert not psutil.pid_exists(worker.pid)


def test_an_id_that_may_be_another_s_by_now_is_left_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start("ok")
    worker.stop()
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, _: killed.append(pid))
    worker.end("ram-limit")
    worker.stop()
    assert killed == []


def test_a_program_that_cannot_be_sent_leaves_nothing(start: Start) -> None:
    start("ok")  # the fork server has a pipe that stays
    before = psutil.Process().num_fds()
    with pytest.raises(Exception, match="pickle"):
        start(lambda _pipe, _log, _scratch: None)
    assert len(scripted.workers()) == 1
    assert psutil.Process().num_fds() <= before


def test_what_is_started_numbers_the_cards_as_nvml_does_whatever_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    with forkserver.environment():
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_socket_path_that_is_too_long_is_told_in_one_sentence(tmp_path: Path) -> None:
    scratch = tmp_path / ("x" * 80)
    scratch.mkdir()
    body = """
from harness.core.errors import UsageError

try:
    process.Worker(scripted.worker("ok"), log=Path(sys.argv[1]) / "log", scratch=Path(sys.argv[1]))
except UsageError as error:
    print(error)
"""
    with run_script(body, tmp_path, TMPDIR=str(scratch)) as parent:
        said = parent.communicate(timeout=LONG_S)[0]
    assert "AF_UNIX path too long" in said
    assert "set TMPDIR to a short path" in said
    assert "Traceback" not in said


# The fork server


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_fork_server_that_does_not_answer_is_replaced(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    start("ok").stop()
    server = psutil.Process(forkserver.server()._forkserver_pid)
    server.send_signal(number)
    worker = Worker(scripted.worker("ok"), log=tmp_path / "log", scratch=tmp_path, start_s=SHORT_S)
    assert isinstance(ask(worker, LOAD), LoadDone)
    worker.stop()
    assert forkserver.server()._forkserver_pid != server.pid


def test_a_fork_server_that_is_stopped_does_not_keep_a_worker_from_ending(start: Start) -> None:
    worker = start("hang_in_load")
    child, server = psutil.Process(worker.pid), psutil.Process(forkserver.server()._forkserver_pid)
    server.suspend()
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD, SHORT_S)
    assert caught.value.ended_by == "timeout"
    assert scripted.ends(child)


def test_death_of_the_fork_server_is_told(start: Start) -> None:
    worker = start("hang_in_load")
    child = psutil.Process(worker.pid)
    psutil.Process(forkserver.server()._forkserver_pid).kill()
    with pytest.raises(Ended) as caught:
        ask(worker, LOAD)
    assert caught.value.ended_by == "fork server"
    assert scripted.ends(child)


# Interrupts


def test_ctrl_c_while_waiting_ends_the_worker_at_once(start: Start) -> None:
    worker = start("hang_in_load")
    child = psutil.Process(worker.pid)

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SHORT_S)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(worker, LOAD)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not scripted.runs(child)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from harness.run import worker_process as process
from harness.run.deadline import Deadline
from harness.measure.protocol import Load
from tests.support import scripted

LONG = Deadline(case_s=60)

{body}
"""


def run_script(body: str, scratch: Path, **environment: str) -> subprocess.Popen[str]:
    """Run a parent of its own, the leader of its own process group."""
    (scratch / "parent.py").write_text(SCRIPT.format(body=body))
    return subprocess.Popen(
        [sys.executable, str(scratch / "parent.py"), str(scratch)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{scratch}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("main", ["scripted.worker('ok')", "scripted.unsettled"])
def test_ctrl_c_reaches_the_parent_alone(tmp_path: Path, main: str) -> None:
    body = f"""
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(True))
worker = process.Worker({main}, log=Path(sys.argv[1]) / "log", scratch=Path(sys.argv[1]))
os.killpg(0, signal.SIGINT)
print(type(worker.ask(Load(model="tiny", code=""), LONG)).__name__, heard)
worker.stop()
"""
    with run_script(body, tmp_path) as parent:
        assert "LoadDone [True]" in parent.communicate(timeout=LONG_S)[0]


def test_worker_that_begins_after_the_parent_gave_it_up_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\n")
    body = """
import multiprocessing, tempfile

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
multiprocessing.set_forkserver_preload(["slow_to_import"])
with tempfile.TemporaryDirectory() as scratch:
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        process.Worker(scripted.worker("ok"), log=Path(scratch) / "log", scratch=Path(scratch))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
time.sleep(1.5)
"""
    with run_script(body, tmp_path) as parent:
        assert parent.communicate(timeout=LONG_S)[0] == "interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_busy_worker_dies_with_its_parent(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals) -> None:
    body = """
worker = process.Worker(scripted.worker("hang_in_load"), log=Path(sys.argv[1]) / "log", scratch=Path(sys.argv[1]))
print(worker.pid, flush=True)
worker.ask(Load(model="tiny", code=""), LONG)
"""
    # What multiprocessing leaves when its process is killed; the path of a socket must be short.
    with run_script(body, tmp_path, TMPDIR=str(tmp_path_factory.mktemp("t"))) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        while "hanging" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        parent.send_signal(number)
        assert scripted.ends(worker)


@pytest.mark.skipif(not cgroup.is_allowed(), reason="no control group can be made here")
def test_a_parent_that_is_killed_leaves_no_control_group(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    body = """
from harness.machine import cgroup
from harness.run import forkserver

forkserver.preload()
group = cgroup.group(1 << 30)
worker = process.Worker(scripted.worker("hang_in_load"), log=Path(sys.argv[1]) / "log", scratch=Path(sys.argv[1]))
print(group._folder, group.add(worker.pid), flush=True)
worker.ask(Load(model="tiny", code=""), LONG)
"""
    with run_script(body, tmp_path, TMPDIR=str(tmp_path_factory.mktemp("t"))) as parent:
        assert parent.stdout is not None
        folder, added = parent.stdout.readline().split()
        assert added == "True"
        assert Path(folder).is_dir()
        parent.kill()
        until_s = time.monotonic() + LONG_S
        while Path(folder).exists() and time.monotonic() < until_s:
            time.sleep(0.01)
    assert not Path(folder).exists()


# The log


def test_output_goes_to_the_log_and_leaves_the_conversation_alone(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    worker = start("noise")
    assert isinstance(ask(worker, LOAD), LoadDone)
    assert capfd.readouterr() == ("", "")
    lines = worker.log_tail().splitlines()
    assert "the last word" in lines
    assert not {"\x1b", "\r"} & set(worker.log_tail())


def test_log_is_bounded_and_the_worker_goes_on_writing(start: Start) -> None:
    worker = start("noise")
    ask(worker, LOAD)
    worker.trim_log()
    small = worker.log.stat().st_size
    assert small < MIB
    assert "the last word" in worker.log_tail()
    ask(worker, Generate(prompt_tokens=1, new_tokens=2, batch=1, phase="cold"))
    assert worker.log.stat().st_size > small
    assert b"\0" not in worker.log.read_bytes()


def test_repeated_lines_are_told_once(tmp_path: Path, start: Start) -> None:
    worker = start("ok")
    ask(worker, LOAD)
    (tmp_path / "log").write_text("first\n" + "a warning of every layer\n" * 500 + "last\n")
    assert worker.log_tail() == "first\na warning of every layer [500 times]\nlast"


def test_log_that_was_removed_is_empty(tmp_path: Path, start: Start) -> None:
    worker = start("ok")
    ask(worker, LOAD)
    (tmp_path / "log").unlink()
    assert worker.log_tail() == ""
