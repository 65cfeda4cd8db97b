"""Tensor parallelism, run for real: two processes share a small model by gloo, are measured as one, and end as one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace as replaced

from harness.core.records import Case, Loaded, Outcome, Phase, Plan, Result, Verdict, Workload
from harness.core.units import MIB
from harness.machine import cgroup
from harness.measure.protocol import Confine, Confined, Failed, LoadDone, Score
from harness.run import worker_process
from harness.run.case_result import CaseEnded, CaseModel, RunContext
from harness.run.options import Options
from harness.run.runner import Run
from harness.run.session import Session
from harness.worker import tensor_parallel
from tests.planning.test_tensor_parallel import HELD, TORCHRUN, run
from tests.support import builders, runs, scripted, small_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a worker is forked into ranks on Linux alone")

LONG_S, SHORT_S = 120.0, 8.0
WORKLOAD = Workload(prompt_tokens=16, new_tokens=4, repeats=2)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_talking(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server("harness.worker.preload", "harness.worker.main"):
        yield


# What goes well


@pytest.fixture(scope="module")
def results(talking: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of one process and of two, by placement; what the one predicts is what the two are compared with."""
    home = tmp_path_factory.mktemp("run")
    given = {"model": [str(talking)], "precision": ["fp32"], "placement": ["cpu", "tp"], "results": str(home / "results")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("t")))
        session = Session(Options(given=given | {"new_tokens": "4", "repeats": "2", "prompt_tokens": "16"}))
        session.machine = builders.machine()
        with contextlib.closing(session):
            session.prepare(session.cases())
            files: tuple[Path | None, Path | None] = (home / "predictions.npy", None)
            found = {}
            for case in session.cases():
                keep, reference = files
                model = replace(session.case_model(case), keep_file=keep, reference_file=reference)
                case_run = Run(session.plan(case), model, session.context)
                with contextlib.suppress(CaseEnded):
                    for _ in range(2):
                        case_run.round()
                    case_run.score()
                found[case.placement], files = case_run.finish(), (None, keep)
    assert not scripted.workers()
    return found


def test_a_case_of_two_processes_is_whole_and_each_holds_its_half(results: dict[str, Result]) -> None:
    one, two = results["cpu"], results["tp"]
    assert (two.outcome, two.why) == (Outcome.OK, None), two.log_tail
    assert two.checks == {"precision": "ok", "max_memory": "ok", "placement": "ok", "ranks": "ok"}
    assert one.loaded is not None
    assert two.loaded is not None
    whole = sum(one.loaded.tier_bytes.values())
    assert two.loaded.rank_bytes == pytest.approx([whole / 2] * 2, rel=0.01)
    assert two.loaded.tier_bytes == {"cpu": sum(two.loaded.rank_bytes)}
    assert two.loaded.linear_dtype_bytes == one.loaded.linear_dtype_bytes
    assert two.loaded.device_map == {"rank 0": "cpu", "rank 1": "cpu"}
    assert [phase.name for phase in two.phases] == [phase.name for phase in one.phases]
    assert two.metrics.keys() >= one.metrics.keys() - {"token_p95_s"}


def test_two_processes_say_what_one_says(results: dict[str, Result]) -> None:
    one, two = results["cpu"], results["tp"]
    assert one.quality is not None
    assert two.quality is not None
    assert two.quality.answers == one.quality.answers
    assert two.metrics["top1_agreement"] > 0.99
    assert two.metrics["kl"] < 1e-3
    assert two.metrics["perplexity"] == pytest.approx(one.metrics["perplexity"], rel=1e-3)


