"""One run: which cases in which order, what each is told, and what is on the disk when."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harness.catalog import fingerprint
from harness.core.errors import CheckpointError, StoreError, UsageError
from harness.core.records import Case, Outcome, Plan, Result, Verdict
from harness.core.units import GIB
from harness.run import forkserver
from harness.run.case_result import CaseEnded
from harness.run.options import Options
from harness.run.runner import Run
from harness.run.session import Session
from tests.support import builders, scripted
from tests.support.bad_models import BAD, write_bad

FAST = {"new_tokens": "3", "repeats": "2", "case_timeout": "60"}

Make = Callable[..., Session]


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make sessions on a machine without a card, in a directory that has the model `tiny`; close them at the end."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    scripted.write_model(tmp_path / "tiny")
    sessions: list[Session] = []

    def made(**options: Any) -> Session:
        given = {"model": ["tiny"], "precision": ["fp32"], "placement": ["cpu"], "results": "results", **FAST, **options}
        session = Session(Options(given=given))
        session.machine = builders.machine()
        session.worker_main = scripted.by_model
        sessions.append(session)
        return session

    yield made
    for session in sessions:
        session.close()
    assert not scripted.workers()
    assert not list((tmp_path / "scratch").glob("fitmatrix-*"))


def go_through(session: Session, case: Case) -> None:
    """Do with a case what the plugin and cases/ do."""
    run = session.start(session.plan(case))
    if not isinstance(run, Run):
        return
    with contextlib.suppress(CaseEnded):
        for _ in range(case.workload.repeats):
            run.round()
        run.score()
    session.finish(run)


def measure(session: Session) -> list[Result]:
    cases = session.cases()
    session.prepare(cases)
    for case in cases:
        go_through(session, case)
    return [result for result in session.store.read()[0] if result.run == session.run_id]


def stored(session: Session) -> list[Result]:
    results, problems = session.store.read()
    assert not problems
    return results


# Cases


def test_widest_precision_comes_first_whatever_the_order_asked_for(make: Make) -> None:
    session = make(precision=["int4", "bf16", "fp32"], placement=["cpu", "disk", "auto"])
    assert [case.id for case in session.cases()] == [
        f"tiny/{precision}/{placement}" for precision in ("fp32", "bf16", "int4") for placement in ("auto", "disk", "cpu")
    ]


def test_every_size_of_the_gpu_is_a_case_of_each_placement_that_uses_one(make: Make) -> None:
    session = make(placement=["cpu", "direct"], vram=["8GiB", "6GiB"], ram="16GiB")
    names = ["direct@vram8GiB@ram16GiB", "direct@vram6GiB@ram16GiB", "cpu@ram16GiB"]
    assert [case.id for case in session.cases()] == [f"tiny/fp32/{name}" for name in names]


def test_a_limited_case_is_planned_recorded_and_repeated_under_its_limit(make: Make) -> None:
    session = make(placement=["cpu"], ram="8GiB")
    (result,) = measure(session)
    assert result.estimate is not None
    assert result.estimate.tiers["cpu"].capacity_bytes == 8 * GIB
    cpu, probed = result.machine.tier("cpu"), session.machine.tier("cpu")
    assert cpu is not None
    assert probed is not None
    assert (cpu.limit_bytes, probed.limit_bytes) == (8 * GIB, None)
    assert result.command is not None
    assert "--placement cpu --ram 8GiB" in result.command


def test_vram_without_a_gpu_is_unavailable_in_one_sentence(make: Make) -> None:
    (result,) = measure(make(placement=["auto"], vram=["8GiB"]))
    assert (result.outcome, result.verdict) == (Outcome.SKIPPED, Verdict.UNAVAILABLE)
    assert result.why == "--vram 8GiB limits a GPU, and no NVIDIA GPU was detected"


def test_models_come_in_the_order_asked_for(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "another")
    assert [case.model for case in make(model=["tiny", "another"]).cases()] == ["tiny", "another"]


def test_workload_comes_from_the_options(make: Make) -> None:
    (case,) = make(prompt_tokens="7", new_tokens="9", batch="2", repeats="4").cases()
    assert (case.workload.prompt_tokens, case.workload.new_tokens, case.workload.batch, case.workload.repeats) == (7, 9, 2, 4)


def test_two_directories_of_one_name_are_refused(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "elsewhere/tiny")
    with pytest.raises(UsageError, match=r"two models are called 'tiny': .*/tiny and .*/elsewhere/tiny; rename"):
        make(model=["tiny", "elsewhere/tiny"])


def test_one_directory_by_two_paths_is_one_model(make: Make, tmp_path: Path) -> None:
    session = make(model=["tiny", "./tiny", str(tmp_path / "tiny")])
    assert [case.id for case in session.cases()] == ["tiny/fp32/cpu"]


def test_nothing_happens_before_it_is_asked_for(make: Make, tmp_path: Path) -> None:
    session = Session(make().options)
    session.cases()
    session.close()
    assert session.render() is None
    assert not {"machine", "context"} & session.__dict__.keys()
    assert not (tmp_path / "results").exists()


# Preparing


@pytest.mark.parametrize("option", ["results", "html"])
def test_output_that_cannot_be_written_is_told_before_anything_is_measured(make: Make, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("in the way")
    session = make(**{option: "file/inside"})
    with pytest.raises((StoreError, UsageError), match=f"file/inside.*--{option}|--{option}.*file/inside"):
        session.prepare(session.cases())


def test_page_that_is_a_directory_is_told_before_anything_is_measured(make: Make, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    session = make(html="page")
    with pytest.raises(UsageError, match="page is a directory"):
        session.prepare(session.cases())


def test_damaged_model_is_told_before_anything_is_measured(make: Make, tmp_path: Path) -> None:
    (tmp_path / "tiny/model.safetensors").write_bytes(b"\xff" * 16)
    session = make()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        session.prepare(session.cases())


def test_model_that_no_case_can_load_is_not_fetched(make: Make) -> None:
    """It is on a hub that nobody asks."""
    session = make(model=["nobody/nothing"], placement=["direct"])
    assert [result.outcome for result in measure(session)] == [Outcome.SKIPPED]


def test_scripted_worker_starts_no_torch(make: Make) -> None:
    session = make()
    assert all("torch is imported: False" in result.log_tail for result in measure(session))


def test_full_disk_is_told_before_anything_is_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    session = make()
    with pytest.raises(StoreError, match=r"results: no room for the results of this run: up to .* needed, 1000 bytes free"):
        session.prepare(session.cases())


# Measuring


def test_every_case_has_one_result(make: Make) -> None:
    session = make(precision=["fp32", "bf16"], placement=["cpu", "auto"])
    measure(session)
    assert [result.id for result in stored(session)] == [case.id for case in session.cases()]
    assert {result.outcome for result in stored(session)} == {Outcome.OK}
    assert {result.run for result in stored(session)} == {session.run_id}


def test_result_is_on_the_disk_before_the_next_case_starts(make: Make) -> None:
    session = make(precision=["fp32", "bf16", "fp16"])
    session.prepare(session.cases())
    for number, case in enumerate(session.cases()):
        assert len(stored(session)) == number
        go_through(session, case)
        assert stored(session)[-1].id == case.id


def test_a_case_that_ends_badly_does_not_end_the_run(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "frail", fp32="bad_alloc", bf16="segfault", fp16="ok")
    results = measure(make(model=["frail"], precision=["fp32", "bf16", "fp16"]))
    assert [result.outcome for result in results] == [Outcome.OOM, Outcome.CRASH, Outcome.OK]


def test_bad_models_stand_on_the_page_beside_what_ran(make: Make, tmp_path: Path) -> None:
    session = make(model=["tiny", *write_bad(tmp_path, tmp_path / "tiny")], precision=["bf16"])
    found = {result.case.model: result for result in measure(session)}
    assert found.pop("tiny").outcome is Outcome.OK
    assert {name: (one.outcome, one.stage) for name, one in found.items()} == dict.fromkeys(BAD, (Outcome.SKIPPED, "plan"))
    assert [bad.said in str(found[name].why) for name, bad in BAD.items()] == [True] * len(BAD)
    page = session.render()
    assert page is not None
    shown = page.read_text(encoding="utf-8")
    assert [name for name in BAD if name not in shown] == []
    assert str(tmp_path) not in shown


@pytest.mark.parametrize(
    ("precision", "placement", "verdict", "outcome", "why"),
    [
        ("int4", "disk", Verdict.INVALID, Outcome.UNSUPPORTED, "transformers leaves parts of a bitsandbytes model"),
        ("bf16", "direct", Verdict.UNAVAILABLE, Outcome.SKIPPED, "no NVIDIA GPU detected"),
    ],
)
def test_case_that_cannot_run_here_has_a_result_that_says_why(
    make: Make, precision: str, placement: str, verdict: Verdict, outcome: Outcome, why: str
) -> None:
    session = make(precision=[precision], placement=[placement])
    measure(session)
    (result,) = stored(session)
    assert (result.verdict, result.outcome, result.stage) == (verdict, outcome, "plan")
    assert why in str(result.why)


@pytest.mark.parametrize("run_all", [False, True])
def test_what_the_plan_expects_to_fail_runs_only_when_asked_for(make: Make, run_all: bool) -> None:
    session = make(run_all=run_all)
    (case,) = session.cases()
    session.prepare([case])
    run = session.start(replace(session.plan(case), verdict=Verdict.TOO_BIG, why="needs 16.1 GiB"))
    assert isinstance(run, Run) is run_all
    if isinstance(run, Run):
        session.finish(run)
    assert [result.outcome for result in stored(session)] == [Outcome.OK if run_all else Outcome.SKIPPED]


def test_a_disk_that_has_filled_up_since_the_plan_is_seen_before_loading(make: Make) -> None:
    session = make(placement=["disk"])
    (case,) = session.cases()
    session.prepare([case])
    decided = session.plan(case)
    assert decided.estimate is not None
    disk = replace(decided.estimate.tiers["disk"], needed_bytes=1 << 60)
    assert session.start(replace(decided, estimate=replace(decided.estimate, tiers={"disk": disk}))) is None
    (result,) = stored(session)
    assert (result.verdict, result.outcome, result.stage) == (Verdict.TOO_BIG, Outcome.SKIPPED, "plan")
    assert "set TMPDIR" in str(result.why)


def test_what_has_no_code_does_not_run_even_when_asked_for(make: Make) -> None:
    session = make(run_all=True)
    (case,) = session.cases()
    session.prepare([case])
    assert session.start(Plan(case=case, verdict=Verdict.INVALID, why="cannot be")) is None


def test_result_says_how_to_repeat_it(make: Make) -> None:
    session = make(precision=["bf16"], placement=["auto"])
    (result,) = measure(session)
    assert result.command == (
        "pytest cases/ --model ./tiny --precision bf16 --placement auto --new-tokens 3 --repeats 2 --case-timeout 60.0"
    )


def test_command_names_no_directory_of_the_user(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(model=[str(tmp_path / "tiny")], results=str(tmp_path / "results"))
    monkeypatch.chdir(tmp_path / "scratch")
    (result,) = measure(session)
    assert str(tmp_path) not in f"{result.command} {result.code} {result.why}"
    assert "--model tiny " in str(result.command)


# The reference


# A device map of the user's own


def test_a_map_is_what_is_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"": "cpu"}')
    session = make(placement=None, device_map="map.json")
    assert [case.placement for case in session.cases()] == ["file"]
    (result,) = measure(session)
    assert result.outcome is Outcome.OK
    assert result.code is not None
    assert 'device_map={"": "cpu"}' in result.code
    assert "--placement file --device-map ./map.json" in str(result.command)


def test_a_map_comes_beside_placements_that_are_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text('"" = "cpu"')
    assert [case.placement for case in make(device_map="map.toml").cases()] == ["cpu", "file"]


def test_a_map_that_does_not_fit_is_told_before_anything_is_measured(make: Make, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"": 0}')
    session = make(device_map="map.json")
    with pytest.raises(UsageError, match="the device map does not fit tiny: '' is on GPU 0, and there is no GPU"):
        session.prepare(session.cases())
    with pytest.raises(UsageError, match="placement file is a device map of yours: give it by --device-map FILE"):
        make(placement=["file"])


def test_what_takes_several_processes_is_not_run_where_none_can_be_forked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "METHOD", "spawn")
    (result,) = measure(make(placement=["tp"], run_all=True))
    assert (result.outcome, result.verdict) == (Outcome.SKIPPED, Verdict.UNAVAILABLE)
    assert str(result.why).startswith("processes that share a model are measured on Linux alone")


def test_one_gpu_is_not_shared(make: Make) -> None:
    session = make(placement=["tp"])
    session.machine = builders.machine(builders.gpu())
    (result,) = measure(session)
    assert (result.outcome, result.verdict) == (Outcome.SKIPPED, Verdict.UNAVAILABLE)
    assert result.why == "tensor parallelism splits every layer over at least two GPUs, and this machine has one"


def test_the_default_matrix_is_no_longer_than_what_differs_here(make: Make) -> None:
    names = [case.placement for case in make(placement=None).cases()]
    assert names == ["direct", "ram-to-gpu", "auto", "dispatch", "gpu+cpu", "disk", "cpu"]


def compared_with(result: Result) -> str:
    """Return the id of the reference case, after a look at what the worker really had before it."""
    assert result.quality is not None
    answer, reference = result.quality.answers[0].answer, result.quality.reference
    assert (answer == "nothing") is (reference is None)
    return reference or ""


def test_first_case_is_the_reference_of_the_later_ones(make: Make) -> None:
    first, *later = measure(make(precision=["fp32", "bf16", "fp16"]))
    assert compared_with(first) == ""
    assert {compared_with(result) for result in later} == {first.id}
    for result in later:
        assert result.quality is not None
        assert str(first.code).endswith(result.quality.answers[0].answer)
    assert "top1_agreement" not in first.metrics
    assert all(result.metrics["top1_agreement"] == 0.99 for result in later)


@pytest.mark.parametrize("behavior", ["cuda_oom_in_load", "nan", "exit"])
def test_case_without_a_sound_score_is_no_reference(make: Make, tmp_path: Path, behavior: str) -> None:
    scripted.write_model(tmp_path / "frail", fp32=behavior)
    _, second, third = measure(make(model=["frail"], precision=["fp32", "bf16", "fp16"]))
    assert (compared_with(second), compared_with(third)) == ("", second.id)


def test_every_model_has_its_own_reference(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "another")
    results = measure(make(model=["tiny", "another"], precision=["fp32", "bf16"]))
    assert [compared_with(result) for result in results] == ["", "tiny/fp32/cpu", "", "another/fp32/cpu"]


# Resuming


def resumed(make: Make, **options: Any) -> tuple[Session, list[str]]:
    """Go on with a run; return the session and the precisions that were measured."""
    session = make(resume=True, **options)
    return session, [result.case.precision for result in measure(session)]


def test_what_was_measured_is_not_measured_again(make: Make) -> None:
    first = measure(make(precision=["fp32", "bf16"]))
    session, ran = resumed(make, precision=["fp32", "bf16"])
    assert ran == []
    assert list(session.kept.values()) == first == stored(session)
    assert session.resumed() == "--resume: 2 cases kept, 0 run"


def test_what_a_synthetic_run_does_not_fetch_is_synthetic_too(make: Make) -> None:
    session = make(weights="synthetic")
    assert session.case_model(session.cases()[0]).weights == "synthetic"


def test_without_resume_everything_is_measured_again(make: Make) -> None:
    measure(make())
    session = make()
    assert len(measure(session)) == 1
    assert session.resumed() is None


def test_what_is_missing_is_compared_with_the_kept_reference(make: Make) -> None:
    """Whose predictions are gone with the run that made them: it is loaded once more, and gives no second result."""
    measure(make(precision=["fp32", "bf16"]))
    session, ran = resumed(make, precision=["fp32", "bf16", "fp16", "int8"])
    assert ran == ["fp16", "int8"]
    assert [compared_with(result) for result in stored(session)] == ["", *["tiny/fp32/cpu"] * 3]
    assert session.resumed() == (
        "--resume: 2 cases kept, 2 run: 2 not measured before; loaded tiny/fp32/cpu once more, which others are compared with"
    )


def test_a_kept_reference_that_cannot_be_loaded_any_more_is_none(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "of_model", lambda *_, **__: "the same")  # what changes is the behavior, which is a file here
    measure(make(precision=["fp32"]))
    (tmp_path / "tiny/script.json").write_text('{"fp32": "bad_alloc"}')
    _, ran = resumed(make, precision=["fp32", "bf16"])
    assert ran == ["bf16"]


def test_a_wider_reference_than_before_has_the_others_judged_again(make: Make) -> None:
    measure(make(precision=["bf16", "fp16"]))
    session, ran = resumed(make, precision=["fp32", "bf16", "fp16"])
    assert ran == ["fp32", "bf16", "fp16"]
    assert {compared_with(result) for result in stored(session)[-2:]} == {"tiny/fp32/cpu"}
    assert "2 not compared with tiny/fp32/cpu before" in str(session.resumed())


def test_a_part_of_a_run_keeps_what_was_compared_with_the_rest(make: Make) -> None:
    measure(make(precision=["fp32", "bf16", "fp16"]))
    assert resumed(make, precision=["bf16", "fp16"])[1] == []


@pytest.mark.parametrize(("options", "count"), [({}, 0), ({"run_all": True}, 1)])
def test_out_of_memory_is_repeated_only_when_asked_for(make: Make, tmp_path: Path, options: dict[str, bool], count: int) -> None:
    scripted.write_model(tmp_path / "frail", fp32="bad_alloc")
    measure(make(model=["frail"]))
    assert len(resumed(make, model=["frail"], **options)[1]) == count


def test_a_crash_is_repeated(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "frail", fp32="segfault")
    measure(make(model=["frail"]))
    session, ran = resumed(make, model=["frail"])
    assert ran == ["fp32"]
    assert session.resumed() == "--resume: 0 cases kept, 1 run: 1 crashed"


def test_a_time_out_is_repeated_with_more_time(make: Make, tmp_path: Path) -> None:
    scripted.write_model(tmp_path / "frail", fp32="hang_in_load")
    measure(make(model=["frail"], case_timeout="0.5"))
    assert resumed(make, model=["frail"], case_timeout="0.5")[1] == []
    assert resumed(make, model=["frail"], case_timeout="0.7")[1] == ["fp32"]


def test_another_workload_is_another_case(make: Make) -> None:
    measure(make())
    assert resumed(make, repeats="3")[1] == ["fp32"]


def test_other_weights_of_the_same_shape_are_measured(make: Make, tmp_path: Path) -> None:
    measure(make())
    (tmp_path / "tiny/model.safetensors").touch()
    session, ran = resumed(make)
    assert ran == ["fp32"]
    assert "the model's files have changed" in str(session.resumed())
    assert resumed(make)[1] == []


def test_what_cannot_run_here_is_not_recorded_twice(make: Make) -> None:
    measure(make(placement=["direct", "cpu"]))
    session, ran = resumed(make, placement=["direct", "cpu"])
    assert ran == []
    assert [result.id for result in stored(session)] == ["tiny/fp32/direct", "tiny/fp32/cpu"]


def test_what_did_not_fit_runs_when_it_does(make: Make) -> None:
    session = make()
    session.machine = builders.machine(ram_bytes=1 << 20)
    assert [result.stage for result in measure(session)] == ["plan"]
    session, ran = resumed(make)
    assert ran == ["fp32"]


def test_page_of_a_run_that_kept_everything_shows_it(make: Make) -> None:
    measure(make())
    session, _ = resumed(make)
    page = session.render()
    assert page is not None
    assert "tiny/fp32/cpu" in page.read_text()


def test_nothing_is_imported_for_cases_that_are_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    monkeypatch.setattr(forkserver, "warm_up", heard.append)
    measure(make())
    session = make(resume=True)
    session.worker_main = None
    session.prepare(session.cases())
    assert not heard


# The page


def test_page_is_written_from_all_results_in_the_store(make: Make) -> None:
    measure(make(precision=["fp32"]))
    session = make(precision=["bf16"])
    measure(session)
    page = session.render()
    assert page == session.page == Path("results/index.html")
    for name in ("tiny/fp32/cpu", "tiny/bf16/cpu"):
        assert name in page.read_text()


def test_page_tells_of_lines_that_are_no_results(make: Make) -> None:
    Path("results").mkdir()
    Path("results/results.jsonl").write_text('{"schema": 1, "id": "cut sho')
    session = make()
    measure(session)
    page = session.render()
    assert page is not None
    assert "results.jsonl:1: not a result" in page.read_text()
    assert "tiny/fp32/cpu" in page.read_text()


def test_page_can_be_elsewhere(make: Make, tmp_path: Path) -> None:
    session = make(html="some/where/page.html")
    measure(session)
    session.render()
    assert (tmp_path / "some/where/page.html").is_file()
    assert not (tmp_path / "results/index.html").exists()


def test_run_without_results_writes_no_page(make: Make) -> None:
    measure(make())
    Path("results/index.html").unlink(missing_ok=True)
    assert make().render() is None
    assert not Path("results/index.html").exists()


# Interrupts and a full disk


def test_interrupted_case_leaves_the_older_result_the_newest(make: Make) -> None:
    (older,) = measure(make())
    session = make()
    (case,) = session.cases()
    session.prepare([case])
    run = session.start(session.plan(case))
    assert isinstance(run, Run)
    run.load()
    session.interrupted = True
    assert session.finish(run).metrics["load_s"] > 0
    assert stored(session) == [older]
    assert session.render() is None


def test_result_that_cannot_be_written_leaves_no_worker(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    (case,) = session.cases()
    session.prepare([case])
    run = session.start(session.plan(case))
    assert isinstance(run, Run)
    monkeypatch.setattr(session.store, "path", Path("tiny/config.json/results.jsonl"))
    with pytest.raises(StoreError, match="cannot append the result of tiny/fp32/cpu"):
        session.finish(run)
    assert not scripted.workers()
    assert not session.added


def test_warm_up_is_for_the_real_worker_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    monkeypatch.setattr(forkserver, "warm_up", heard.append)
    session = make()
    session.prepare(session.cases())
    assert not heard
    session.worker_main = None
    session.prepare(session.cases())
    assert heard == [["transformers.models.llama.modeling_llama"]]
