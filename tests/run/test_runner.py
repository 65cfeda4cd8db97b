"""One case from start to finish: each way to end has its outcome, keeps what was measured before, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from msgspec.structs import replace as replaced

from harness.core.precisions import DEFAULT_PRECISIONS
from harness.core.records import Interference, Outcome, Plan, Result, Verdict, Workload, encode_record
from harness.core.units import GIB, MIB
from harness.machine import cgroup
from harness.measure import beacon, sampler, system_counters
from harness.measure.beacon import Outlook
from harness.measure.interference import InterferenceWatch
from harness.measure.quality import Reference
from harness.measure.sampler import Sample
from harness.measure.verify import OK
from harness.planning import feasibility
from harness.results.store import decode
from harness.run import confinement, runner, worker_process
from harness.run.case_result import CaseEnded, CaseModel, RunContext, announcement, noise, not_run
from harness.run.confinement import ConfinedWorker
from harness.run.runner import Run
from harness.run.worker_process import WorkerMain
from tests.machine.test_probe import Nvml
from tests.support import builders, scripted

WORKLOAD = Workload(prompt_tokens=6, new_tokens=5, batch=2, repeats=2)
LONG_S, SHORT_S = 60.0, 1.5
UNLISTED = "NVML does not list the process"

LOAD = {"import_s", "tokenizer_s", "load_s", "load_ram_peak_bytes", "ram_needed_bytes", "ram_peak_bytes", "ram_anon_peak_bytes"}
COLD = LOAD | {"first_token_s", "ready_s"}
WARM = COLD | {"warm_first_token_s", "prefill_tok_s", "decode_tok_s", "token_p50_s"}
SCORE = WARM | {"perplexity", "answers_correct"}
PEAKS = {"ram_needed_bytes", "ram_peak_bytes", "ram_anon_peak_bytes", "load_ram_peak_bytes"}  # of a phase that failed


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


@pytest.fixture(autouse=True)
def oom_kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel counts: its own figure is of the whole machine, on which others may run out of memory meanwhile."""
    kernel = [7]
    monkeypatch.setattr(confinement, "oom_kills", lambda: kernel[0])
    monkeypatch.setattr(worker_process, "_GRACE_S", 0.5)
    monkeypatch.setattr(system_counters, "cpu", scripted.no_counters)  # as for other people's processes
    return kernel