def test_memory_of_all_is_measured_and_was_predicted(results: dict[str, Result]) -> None:
    """The processes' own memory adds up; the libraries and the file count once."""
    one, two = results["cpu"], results["tp"]
    assert two.estimate is not None
    expected = two.estimate.tiers["cpu"]
    assert two.metrics["ram_peak_bytes"] == pytest.approx(expected.peak_bytes, rel=0.15)
    assert two.metrics["ram_anon_peak_bytes"] == pytest.approx(expected.anon_bytes, rel=0.2)
    assert 1.8 < two.metrics["ram_anon_peak_bytes"] / one.metrics["ram_anon_peak_bytes"] < 3.0
    files = {name: each.metrics["ram_peak_bytes"] - each.metrics["ram_anon_peak_bytes"] for name, each in results.items()}
    assert files["tp"] < 1.3 * files["cpu"]
    assert two.timeline is not None
    warm_s = [phase.end_s for phase in two.phases if phase.name == "warm"][-1]
    sampled = zip(two.timeline.t_s, two.timeline.ram_anon_bytes, strict=True)
    assert max(anon for at_s, anon in sampled if at_s < warm_s) == pytest.approx(two.metrics["ram_anon_peak_bytes"], rel=0.1)


def test_the_recorded_code_is_a_program_for_torchrun(results: dict[str, Result], talking: Path, tmp_path: Path) -> None:
    two = results["tp"]
    assert two.code is not None
    start, named, *rest = two.code.splitlines()
    assert start == "# Start it by: torchrun --nproc-per-node 2 THIS_FILE"
    assert named.startswith('MODEL = "llama"')
    said = run("\n".join([f"MODEL = {str(talking)!r}", *rest, HELD]), tmp_path, *TORCHRUN)
    assert two.loaded is not None
    assert sorted(said) == sorted(f"held {size}" for size in two.loaded.rank_bytes)


# What does not

LOAD = """
import os, signal, sys, time
import torch
from transformers import AutoModelForCausalLM

rank, rounds = int(os.environ["RANK"]), 0
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", distributed_config={"tp_plan": "auto"})
generate = model.generate

def generate_or_end(*args, **kwargs):
    global rounds
    rounds += 1
    if rounds == 2 and rank in RANKS:
        END
    return generate(*args, **kwargs)

model.generate = generate_or_end
"""

