"""Every end of a case, by a real worker with a real model to which it really happens: its outcome, and what is kept of it.

The loading code loads a tiny model and prepares the third round, the second warm one, to end as the row says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from harness.core.records import Case, Outcome, Plan, Result, Verdict, Workload, encode_record
from harness.machine import cgroup
from harness.results.store import decode
from harness.run import forkserver
from harness.run.case_result import CaseEnded, CaseModel, RunContext
from harness.run.runner import Run
from tests.support import runs, scripted, small_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ends are made by Linux's means")

LONG_S, SHORT_S = 120.0, 2.0
LOAD = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", device_map={"": "cpu"})
"""
END_IN_ROUND_3 = """
import ctypes, mmap, os, resource, signal, subprocess, sys, time
import torch

rounds, generate = 0, model.generate

def little_memory():
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (64 << 20),) * 2)

def end():
{end}

def generate_or_end(*args, **kwargs):
    global rounds
    rounds += 1
    if rounds == 3:
        print("the end is near", flush=True)
        end()
    return generate(*args, **kwargs)

model.generate = generate_or_end
"""
UD2 = {"x86_64": b"\x0f\x0b", "aarch64": b"\x00\x00\x00\x00"}  # what no processor of the kind ever understands

# what happens, the outcome, and what the sentence says
ENDS: dict[str, tuple[str, Outcome, str]] = {
    "torch.OutOfMemoryError": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        Outcome.OOM,
        "out of memory during warm round: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    ),
    "cuBLAS": (
        "raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')",
        Outcome.OOM,
        "out of memory during warm round: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ),
    "MemoryError": ("little_memory(); bytearray(1 << 32)", Outcome.OOM, "out of memory during warm round: MemoryError"),
    "torch's CPU allocator": (
        "little_memory(); torch.empty(1 << 32)",
        Outcome.OOM,
        "out of memory during warm round: RuntimeError: [enforce fail at alloc_cpu",
    ),
    "bad_alloc": (
        "ctypes.CDLL('libstdc++.so.6')._Znwm(ctypes.c_size_t(1 << 62))",
        Outcome.OOM,
        "out of memory during warm round: a library aborted because it could not allocate",
    ),
    "bitsandbytes": (
        "print('Error out of memory at line 380 in file /src/csrc/ops.cu', flush=True); os._exit(1)",
        Outcome.OOM,
        "out of memory during warm round: a library aborted",
    ),
    "segmentation fault": ("ctypes.string_at(0)", Outcome.CRASH, "died during warm round: segmentation fault (SIGSEGV)"),
    "illegal instruction": (
        f"page = mmap.mmap(-1, 4096, prot=7); page.write({UD2.get(os.uname().machine, b'')!r})\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
        Outcome.CRASH,
        "died during warm round: illegal instruction: a library was built for another processor (SIGILL)",
    ),
    "abort": (
        "print('double free or corruption', flush=True); os.abort()",
        Outcome.CRASH,
        "died during warm round: aborted (SIGABRT), and said last: double free or corruption",
    ),
    "bus error": (
        "file = open('cut', 'w+b'); file.truncate(4096); page = mmap.mmap(file.fileno(), 4096)\nfile.truncate(0); page[0]",
        Outcome.CRASH,
        "died during warm round: bus error: a mapped file was cut short, or its disk is full (SIGBUS)",
    ),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", Outcome.CRASH, "died during warm round: killed from outside (SIGKILL)"),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", Outcome.CRASH, "died during warm round: killed from outside (SIGTERM)"),
    "fork server killed": (
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)",
        Outcome.CRASH,
        "died during warm round: its fork server was killed from outside",
    ),
    "exit": ("os._exit(3)", Outcome.CRASH, "ended during warm round with exit code 3, and said last: the end is near"),
    "missing package": (
        "import nothing_of_this_name",
        Outcome.UNSUPPORTED,
        "says the library during warm round: ModuleNotFoundError",
    ),
    "not implemented": (
        "torch.zeros(2, 2, dtype=torch.float8_e4m3fn).to('meta') @ torch.zeros(2, 2).to_sparse()",
        Outcome.UNSUPPORTED,
        "not supported, says the library during warm round",
    ),
    "the library's own error": ("{}['lm_head']", Outcome.CRASH, "warm round failed: KeyError: 'lm_head'"),
    "disk full": (
        "open('/dev/full', 'wb', buffering=0).write(b'weights')",
        Outcome.CRASH,
        "the disk is full, warm round failed: OSError: [Errno 28] No space left on device; set TMPDIR",
    ),
    "hang": ("time.sleep(600)", Outcome.TIMEOUT, "warm round was not done after 2.00 s (--phase-timeout)"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", Outcome.TIMEOUT, "warm round was not done after 2.00 s (--phase-timeout)"),
    "stopped with what it started": (
        "subprocess.Popen(['sleep', '600'], start_new_session=True); os.kill(os.getpid(), signal.SIGSTOP)",
        Outcome.TIMEOUT,
        "warm round was not done after 2.00 s (--phase-timeout)",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server("harness.worker.preload", "harness.worker.main"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    small_models.save("llama", directory)
    return directory


@pytest.fixture
def context(tmp_path: Path) -> Iterator[RunContext]:
    with runs.context(tmp_path / "scratch", LONG_S) as one:
        yield one


def run_to_the_end(model: Path, context: RunContext, end: str) -> Result:
    """Do with a case what cases/ does, until it ends."""
    code = LOAD + END_IN_ROUND_3.replace("{end}", textwrap.indent(end, "    "))
    workload = Workload(prompt_tokens=4, new_tokens=3, repeats=2)
    case = Case(model="tiny", precision="fp32", placement="cpu", workload=workload)
    run = Run(Plan(case=case, verdict=Verdict.UNKNOWN, code=code), CaseModel(location=model, tokenizer=False), context)
    with contextlib.suppress(CaseEnded):
        run.first_round()
        for _ in range(workload.repeats):
            run.round()
        run.score()
    return run.finish()


@pytest.mark.parametrize("name", ENDS)
def test_an_end_has_a_name_and_what_came_before_is_kept(model: Path, context: RunContext, name: str) -> None:
    end, outcome, said = ENDS[name]
    limit_s = SHORT_S if outcome is Outcome.TIMEOUT else LONG_S
    result = run_to_the_end(model, replace(context, phase_timeout_s=limit_s), end)
    assert (result.outcome, result.stage) == (outcome, "warm"), result.why
    assert said in str(result.why)
    assert_kept(result)


def assert_kept(result: Result) -> None:
    """Stage, phases, metrics of load, cold and the first warm round, timeline, log and what was loaded outlive the end."""
    assert [phase.name for phase in result.phases][:3] == ["load", "cold", "warm"]
    assert {"load_s", "first_token_s", "ready_s", "decode_tok_s", "ram_peak_bytes"} <= result.metrics.keys()
    assert len(result.samples["decode_tok_s"]) == 1
    assert result.loaded is not None
    assert result.timeline is not None
    assert result.timeline.ram_bytes
    assert "the end is near" in result.log_tail
    assert decode(encode_record(result)) == result


def test_the_whole_case_has_a_limit_too(model: Path, context: RunContext) -> None:
    result = run_to_the_end(model, replace(context, timeout_s=8.0, phase_timeout_s=60.0), "time.sleep(60)")
    assert result.why == "warm round was not done when the case had taken 8.00 s (--case-timeout)"
    assert_kept(result)


@pytest.mark.parametrize(
    ("end", "said"), [("ctypes.string_at(0)", "Fatal Python error: Segmentation fault"), ("1 / 0", "Traceback")]
)
def test_log_says_where_it_happened(model: Path, context: RunContext, end: str, said: str) -> None:
    log = run_to_the_end(model, context, end).log_tail
    assert said in log
    assert "in end" in log


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 512 MiB below our own, where one may be made."""
    parent = next(iter(cgroup._folders("memory", cgroup.ROOT)), None)
    if parent is None:
        pytest.skip("no control groups here")
    group = parent / f"fitmatrix-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
        limit.write_text(str(512 << 20))
    except (OSError, StopIteration):
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip("no control group may be made here")
    yield group
    group.rmdir()


def test_the_kernel_s_kill_for_want_of_memory_is_told(model: Path, context: RunContext, small_group: Path) -> None:
    end = f"open('{small_group}/cgroup.procs', 'w').write(str(os.getpid()))\nkept = [b'x' * (16 << 20) for _ in range(256)]"
    result = run_to_the_end(model, context, end)
    assert (result.outcome, result.why) == (Outcome.OOM, "out of memory during warm round: the kernel killed the process")
    assert_kept(result)


def test_the_kernel_takes_the_child_and_what_it_started_first(model: Path, context: RunContext) -> None:
    """Not the fork server, and not this process."""
    end = "print('score', subprocess.check_output(['cat', '/proc/self/oom_score_adj'], text=True))"
    log = run_to_the_end(model, context, end).log_tail
    assert "score 1000" in log
    server = psutil.Process(forkserver.server()._forkserver_pid)
    for pid in (server.pid, os.getpid()):
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) < 1000


def test_what_a_worker_sees_of_signals_is_usual(model: Path, context: RunContext) -> None:
    """The fork server is deaf to what ends a run; its children are not."""
    result = run_to_the_end(model, context, "os.kill(os.getpid(), signal.SIGHUP)")
    assert result.why == f"the process died during warm round: killed from outside ({signal.SIGHUP.name})"