@dataclass
class Bench:
    """Starts runs, and sees afterward that nothing of them is left."""

    scratch: Path
    runs: list[Run] = field(default_factory=list)

    def start(self, main: str | WorkerMain, *, precision: str = "bf16", model: CaseModel | None = None, limit_s: float = 0) -> Run:
        program = scripted.worker(main) if isinstance(main, str) else main
        if not limit_s:
            limit_s = SHORT_S if isinstance(main, str) and "hang" in main else LONG_S
        context = replace(self.context(program), timeout_s=limit_s)
        run = Run(planned(precision), model or CaseModel(location=Path("tiny"), command="pytest cases/"), context)
        self.runs.append(run)
        return run

    def context(self, program: WorkerMain) -> RunContext:
        return RunContext(
            run="20261124T080000Z-abc123",
            machine=builders.machine(),
            environment={"torch": "2.9.0"},
            scratch=self.scratch,
            worker_main=program,
            timeout_s=LONG_S,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for run in bench.runs:
        with contextlib.suppress(FileNotFoundError):
            run.finish()
    assert not scripted.workers()
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sampler")]


def planned(precision: str = "bf16", placement: str = "cpu") -> Plan:
    return feasibility.decide(replaced(builders.case(precision, placement), workload=WORKLOAD), builders.machine(), None)


def go_through(run: Run) -> Run:
    """Do with a case what cases/ does, as far as it comes."""
    with contextlib.suppress(CaseEnded):
        run.load()
        run.first_round()
        for _ in range(run.plan.case.workload.repeats):
            run.round()
        run.score()
    return run


# behavior, outcome, stage, what the reason says, the phases and the metrics that are kept
ENDS: dict[str, tuple[Outcome, str, str, str, set[str]]] = {
    "cuda_oom_in_load": (Outcome.OOM, "load", "memory during loading: OutOfMemoryError: CUDA out of memory", "load", PEAKS),
    "cuda_oom_in_warm": (Outcome.OOM, "warm", "memory during warm round: OutOfMemoryError: CUDA", "import load cold warm", COLD),
    "memory_error": (Outcome.OOM, "load", "out of memory during loading: MemoryError: no message", "load", PEAKS),
    "bad_alloc": (Outcome.OOM, "load", "a library aborted because it could not allocate", "", set()),
    "abort": (Outcome.CRASH, "cold", "the process died during cold round: aborted (SIGABRT)", "import load", LOAD),
    "killed": (Outcome.CRASH, "cold", "died during cold round: killed from outside (SIGKILL)", "import load", LOAD),
    "segfault": (Outcome.CRASH, "warm", "died during warm round: segmentation fault (SIGSEGV)", "import load cold", COLD),
    "exit": (Outcome.CRASH, "score", "ended during quality probe with exit code 3", "import load cold warm warm", WARM),
    "bug": (Outcome.CRASH, "load", "loading failed: KeyError: 'model.embed_tokens.weight'", "load", PEAKS),
    "import_error": (Outcome.UNSUPPORTED, "load", "No module named 'flash_attn'", "load", PEAKS),
    "not_supported": (Outcome.UNSUPPORTED, "load", "fp8 is not supported on this device", "load", PEAKS),
    "hang_in_load": (Outcome.TIMEOUT, "load", "s (--case-timeout)", "", set()),
    "hang_in_cold": (Outcome.TIMEOUT, "cold", "cold round was not done when", "import load", LOAD),
    "hang_in_score": (Outcome.TIMEOUT, "score", "quality probe was not done when", "import load cold warm warm", WARM),
    "hang_in_a_message": (Outcome.TIMEOUT, "load", "loading was not done when", "", set()),
    "nonsense": (Outcome.CRASH, "load", "worker protocol error during loading", "", set()),
    "past_the_framing": (Outcome.CRASH, "load", "worker protocol error during loading", "", set()),
    "closed_pipe": (Outcome.CRASH, "load", "worker protocol error during loading", "", set()),
    "no_tokens": (Outcome.CRASH, "warm", "timed none of 5 tokens", "import load cold warm", COLD),
}


@pytest.mark.parametrize("behavior", ENDS)
def test_an_end_has_its_outcome_and_keeps_what_came_before(bench: Bench, behavior: str) -> None:
    outcome, stage, why, phases, metrics = ENDS[behavior]
    result = go_through(bench.start(behavior)).finish()
    assert (result.outcome, result.stage) == (outcome, stage)
    assert why in str(result.why)
    assert [phase.name for phase in result.phases] == phases.split()
    assert result.metrics.keys() == metrics
    assert decode(encode_record(result)) == result


def test_case_that_works_shows_everything(bench: Bench) -> None:
    result = go_through(bench.start("ok")).finish()
    assert (result.outcome, result.stage, result.why) == (Outcome.OK, "done", None)
    assert result.metrics.keys() == SCORE
    assert set(result.checks.values()) == {OK}
    assert [phase.name for phase in result.phases] == ["import", "load", "cold", "warm", "warm", "score"]
    assert result.loaded is not None
    assert result.device_map == {"": "cpu"}
    assert result.quality is not None
    assert result.quality.verdict == "not compared"


def test_figures_follow_from_the_worker_s_times(bench: Bench) -> None:
    metrics = go_through(bench.start("ok")).finish().metrics
    assert metrics["load_s"] == 1.5
    assert metrics["first_token_s"] == pytest.approx(scripted.TOKEN_S)
    assert metrics["ready_s"] == pytest.approx(1.5 + scripted.TOKEN_S)
    assert metrics["prefill_tok_s"] == pytest.approx(2 * 6 / scripted.TOKEN_S)
    assert metrics["decode_tok_s"] == pytest.approx(2 / scripted.TOKEN_S)
    assert metrics["ram_peak_bytes"] == 700 * MIB + len("warm")
    assert metrics["load_ram_peak_bytes"] == 700 * MIB + len("load")


def test_one_sample_a_warm_round_and_none_of_the_cold_one(bench: Bench) -> None:
    result = go_through(bench.start("ok")).finish()
    assert {len(values) for key, values in result.samples.items() if key != "token_s"} == {2}
    assert len(result.samples["token_s"]) == 2 * (5 - 1)


def test_result_tells_of_case_machine_and_command(bench: Bench) -> None:
    result = bench.start("ok", model=CaseModel(location=Path("tiny"), code_head="MODEL = 1\n", command="pytest cases/")).finish()
    assert result.id == "tiny/bf16/cpu"
    assert result.case.workload == WORKLOAD
    assert (result.run, result.command) == ("20261124T080000Z-abc123", "pytest cases/")
    assert (result.machine, result.environment) == (builders.machine(), {"torch": "2.9.0"})
    assert str(result.code).startswith("MODEL = 1\nfrom transformers import")
    assert result.at.endswith("Z")


def test_worker_runs_exactly_the_code_of_the_result(bench: Bench, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run = bench.start("ok", model=CaseModel(location=Path("tiny"), keep_file=kept))
    go_through(run)
    assert kept.read_text() == run.finish().code
    kept.unlink()


# Time


def test_time_counts_from_the_beginning_of_the_case(bench: Bench) -> None:
    """Each step of this worker stays within the limit, and all of them together do not."""
    result = go_through(bench.start("slow", limit_s=SHORT_S)).finish()
    assert result.outcome is Outcome.TIMEOUT
    assert result.stage != "load"


def test_phases_and_samples_count_from_the_beginning_of_the_case(bench: Bench) -> None:
    result = go_through(bench.start("slow")).finish()
    assert result.timeline is not None
    times = [time for phase in result.phases for time in (phase.start_s, phase.end_s)]
    assert times == sorted(times)
    assert times[0] > 0
    assert result.timeline.t_s == sorted(result.timeline.t_s)
    assert 0 < result.timeline.t_s[0] < times[-1]


def test_timeline_outlives_the_worker(bench: Bench) -> None:
    timeline = go_through(bench.start("hang_in_load")).finish().timeline
    assert timeline is not None
    assert timeline.ram_bytes
    assert all(ram >= anon > 0 for ram, anon in zip(timeline.ram_bytes, timeline.ram_anon_bytes, strict=True))


# Memory


def test_killed_while_the_kernel_ran_out_of_memory(bench: Bench, oom_kills: list[int]) -> None:
    run = bench.start("killed")
    oom_kills[0] += 1
    result = go_through(run).finish()
    assert result.outcome is Outcome.OOM
    assert result.why == "out of memory during cold round: the kernel killed the process"


def test_ram_that_the_parent_saw_counts_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's high-water mark of a phase is exact for all RAM; of the anonymous part there are samples only."""
    seen = Sample(at_s=0, ram_bytes=900 * MIB, anon_bytes=800 * MIB, vram_bytes={"gpu:0": 5 * MIB, "gpu:1": 7 * MIB})
    monkeypatch.setattr(sampler.Sampler, "peak", lambda *_: seen)
    metrics = go_through(bench.start("ok")).finish().metrics
    assert metrics["ram_anon_peak_bytes"] == 800 * MIB
    assert metrics["ram_peak_bytes"] < 900 * MIB
    assert metrics["vram_process_peak_bytes"] == 7 * MIB


@pytest.mark.parametrize(
    ("before", "after", "alone"),
    [
        pytest.param(False, True, False, id="listed once it has a context"),
        pytest.param(False, False, True, id="a container: ids of the host"),
        pytest.param(True, True, True, id="another process of the host has the same id"),
    ],
)
def test_where_nvml_does_not_list_the_worker_the_result_says_who_held_the_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool, alone: bool
) -> None:
    told = iter((before, after))
    monkeypatch.setattr(ConfinedWorker, "_is_listed", lambda _: next(told))
    limited = replaced(planned(), case=replaced(planned().case, vram_bytes=GIB), device_map={"": "gpu:0"})
    run = Run(limited, CaseModel(location=Path("tiny")), bench.context(scripted.worker("ok")))
    bench.runs.append(run)
    run.load()
    said = noise(limited.case.workload, run.measured).get("vram_peak_bytes")
    assert said == ("only torch enforced --vram: NVML does not list the process" if alone else None)


def held_by_torch(run: Run, **sizes: int) -> None:
    """Say that torch reserved so much on gpu:0 in the phase that ran last."""
    run.measured.phases[-1] = replaced(run.measured.phases[-1], vram_reserved_bytes={"gpu:0": sizes["reserved"]})


@pytest.mark.parametrize(
    ("listed", "grown", "peak", "how"),
    [
        ({"gpu:0": 900}, {}, 900, None),
        (
            {},
            {"gpu:0": 700, "gpu:1": 5000},
            700,
            f"{UNLISTED}: what the card had in use beyond the start of the case",
        ),
        ({}, {}, 500 + 450_000_000, f"{UNLISTED}: what torch reserved and 429 MiB for a CUDA context"),
    ],
    ids=["listed", "a container", "nothing is told"],
)
def test_the_memory_of_the_process_on_a_card_is_one_thing_however_it_is_had(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, listed: dict[str, int], grown: dict[str, int], peak: int, how: str | None
) -> None:
    seen = Sample(at_s=0, ram_bytes=1, anon_bytes=1, vram_bytes=listed, grown_bytes=grown)
    monkeypatch.setattr(sampler.Sampler, "peak", lambda *_: seen)
    run = bench.start("ok")
    run.load()
    held_by_torch(run, reserved=500)
    result = run.finish()
    assert result.metrics["vram_process_peak_bytes"] == peak
    assert result.noisy.get("vram_process_peak_bytes") == how


def test_a_case_on_the_processor_held_nothing_on_a_card_that_others_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Sample(at_s=0, ram_bytes=1, anon_bytes=1, vram_bytes={}, grown_bytes={"gpu:0": 700})
    monkeypatch.setattr(sampler.Sampler, "peak", lambda *_: seen)
    assert "vram_process_peak_bytes" not in go_through(bench.start("ok")).finish().metrics


def test_a_round_on_a_gpu_is_as_many_generations_as_take_a_second(bench: Bench) -> None:
    """The first of them, too short to be one, has warmed the card up and counts nowhere."""
    run = Run(replaced(planned(), device_map={"": "gpu:0"}), CaseModel(location=Path("tiny")), bench.context(scripted.worker("ok")))
    bench.runs.append(run)
    go_through(run)
    assert [len(done.generations) for done in run.warm] == [20, 20]  # of 0.05 s each
    result = run.finish()
    assert [phase.name for phase in result.phases].count("warm") == 2
    assert [window.phase for window in result.interference].count("warm") == 2
    assert result.samples["round_s"] == pytest.approx([1.0, 1.0])
    assert len(result.samples["token_s"]) == 2 * 20 * (WORKLOAD.new_tokens - 1)


def test_a_round_on_the_processor_is_one_generation(bench: Bench) -> None:
    run = go_through(bench.start("ok"))
    assert [len(done.generations) for done in run.warm] == [1, 1]


def test_the_next_case_waits_until_the_card_is_free_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver takes the memory of a killed process back after its end; a case that begins before would see less."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    memory = SimpleNamespace(total=24 * GIB, free=23 * GIB, used=GIB)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml({"nvmlDeviceGetMemoryInfo": memory}))
    context = replace(bench.context(scripted.worker("ok")), gpus=sampler.Gpus())
    run = Run(replaced(planned(), device_map={"": "gpu:0"}), CaseModel(location=Path("tiny")), context)
    bench.runs.append(run)
    run.load()
    memory.free = 10 * GIB
    back = threading.Timer(0.7, lambda: setattr(memory, "free", 23 * GIB - 32 * MIB))
    back.start()
    run.finish()
    assert memory.free > 22 * GIB


def test_a_group_that_the_worker_may_not_enter_is_removed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[bool] = []
    closed = SimpleNamespace(add=lambda _: False, remove=lambda: removed.append(True))
    monkeypatch.setattr(cgroup, "group", lambda _: closed)
    limited = replaced(planned(), case=replaced(planned().case, ram_bytes=8 * GIB))
    bench.runs.append(Run(limited, CaseModel(location=Path("tiny")), bench.context(scripted.worker("ok"))))
    assert removed == [True]


# Checks and quality


def test_precision_without_effect_is_told_and_measured_nevertheless(bench: Bench) -> None:
    result = go_through(bench.start("without_effect")).finish()
    assert result.outcome is Outcome.OK
    assert result.checks["precision"].startswith("bf16 did not take effect: 0")
    assert "decode_tok_s" in result.metrics


@pytest.mark.parametrize("precision", DEFAULT_PRECISIONS)
def test_precision_that_took_effect_is_ok(bench: Bench, precision: str) -> None:
    run = bench.start("ok", precision=precision)
    run.load()
    assert run.checks["precision"] == OK


def test_broken_quality_is_told(bench: Bench) -> None:
    result = go_through(bench.start("nan")).finish()
    assert result.outcome is Outcome.OK
    assert result.quality is not None
    assert result.quality.verdict == "broken"
    assert "perplexity" not in result.metrics


def test_quality_is_measured_against_the_reference(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("predictions of fp32")
    reference = Reference(case="tiny/fp32/cpu", perplexity=9.9)
    model = CaseModel(location=Path("tiny"), reference=reference, reference_file=tmp_path / "reference")
    result = go_through(bench.start("ok", model=model)).finish()
    (tmp_path / "reference").unlink()
    assert result.quality is not None
    assert (result.quality.reference, result.quality.verdict) == ("tiny/fp32/cpu", "intact")
    assert result.quality.answers[0].answer == "predictions of fp32"
    assert result.metrics["top1_agreement"] == 0.99


def test_synthetic_weights_have_no_perplexity(bench: Bench) -> None:
    result = go_through(bench.start("ok", model=CaseModel(location=Path("tiny"), weights="synthetic"))).finish()
    assert result.weights == "synthetic"
    assert result.metrics.keys() == WARM


# Others on the machine


def measured(bench: Bench, monkeypatch: pytest.MonkeyPatch, *cores: float) -> Result:
    """Measure the asked rounds and the extra ones; others use so many cores in each of the first warm rounds."""
    coming = [*cores]

    def end(_: InterferenceWatch, phase: str) -> Interference:
        used = coming.pop(0) if phase == "warm" and coming else 0.0
        why = "others were there" if used else ""
        return Interference(phase=phase, start_s=0, end_s=1, cpus=2, others_cores=used, idle_cores=0.0, why=why)

    monkeypatch.setattr(InterferenceWatch, "end", end)
    run = bench.start("ok")
    for _ in range(WORKLOAD.repeats):
        run.round()
    assert all(seconds > 0 for seconds in run.extra_rounds())
    return run.finish()


def test_undisturbed_rounds_are_as_many_as_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(bench, monkeypatch)
    assert len(result.samples["round_s"]) == WORKLOAD.repeats
    assert [window.phase for window in result.interference] == ["load", "cold", "warm", "warm"]
    assert result.noisy == {}


def test_a_disturbed_round_is_kept_told_and_made_up_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(bench, monkeypatch, 0.0, 0.9)
    assert len(result.samples["round_s"]) == WORKLOAD.repeats + 1
    assert result.noisy["decode_tok_s"] == "others used 0.9 of 2 cores in 1 of 3 warm rounds; the median is of the other 2"
    assert result.noisy.keys() == {"warm_first_token_s", "prefill_tok_s", "decode_tok_s", "token_p50_s"}
    assert [window.why != "" for window in result.interference] == [False, False, False, True, False]


def test_extra_rounds_take_no_longer_than_those_that_were_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(bench, monkeypatch, *[0.9] * 100)
    assert len(result.samples["round_s"]) == 2 * WORKLOAD.repeats
    assert result.noisy["decode_tok_s"] == "others used 0.9 of 2 cores in 4 of 4 warm rounds"


def test_no_extra_round_begins_that_could_end_the_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SPARE_ROUNDS", LONG_S / scripted.TOKEN_S)
    assert len(measured(bench, monkeypatch, 0.9, 0.9).samples["round_s"]) == WORKLOAD.repeats


def test_fewer_rounds_than_asked_are_not_made_up_for(bench: Bench) -> None:
    """pytest --benchmark-disable asks for one round."""
    run = bench.start("ok")
    run.round()
    assert list(run.extra_rounds()) == []


# The order of things


def test_what_is_asked_twice_is_done_once(bench: Bench) -> None:
    run = bench.start("ok")
    assert run.load() is run.load()
    assert run.first_round() is run.first_round()
    assert run.score() is run.score()
    assert [phase.name for phase in run.finish().phases] == ["import", "load", "cold", "score"]


def test_what_a_step_needs_is_done_first(bench: Bench) -> None:
    run = bench.start("ok")
    run.round()
    assert [phase.name for phase in run.finish().phases] == ["import", "load", "cold", "warm"]


@pytest.mark.parametrize("step", [Run.load, Run.first_round, Run.round, Run.score])
def test_after_the_end_every_step_says_why(bench: Bench, step: Callable[[Run], object]) -> None:
    run = bench.start("bad_alloc")
    for _ in range(2):
        with pytest.raises(CaseEnded, match="could not allocate") as caught:
            step(run)
        assert caught.value.outcome is Outcome.OOM


def test_result_of_a_case_under_way_has_what_is_there(bench: Bench) -> None:
    run = bench.start("ok")
    run.first_round()
    result = run.result()
    assert result.metrics.keys() == COLD
    assert result.outcome is Outcome.OK


# What is left


@pytest.mark.parametrize("behavior", sorted(scripted.BEHAVIORS.keys() - ENDS.keys()))
def test_nothing_is_left(bench: Bench, behavior: str) -> None:
    """The fixture looks for processes, files and threads."""
    result = go_through(bench.start(behavior)).finish()
    for started in grandchildren(result):
        assert scripted.ends(started)


def grandchildren(result: Result) -> list[psutil.Process]:
    words = result.log_tail.split()
    ids = [int(words[index + 1]) for index, word in enumerate(words) if word == "grandchild"]
    return [psutil.Process(pid) for pid in ids if psutil.pid_exists(pid)]


def test_a_case_that_nobody_went_through_ends_too(bench: Bench) -> None:
    result = bench.start("ok").finish()
    assert (result.outcome, result.metrics, result.phases) == (Outcome.OK, {}, [])


def test_log_and_traceback_are_kept(bench: Bench) -> None:
    result = go_through(bench.start("bug")).finish()
    assert "Traceback (most recent call last):\nKeyError" in result.log_tail
    result = go_through(bench.start("bad_alloc")).finish()
    assert "what():  std::bad_alloc" in result.log_tail


def test_log_of_a_talkative_worker_stays_small(bench: Bench) -> None:
    result = go_through(bench.start("noise")).finish()
    assert result.outcome is Outcome.OK
    assert "the last word" in result.log_tail
    assert len(result.log_tail) < MIB


@pytest.mark.parametrize("broken", [sampler.Sampler, worker_process.Worker])
def test_a_case_that_cannot_begin_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: type) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(confinement, broken.__name__, fails)
    with pytest.raises(RuntimeError, match="new thread"):
        bench.start("ok")
    assert not scripted.workers()
    assert not list(bench.scratch.iterdir())


def test_log_that_the_model_s_code_removes_does_no_harm(bench: Bench, recwarn: pytest.WarningsRecorder) -> None:
    run = bench.start("slow")
    run.load()
    for log in bench.scratch.rglob("log"):
        log.unlink()
    result = go_through(run).finish()
    assert result.outcome is Outcome.OK
    assert result.timeline is not None
    assert len(result.timeline.t_s) > 10
    assert not list(recwarn)


def test_ctrl_c_ends_the_worker_and_the_case_can_be_finished(bench: Bench) -> None:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    run = bench.start("hang_in_cold", limit_s=LONG_S)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SHORT_S)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.first_round()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not scripted.workers()
    assert run.finish().metrics.keys() == LOAD