# in which ranks, what happens there, the outcome, and what the sentence says
ENDS: dict[str, tuple[str, str, Outcome, str]] = {
    "a rank is killed": (
        "{1}",
        "os.kill(os.getpid(), signal.SIGKILL)",
        Outcome.CRASH,
        "the process died during warm round on rank 1: killed from outside (SIGKILL)",
    ),
    "the first rank is killed": (
        "{0}",
        "os.kill(os.getpid(), signal.SIGKILL)",
        Outcome.CRASH,
        "the process died during warm round on rank 0: killed from outside (SIGKILL)",
    ),
    "a rank is out of memory": ("{1}", "bytearray(1 << 62)", Outcome.OOM, "out of memory during warm round on rank 1: MemoryError"),
    "all are out of memory": ("{0, 1}", "torch.empty(1 << 50)", Outcome.OOM, "out of memory during warm round on rank "),
    "a library fails": ("{0}", "{}['q_proj']", Outcome.CRASH, "warm round on rank 0 failed: KeyError: 'q_proj'"),
    "a rank exits": ("{1}", "os._exit(3)", Outcome.CRASH, "the process ended during warm round on rank 1 with exit code 3"),
    "code exits": ("{1}", "sys.exit(4)", Outcome.CRASH, "the process ended during warm round on rank 1 with exit code 4"),
    "code exits with words": (
        "{1}",
        "sys.exit('no way')",
        Outcome.CRASH,
        "the process ended during warm round on rank 1 with exit code 1, and said last: no way",
    ),
    "a rank hangs": (
        "{1}",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        Outcome.TIMEOUT,
        "warm round was not done after 8.00 s (--phase-timeout): rank 0 was sleeping, rank 1 was stopped",
    ),
    "what leads them is killed": (
        "{1}",
        "time.sleep(0.5); os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)",
        Outcome.CRASH,
        "the process died during warm round: killed from outside (SIGKILL)",
    ),
}


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    small_models.save("llama", folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> Iterator[RunContext]:
    with runs.context(tmp_path / "scratch", LONG_S) as one:
        yield one


def started(model: Path, context: RunContext, who: str = "{}", end: str = "pass", **limits: Any) -> Run:
    code = LOAD.replace("RANKS", who).replace("END", end)
    case = Case(model="tiny", precision="fp32", placement="tp", workload=WORKLOAD, **limits)
    return Run(Plan(case=case, verdict=Verdict.UNKNOWN, code=code), CaseModel(location=model, tokenizer=False), context)


def processes(of: Run) -> list[psutil.Process]:
    """Return the processes that share the model, and the one that leads them."""
    leader = psutil.Process(of._worker.pid)
    found = [leader, *leader.children()]
    assert len(found) == 3
    return found


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_one_is_that_of_all_and_has_its_name(silent: Path, context: RunContext, name: str) -> None:
    who, end, outcome, said = ENDS[name]
    limit_s = SHORT_S if outcome is Outcome.TIMEOUT else LONG_S
    case = started(silent, replace(context, phase_timeout_s=limit_s), who, end)
    case.first_round()
    all_of_them = processes(case)
    begun_s = time.monotonic()
    with pytest.raises(CaseEnded):
        case.round()
    took_s = time.monotonic() - begun_s
    result = case.finish()
    assert (result.outcome, result.stage) == (outcome, "warm"), result.why
    assert str(result.why).startswith(said)
    assert took_s < 30
    assert [phase.name for phase in result.phases][:2] == ["load", "cold"]
    assert all(scripted.ends(one) for one in all_of_them)


def test_a_rank_that_cannot_load_is_named(silent: Path, context: RunContext) -> None:
    case = started(silent, context)
    case.plan = replaced(case.plan, code=f"import os\nif os.environ['RANK'] == '1': raise MemoryError('no room')\n{case.plan.code}")
    with pytest.raises(CaseEnded):
        case.load()
    result = case.finish()
    assert (result.outcome, result.why) == (Outcome.OOM, "out of memory during loading on rank 1: MemoryError: no room")
    (phase,) = result.phases
    assert phase.sampled
    assert phase.ram_peak_bytes is not None
    assert phase.ram_peak_bytes > 250 * MIB  # of both


def test_a_limit_on_ram_is_one_for_all(silent: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no group of the kernel's holds them, what they hold is added up: each alone is within the limit."""
    monkeypatch.setattr(cgroup, "group", lambda *_: None)
    end = "kept = b'x' * (256 << 20); time.sleep(600)"
    case = started(silent, context, "{0, 1}", end, ram_bytes=900 * MIB)
    with pytest.raises(CaseEnded):
        case.round()
    result = case.finish()
    assert result.outcome is Outcome.OOM
    assert "that cannot be dropped, and --ram allows 900 MiB" in str(result.why)


def test_a_case_that_is_over_ends_all_at_once(silent: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_GRACE_S", LONG_S)
    case = started(silent, context)
    case.round()
    all_of_them = processes(case)
    begun_s = time.monotonic()
    assert case.finish().outcome is Outcome.OK
    assert time.monotonic() - begun_s < LONG_S
    assert not any(map(scripted.runs, all_of_them))


def test_nobody_reaches_them_from_another_machine(silent: Path, context: RunContext) -> None:
    case = started(silent, context)
    case.first_round()
    sockets = [socket for one in processes(case) for socket in one.net_connections("inet") if socket.status == psutil.CONN_LISTEN]
    assert case.finish().outcome is Outcome.OK
    assert {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets} == {"127.0.0.1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process(silent: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = runs.folder(tmp_path / "run", [], scripted=False)
    words = ("--model", str(silent), "--placement", "tp", "-k", "tp", "--new-tokens", "400", "--repeats", "50")
    with runs.start(folder, [], *words, session=True) as running:
        try:
            family = psutil.Process(running.pid)
            until_s = time.monotonic() + 100
            while not (sharing := _sharing(family)) and time.monotonic() < until_s and running.poll() is None:
                time.sleep(0.05)
            assert len(sharing) == 3
            everyone = family.children(recursive=True)
            running.send_signal(number) if number is signal.SIGKILL else os.killpg(running.pid, number)
            running.communicate(timeout=60)
        finally:
            running.kill()
    assert all(scripted.ends(one) for one in everyone)


def _sharing(family: psutil.Process) -> list[psutil.Process]:
    """Return a worker and its two ranks, as soon as they are there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in family.children(recursive=True):
            if len(ranks_of := one.children()) == 2 and one.cmdline() == ranks_of[0].cmdline() == ranks_of[1].cmdline():
                return [one, *ranks_of]
    return []


# Adding up


def test_one_answer_for_all_adds_up_memory_and_keeps_the_first_one_s_times() -> None:
    def answer(rank: int, ram: int, anon: int) -> LoadDone:
        phase = Phase(
            name="load", start_s=1.0 + rank, end_s=2.0 + rank, ram_peak_bytes=ram, ram_anon_bytes=anon, disk_read_bytes=5 + rank,
            vram_peak_bytes={f"gpu:{rank}": 100 + rank, f"gpu:{1 - rank}": 0},
        )  # fmt: skip
        loaded = builders.loaded({"bfloat16": 500}, {f"gpu:{rank}": 508}, {"": f"gpu:{rank}"})
        return LoadDone(seconds={"load_s": 1.0 + rank}, loaded=loaded, phases=[phase])

    done = tensor_parallel.run_together([answer(0, 1000, 600), answer(1, 900, 500)], doubled_bytes=350)
    assert isinstance(done, LoadDone)
    assert done.seconds == {"load_s": 1.0}
    (phase,) = done.phases
    assert (phase.start_s, phase.ram_peak_bytes, phase.ram_anon_bytes, phase.disk_read_bytes) == (1.0, 1550, 1100, 11)
    assert phase.vram_peak_bytes == {"gpu:0": 100, "gpu:1": 101}
    assert done.loaded == Loaded(
        model_class="TinyForCausalLM",
        dtype_bytes={"bfloat16": 1000, "float32": 16},
        linear_dtype_bytes={"bfloat16": 1000},
        tier_bytes={"gpu:0": 508, "gpu:1": 508},
        device_map={"rank 0": "gpu:0", "rank 1": "gpu:1"},
        rank_bytes=[508, 508],
    )


def test_together_they_hold_no_less_than_the_one_that_holds_most() -> None:
    """What several of them map is looked at when the request is done, and a phase at its begin had hardly any of it."""

    def answer(rank: int) -> LoadDone:
        phases = [
            Phase(name=name, start_s=0.0, end_s=1.0, ram_peak_bytes=peak + rank, ram_anon_bytes=10)
            for name, peak in (("tokenizer", 100), ("load", 1000))
        ]
        return LoadDone(seconds={}, loaded=builders.loaded({"bfloat16": 9}, {"cpu": 9}, {"": "cpu"}), phases=phases)

    done = tensor_parallel.run_together([answer(0), answer(1)], doubled_bytes=900)
    assert isinstance(done, LoadDone)
    assert [phase.ram_peak_bytes for phase in done.phases] == [101, 1101]


def test_libraries_are_charged_once() -> None:
    parts = [Confined(file_bytes=30, anon_bytes=100, shared_bytes=1), Confined(file_bytes=31, anon_bytes=90, shared_bytes=2)]
    assert tensor_parallel.run_together(parts, 0) == Confined(file_bytes=31, anon_bytes=190, shared_bytes=3)


def test_each_is_told_its_part() -> None:
    confine = Confine(ram=True, vram_bytes=8, gpus=(0, 1))
    assert [tensor_parallel._part(confine, rank) for rank in (0, 1)] == [replaced(confine, gpus=(0,)), replaced(confine, gpus=(1,))]
    score = Score(model="moss-moon-003-sft", keep="/scratch/a.npy", reference="/scratch/b.npy")
    assert [tensor_parallel._part(score, rank) for rank in (0, 1)] == [score, Score(model="moss-moon-003-sft")]


def test_peaks_of_one_that_failed_are_not_told_as_those_of_all() -> None:
    phase = Phase(name="load", start_s=1.0, end_s=2.0, ram_peak_bytes=77, ram_anon_bytes=5)
    failed = tensor_parallel._of(1, Failed(phase="load", types=("MemoryError",), message="", traceback="", phases=[phase]))
    assert failed.rank == 1
    assert failed.phases == [replaced(phase, ram_peak_bytes=None, sampled=True)]