# What hears of the samples


def test_every_sample_is_told_with_its_case(bench: Bench) -> None:
    heard: list[tuple[str, str]] = []
    context = replace(bench.context(scripted.worker("slow")), on_sample=lambda run, _: heard.append((run.plan.case.id, run.phase)))
    run = Run(planned(), CaseModel(location=Path("tiny")), context)
    bench.runs.append(run)
    run.first_round()
    assert {name for name, _ in heard} == {"tiny/bf16/cpu"}
    assert {"load", "cold"} <= {phase for _, phase in heard}
    assert run.seconds > 0


# Cases that are not run


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [(Verdict.INVALID, Outcome.UNSUPPORTED), (Verdict.UNAVAILABLE, Outcome.SKIPPED), (Verdict.TOO_BIG, Outcome.SKIPPED)],
)
def test_case_that_is_not_run_has_a_result_from_its_plan(bench: Bench, verdict: Verdict, outcome: Outcome) -> None:
    decided = Plan(case=builders.case(), verdict=verdict, why="because")
    result = not_run(decided, CaseModel(location=Path("tiny"), command="pytest cases/"), bench.context(scripted.by_model))
    assert (result.verdict, result.outcome, result.stage, result.why) == (verdict, outcome, "plan", "because")
    assert result.code is None
    assert result.command == "pytest cases/"


def test_plan_without_code_cannot_run(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no loading code"):
        Run(Plan(case=builders.case(), verdict=Verdict.INVALID), CaseModel(location=Path()), bench.context(scripted.by_model))


# What is told to who watches


def test_a_case_says_what_it_is_before_it_loads_and_where_its_weights_are_once_it_has(bench: Bench) -> None:
    context = replace(bench.context(scripted.worker("ok")), results=Path("results"))
    case = replaced(builders.case("bf16", "cpu"), workload=WORKLOAD, ram_bytes=None)
    outlook = Outlook(kv={"cpu": [(1, 5)]}, context_length=64)
    plan = replaced(planned(), case=case)
    run = Run(plan, CaseModel(location=Path("tiny"), outlook=outlook, typed="./tiny"), context)
    bench.runs.append(run)
    (folder,) = bench.scratch.glob("case-*")
    assert beacon.announced(folder) is None
    before = announcement(plan, run.model, context)
    assert (before.case, before.weights_bytes, before.limits_bytes) == (case.id, {}, {})
    run.load()
    said = beacon.announced(folder)
    assert said is not None
    assert said.weights_bytes == {"cpu": 8000}
    assert (said.outlook, said.typed) == (outlook, "./tiny")
    assert said.results == str(Path("results").absolute())
