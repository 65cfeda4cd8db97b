"""`pytest cases/` as its user sees it: options, order, letters, exit statuses, files and last words."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from harness.cli.entry import main
from harness.core.metrics import format_metric
from harness.core.options import OPTIONS
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Outcome, Result, encode_record
from harness.measure import system_counters
from harness.results import store
from harness.run import worker_process
from harness.run.live import LiveLine
from harness.run.session import Session
from tests.support import scripted

ROOT = Path(__file__).parent.parent
PYPROJECT = """
[tool.pytest.ini_options]
addopts = ["-p", "pytest_benchmark.plugin"]
markers = ["stage(n): the order of the tests of one case"]
"""
FAST = ("--new-tokens", "3", "--repeats", "2", "--case-timeout", "60")
CONFTEST = """
import pytest

pytest_plugins = ["harness.plugin"]


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    from harness.run import forkserver
    from harness.plugin import SESSION
    from tests.support import builders, scripted

    forkserver.preload("tests.support.scripted")  # unless a fork server runs already
    config.stash[SESSION].worker_main = scripted.by_model
    config.stash[SESSION].machine = builders.machine(ram_bytes=480 << 20)  # so little that no plan promises anything
"""


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


@dataclass
class Project:
    """A directory with cases/, a model `tiny` whose workers behave as told, and a pytest to run there."""

    pytester: pytest.Pytester

    @property
    def path(self) -> Path:
        return self.pytester.path

    def behave(self, **behaviors: str) -> None:
        """Say what the worker does, by precision."""
        shutil.rmtree(self.path / "tiny", ignore_errors=True)
        scripted.write_model(self.path / "tiny", **behaviors)

    def words(self, *words: str, precisions: str = "fp32", placement: str = "cpu") -> list[str]:
        """Return a command line: cases of `tiny`, cheap ones."""
        options = [part for name in precisions.split() for part in ("--precision", name)]
        return ["cases", "--model", "tiny", "--placement", placement, *options, *FAST, *words]

    def run(self, *words: str, precisions: str = "fp32", placement: str = "cpu") -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(*self.words(*words, precisions=precisions, placement=placement))

    def raw(self, *words: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(*words)

    @property
    def results(self) -> list[Result]:
        results, problems = store.read(self.path / "fitmatrix-results/results.jsonl")
        assert not problems
        return results

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {result.case.precision: result.outcome for result in self.results}

    @property
    def has_results(self) -> bool:
        return (self.path / "fitmatrix-results").exists()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all runs share: the architecture of `tiny` is new to the first, which asks transformers for its skeleton."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Project]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FITMATRIX_CACHE", str(cache))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing hypothesis takes longer than a test
    monkeypatch.setattr(worker_process, "_GRACE_S", 0.5)
    monkeypatch.setattr(system_counters, "cpu", scripted.no_counters)
    shutil.copytree(ROOT / "cases", pytester.path / "cases", ignore=shutil.ignore_patterns("__pycache__"))
    pytester.makeconftest(CONFTEST)
    pytester.makepyprojecttoml(PYPROJECT)
    project = Project(pytester)
    project.behave()
    yield project
    assert not scripted.workers()


def usage_error(done: pytest.RunResult) -> str:
    """Return the one sentence of a run that was refused."""
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in done.stdout.str() + done.stderr.str()
    (sentence,) = [line for line in done.errlines if line.startswith("ERROR: ")]
    return sentence


# Options


def test_help_shows_every_option(project: Project) -> None:
    shown = project.raw("--help").stdout.str()
    assert [option.flag for option in OPTIONS if f"  {option.flag}" not in shown] == []
    assert ", ".join(PRECISIONS) in " ".join(shown.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--precision", "int5"), "--precision: unknown precision 'int5': did you mean 'int8' or 'int4'?"),
        (("--placement", "cpus"), "--placement: unknown placement 'cpus': did you mean 'cpu'"),
        (("--model", "smollm2-135"), "unknown model 'smollm2-135'"),
        (("--model", "./tinny"), "no directory './tinny'"),
        (("--new-tokens", "one"), "--new-tokens: 'one' is not a whole number"),
        (("--case-timeout", "0"), "--case-timeout: '0' is out of range"),
    ],
)
def test_a_wrong_option_is_told_in_one_sentence(project: Project, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in usage_error(project.raw("cases", *words))
    assert not project.has_results


def test_an_option_takes_the_names_that_follow_its_value_and_no_files(project: Project) -> None:
    (project.path / "disk").mkdir()
    words = ["--model", "tiny", "--collect-only", "-q", "--precision", "bf16", "fp16", "--placement", "cpu", "auto"]
    four = {f"tiny/{precision}/{placement}" for precision in ("bf16", "fp16") for placement in ("cpu", "auto")}
    for asked in (["cases", *words], [*words, "cases"], [*words, "disk", "cases"]):  # disk is a directory
        assert set(re.findall(r"\[(tiny/\S+)\]", project.raw(*asked).stdout.str())) == four
    assert "file or directory not found: nowhere" in usage_error(project.raw("cases", *words, "nowhere"))


def test_a_wrong_option_suggests_the_nearest_name(project: Project) -> None:
    assert "did you mean 'smollm2-135m'" in usage_error(project.raw("cases", "--model", "smollm2-135"))


def test_options_come_from_pyproject_too(project: Project) -> None:
    with (project.path / "pyproject.toml").open("a") as file:
        file.write('\n[tool.fitmatrix]\nmodel = "tiny"\nprecision = ["bf16", "fp16"]\nplacement = "cpu"\nnew-tokens = 4\n')
    shown = project.raw("cases", "--collect-only", "-q", "-k", "load").stdout
    shown.fnmatch_lines(["*test_load[[]tiny/bf16/cpu[]]", "*test_load[[]tiny/fp16/cpu[]]"])
    assert project.raw("cases", "--precision", "fp16", "-k", "load").ret == 0
    assert [(result.id, result.case.workload.new_tokens) for result in project.results] == [("tiny/fp16/cpu", 4)]


def test_unknown_key_in_pyproject_is_told_in_one_sentence(project: Project) -> None:
    with (project.path / "pyproject.toml").open("a") as file:
        file.write('\n[tool.fitmatrix]\nprecission = "fp32"\n')
    assert "[tool.fitmatrix]: unknown option 'precission': did you mean 'precision'?" in usage_error(project.raw("cases"))


@pytest.mark.parametrize("option", ["--results", "--html"])
def test_output_that_cannot_be_written_is_refused_before_anything_runs(project: Project, option: str) -> None:
    (project.path / "file").write_text("in the way")
    assert "file/inside" in usage_error(project.run(option, "file/inside"))
    assert not project.has_results or not project.results


def test_damaged_model_is_refused_before_anything_runs(project: Project) -> None:
    (project.path / "tiny/model.safetensors").write_bytes(b"\xff" * 16)
    assert "model.safetensors" in usage_error(project.run())
    assert not project.results


# Less memory than there is


def test_a_case_that_needs_more_than_its_ram_is_out_of_memory(project: Project) -> None:
    project.behave(fp32="hoard_and_hang")
    done = project.run("--ram", "300MiB", "--run-all")
    (result,) = project.results
    assert (result.id, result.outcome) == ("tiny/fp32/cpu@ram300MiB", Outcome.OOM)
    assert "--ram" in str(result.why)
    done.stdout.fnmatch_lines(["tiny/fp32/cpu@ram300MiB *M*out of memory*"])
    assert done.ret == 0


def test_sizes_of_a_card_that_is_not_here_are_skipped_with_one_sentence(project: Project) -> None:
    done = project.run("--vram", "6GiB", "--vram", "8GiB", "-rs", placement="direct")
    assert {result.id for result in project.results} == {"tiny/fp32/direct@vram6GiB", "tiny/fp32/direct@vram8GiB"}
    assert "no NVIDIA GPU detected" in done.stdout.str()
    assert done.ret == 0


def test_a_size_that_is_none_is_told_in_one_sentence(project: Project) -> None:
    assert "--ram: 'much' is not a size" in usage_error(project.raw("cases", "--ram", "much"))


# Held against a baseline


def baseline_of(project: Project, **changes: Any) -> str:
    """Keep the results so far as a baseline, changed in their metrics or otherwise."""
    metrics = changes.pop("metrics", {})
    kept = [msgspec.structs.replace(result, metrics=result.metrics | metrics, **changes) for result in project.results]
    (project.path / "before.jsonl").write_bytes(b"".join(encode_record(result) + b"\n" for result in kept))
    return "before.jsonl"


# Commands that are printed


def test_the_command_of_every_result_runs_the_same_case_again_when_it_is_pasted(project: Project) -> None:
    project.run("--prompt-tokens", "8", "--batch", "2", precisions="fp32 bf16")
    first = {result.case: result.command for result in project.results}
    assert len(first) == 2
    for case, command in first.items():
        assert command
        program, *words = shlex.split(command)
        assert program == "pytest"
        done = project.raw(*words, "--results", "again")
        assert done.ret == 0
        assert store.read(project.path / "again/results.jsonl")[0][-1].case == case


def test_the_proof_that_a_plan_names_can_be_pasted(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt-tokens", "8", "--new-tokens", "4", "--precision", "fp32", "--placement", "cpu"]
    assert main(["plan", "./tiny", "--ram", "64GiB", *asked]) == 0
    proof = re.search(r"To prove it: +(pytest .+)", re.sub(r"\n +", " ", capsys.readouterr().out))
    assert proof
    done = project.raw(*shlex.split(proof[1])[1:])
    assert done.ret == 0
    (case,) = {result.case for result in project.results}
    assert (case.precision, case.placement, case.workload.prompt_tokens, case.workload.new_tokens) == ("fp32", "cpu", 8, 4)


def test_nothing_is_held_against_a_baseline_without_one(project: Project) -> None:
    assert "test_baseline" not in project.run("--collect-only", "-q").stdout.str()


@pytest.mark.parametrize("text", [b"", b"\0\xff no results\n"])
def test_a_baseline_without_results_is_refused_before_anything_runs(text: bytes, project: Project) -> None:
    (project.path / "empty.jsonl").write_bytes(text)
    done = project.run("--baseline", "empty.jsonl")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "--baseline empty.jsonl: has no results to compare with; name others, or leave it out" in done.stderr.str()
    assert not (project.path / "fitmatrix-results/results.jsonl").exists()


def test_what_is_as_good_as_the_baseline_passes(project: Project) -> None:
    project.run()
    baseline = baseline_of(project, samples={})
    project.run("--baseline", baseline).assert_outcomes(passed=5)


def test_a_figure_that_fell_behind_the_baseline_fails(project: Project) -> None:
    project.run()
    baseline = baseline_of(project, samples={}, metrics={"ram_needed_bytes": 1024.0, "ram_anon_peak_bytes": 1024.0})
    done = project.run("--baseline", baseline)
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["*RAM needed *, was 1.00 KiB*"])


def test_what_worked_in_the_baseline_and_does_not_fit_any_more_fails(project: Project) -> None:
    project.run()
    baseline = baseline_of(project)
    project.behave(fp32="cuda_oom_in_load")
    done = project.run("--baseline", baseline)
    assert done.ret == 1
    assert "worked, and now oom" in done.stdout.str()


def test_a_case_that_the_baseline_lacks_is_skipped(project: Project) -> None:
    project.run()
    project.run("--baseline", baseline_of(project), precisions="bf16").assert_outcomes(passed=4, skipped=1)


def test_a_line_of_the_baseline_that_cannot_be_read_is_told_before_the_first_case(project: Project) -> None:
    project.run()
    baseline = Path(project.path) / baseline_of(project, samples={})
    whole = baseline.read_bytes()
    baseline.write_bytes(whole + b'{"schema":1,"id"\n')
    done = project.run("--baseline", baseline.name)
    done.assert_outcomes(passed=5)
    damaged = whole.count(b"\n") + 1
    done.stdout.fnmatch_lines([f"*{baseline.name}:{damaged}: not a result, set aside: *"])
    assert baseline.read_bytes().startswith(whole)


def test_a_line_of_earlier_results_that_cannot_be_read_is_told_at_the_end(project: Project) -> None:
    project.run()
    (earlier,) = Path(project.path).rglob("results.jsonl")
    with earlier.open("ab") as file:
        file.write(b'{"schema":1,"id"\n')
    damaged = earlier.read_bytes().count(b"\n")
    done = project.run()
    done.stdout.fnmatch_lines([f"*{earlier.name}:{damaged}: not a result, set aside: *", "page: *"])


def test_a_baseline_that_is_none_is_told_before_anything_runs(project: Project) -> None:
    assert "no results here" in usage_error(project.run("--baseline", "nowhere.jsonl"))
    assert not scripted.workers()


# Which tests run, and in which order


def test_all_tests_of_a_case_run_together_in_the_order_of_their_stages(project: Project) -> None:
    done = project.run("--collect-only", "-q", precisions="bf16 fp32")
    names = [line.split("::")[1] for line in done.outlines if "::" in line]
    stages = ("load", "speed", "quality", "memory")
    assert names == [f"test_{stage}[tiny/{precision}/cpu]" for precision in ("fp32", "bf16") for stage in stages]


def test_collecting_starts_nothing(project: Project) -> None:
    done = project.raw("cases", "--collect-only", "-q", "--model", "nobody/nothing")
    assert done.ret == 0
    assert not scripted.workers()
    assert not project.has_results
    done.stdout.no_fnmatch_line("*page:*")


def test_a_choice_of_tests_measures_what_they_need(project: Project) -> None:
    done = project.run("-k", "quality and bf16", precisions="fp32 bf16")
    done.assert_outcomes(passed=1, deselected=7)
    (result,) = project.results
    assert result.id == "tiny/bf16/cpu"
    assert {phase.name for phase in result.phases} == {"import", "load", "score"}


def test_other_tests_are_left_alone(project: Project) -> None:
    project.pytester.makepyfile(test_mine="def test_it():\n    pass\n")
    done = project.raw("test_mine.py")
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("*page:*")
    assert not project.has_results


def test_other_tests_keep_their_place_among_the_cases(project: Project) -> None:
    project.pytester.makepyfile(test_mine="def test_it():\n    pass\n")
    done = project.pytester.runpytest_inprocess("test_mine.py", *project.words("-k", "it or load", "-v", precisions="fp32 bf16"))
    done.stdout.fnmatch_lines(["test_mine.py::test_it PASSED*", "*test_load*fp32*PASSED*", "*test_load*bf16*PASSED*"])


def test_collection_error_ends_the_run_before_anything_is_fetched(project: Project) -> None:
    (project.path / "cases/test_broken.py").write_text("import nothing_of_this_name\n")
    done = project.run()
    assert done.ret == pytest.ExitCode.INTERRUPTED
    assert not project.has_results


def test_first_failure_can_end_the_run(project: Project) -> None:
    project.behave(fp32="bug")
    done = project.run("-x", precisions="fp32 bf16")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert project.outcomes == {"fp32": Outcome.CRASH}


# What the outcomes look like


def test_everything_works(project: Project) -> None:
    done = project.run(precisions="fp32 bf16")
    done.assert_outcomes(passed=8)
    assert done.ret == 0
    assert project.outcomes == {"fp32": Outcome.OK, "bf16": Outcome.OK}


@pytest.mark.parametrize(
    ("behavior", "letter", "counted", "outcome"),
    [
        ("bad_alloc", "M", "1 oom", Outcome.OOM),
        ("cuda_oom_in_load", "M", "1 oom", Outcome.OOM),
        ("hang_in_load", "T", "1 timeout", Outcome.TIMEOUT),
        ("import_error", "s", "4 skipped", Outcome.UNSUPPORTED),
    ],
)
def test_what_does_not_fit_is_a_finding_and_no_failure(
    project: Project, behavior: str, letter: str, counted: str, outcome: Outcome
) -> None:
    project.behave(fp32=behavior)
    done = project.run("--case-timeout", "1")
    assert done.ret == 0
    done.stdout.fnmatch_lines([f"tiny/fp32/cpu  {letter}sss  *", f"*{counted}*"])
    assert project.outcomes == {"fp32": outcome}


def test_running_out_of_memory_fails_where_the_plan_promised_that_it_fits(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST.replace("480 << 20", "16 << 30"))
    project.behave(fp32="bad_alloc")
    done = project.run()
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*out of memory during loading*; the plan predicted that it fits"])
    assert [(result.verdict.value, result.outcome) for result in project.results] == [("fits", Outcome.OOM)]


def test_what_the_plan_finds_too_big_is_not_run_unless_asked_to(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST.replace("480 << 20", "100 << 20"))
    assert project.run().ret == 0
    skipped = project.results[0]
    assert (skipped.verdict.value, skipped.outcome, skipped.stage) == ("too_big", Outcome.SKIPPED, "plan")
    assert skipped.estimate is not None
    assert skipped.why is not None
    assert skipped.why.startswith("too big for cpu: needs ")
    project.run("--run-all")
    assert project.results[1].outcome is Outcome.OK


@pytest.mark.parametrize("behavior", ["cuda_oom_in_cold", "cuda_oom_in_warm"])
def test_oom_under_way_is_told_where_it_happened(project: Project, behavior: str) -> None:
    project.behave(fp32=behavior)
    done = project.run("-W", "error")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["tiny/fp32/cpu  .Mss  *", "*1 passed, 2 skipped, 1 oom*"])


def test_lines_of_cases_stand_in_columns_and_fit_the_terminal(project: Project) -> None:
    project.behave(bf16="bad_alloc")
    done = project.run("--placement", "direct", precisions="fp32 bf16")
    lines = [line for line in done.outlines if line.startswith("tiny/")]
    assert len(lines) == 4
    done.stdout.fnmatch_lines(
        [
            "tiny/fp32/direct  ssss  *no NVIDIA GPU detected*",
            "tiny/fp32/cpu     ....  works  *  intact",
            "tiny/bf16/direct  ssss  *no NVIDIA GPU detected*",
            "tiny/bf16/cpu     Msss  out of memory*",
        ],
        consecutive=True,
    )
    assert all(len(line) <= 80 for line in lines if "works" in line)  # a verdict is never cut


def test_a_line_a_case_with_its_figures(project: Project) -> None:
    done = project.run(precisions="fp32 bf16")
    lines = [line for line in done.outlines if line.startswith("tiny/")]
    assert [line.split()[:3] for line in lines] == [["tiny/fp32/cpu", "....", "works"], ["tiny/bf16/cpu", "....", "works"]]
    for line, result in zip(lines, project.results, strict=True):
        assert format_metric("ram_needed_bytes", result.metrics["ram_needed_bytes"]) in line


def test_words_instead_of_letters(project: Project) -> None:
    project.behave(fp32="bad_alloc", bf16="hang_in_load")
    done = project.run("-v", "--case-timeout", "1", precisions="fp32 bf16")
    done.stdout.fnmatch_lines(["*test_load*fp32*OOM (out of mem*", "*test_load*bf16*TIMEOUT (loading was *"])


def test_out_of_memory_fails_the_test_when_asked_to(project: Project) -> None:
    project.behave(fp32="bad_alloc")
    done = project.run("--fail-on-oom")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*out of memory during loading: a library aborted*"])
    assert project.outcomes == {"fp32": Outcome.OOM}


@pytest.mark.parametrize("behavior", ["segfault", "killed", "bug", "exit", "nonsense", "no_tokens"])
def test_crash_fails_the_test_and_the_run_goes_on(project: Project, behavior: str) -> None:
    project.behave(fp32=behavior)
    done = project.run(precisions="fp32 bf16")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert project.outcomes == {"fp32": Outcome.CRASH, "bf16": Outcome.OK}
    why = str(project.results[0].why)
    assert sum(line == why for line in done.outlines) == 1
    assert "harness/" not in done.stdout.str()


@pytest.mark.parametrize(
    ("behavior", "test", "sentence"),
    [
        ("without_effect", "test_load", "fp32 did not take effect: 0*"),
        ("fewer_tokens", "test_speed", "assert 2 == 3"),
        ("nan", "test_quality", "NaN or infinity among the predictions"),
    ],
)
def test_a_surprise_fails_its_test_alone(project: Project, behavior: str, test: str, sentence: str) -> None:
    project.behave(fp32=behavior)
    done = project.run()
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines([f"E *{sentence}", f"FAILED cases/{test}.py::{test}[[]tiny/fp32/cpu[]]*"])
    assert project.outcomes == {"fp32": Outcome.OK}


def test_what_cannot_work_here_is_skipped_with_its_reason_and_has_a_result(project: Project) -> None:
    done = project.run("-rs", placement="direct")
    done.assert_outcomes(skipped=4)
    done.stdout.fnmatch_lines(["SKIPPED*unavailable: no NVIDIA GPU detected*"])
    assert project.outcomes == {"fp32": Outcome.SKIPPED}
    done = project.run("-rs", precisions="int4", placement="disk")
    done.stdout.fnmatch_lines(["SKIPPED*invalid: transformers leaves parts of a bitsandbytes model*"])
    assert project.outcomes["int4"] is Outcome.UNSUPPORTED


def test_run_all_runs_what_the_plan_expects_to_fail(project: Project) -> None:
    with (project.path / "conftest.py").open("a") as file:
        file.write(
            """
    from msgspec.structs import replace
    from harness.core.records import Verdict

    plan = config.stash[SESSION].plan
    config.stash[SESSION].plan = lambda case: replace(plan(case), verdict=Verdict.TOO_BIG, why="too big for cpu")
"""
        )
    project.run("-rs").stdout.fnmatch_lines(["SKIPPED*too_big: too big for cpu"])
    project.run("--run-all").assert_outcomes(passed=4)
    assert [result.outcome for result in project.results] == [Outcome.SKIPPED, Outcome.OK]


# What is left behind


@pytest.mark.parametrize("words", [(), ("-q",), ("-v",), ("-x",), ("--junit-xml", "junit.xml"), ("-p", "no:cacheprovider")])
def test_last_line_names_the_page(project: Project, words: tuple[str, ...]) -> None:
    done = project.run(*words, "-k", "load")
    assert [line for line in done.outlines if line][-1] == "page: fitmatrix-results/index.html"
    assert "tiny/fp32/cpu" in (project.path / "fitmatrix-results/index.html").read_text()


def test_results_and_page_go_where_they_are_told_to(project: Project) -> None:
    done = project.run("--results", "there", "--html", "page.html", "-k", "load")
    done.stdout.fnmatch_lines(["1 result in there/results.jsonl", "page: page.html"])
    assert (project.path / "page.html").is_file()
    assert not project.has_results


def test_later_runs_add_to_the_results(project: Project) -> None:
    project.run("-k", "load")
    project.run("-k", "load", precisions="bf16")
    assert [result.case.precision for result in project.results] == ["fp32", "bf16"]
    page = (project.path / "fitmatrix-results/index.html").read_text()
    assert "tiny/fp32/cpu" in page
    assert "tiny/bf16/cpu" in page


def test_what_pytest_writes_names_no_host(project: Project) -> None:
    project.run("--junit-xml", "junit.xml", "--benchmark-json", "benchmark.json")
    suite = next(ElementTree.parse(project.path / "junit.xml").iter("testsuite"))
    assert suite.get("hostname") == "localhost"
    assert json.loads((project.path / "benchmark.json").read_text())["machine_info"]["node"] == "localhost"


def test_junit_xml_has_reasons_and_outcomes(project: Project) -> None:
    project.behave(fp32="bad_alloc", bf16="bug")
    project.run("--junit-xml", "junit.xml", "-k", "load", precisions="fp32 bf16")
    cases = {case.get("name"): case for case in ElementTree.parse(project.path / "junit.xml").iter("testcase")}
    oom, crash = cases["test_load[tiny/fp32/cpu]"], cases["test_load[tiny/bf16/cpu]"]
    skipped = oom.find("skipped")
    assert skipped is not None
    assert str(skipped.get("message")).startswith("out of memory during loading")
    assert [one.get("value") for one in oom.iter("property")] == ["oom"]
    assert [one.get("value") for one in crash.iter("property")] == ["crash"]
    assert crash.find("error") is not None or crash.find("failure") is not None


def test_benchmark_json_has_every_case_with_its_rounds(project: Project) -> None:
    project.run("--benchmark-json", "benchmark.json", "--repeats", "4", precisions="fp32 bf16")
    found = json.loads((project.path / "benchmark.json").read_text())["benchmarks"]
    assert [one["name"] for one in found] == ["test_speed[tiny/fp32/cpu]", "test_speed[tiny/bf16/cpu]"]
    assert {one["stats"]["rounds"] for one in found} == {4}
    assert {one["group"] for one in found} == {"tiny"}
    assert all(one["extra_info"]["decode_tok_s"] > 0 for one in found)


def test_result_that_cannot_be_written_is_told_in_one_sentence(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("t")))  # where it is written instead
    with (project.path / "conftest.py").open("a") as file:
        file.write(
            """

@pytest.fixture(autouse=True)
def full(request, plan):
    from pathlib import Path
    from harness.plugin import SESSION

    request.config.stash[SESSION].store.path = Path("tiny/config.json/results.jsonl")
"""
        )
    done = project.run("-k", "load", precisions="fp32 bf16")
    assert done.ret != 0
    assert "cannot append the result of tiny/fp32/cpu" in done.stdout.str()
    assert "Traceback" not in done.stdout.str() + done.stderr.str()
    assert "harness/" not in done.stdout.str()


FULL = """

@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    import errno, os
    from harness.results import store

    append, times = store._append, iter([{times}])

    def full(descriptor, line):
        if str(os.readlink(f"/proc/self/fd/{{descriptor}}")).startswith({where}) and next(times, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(descriptor, line)

    store._append = full
"""


def fill(project: Project, times: str, where: str = "''") -> None:
    """Have the disk be full, or not, in the appends of a run, each in its turn."""
    with (project.path / "conftest.py").open("a") as file:
        file.write(FULL.format(times=times, where=where))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("times", ["True, False, False, False", "True, True, True, False", "False, False, True, False"])
def test_a_disk_that_is_full_for_a_while_loses_nothing(project: Project, times: str) -> None:
    """With the next result, or at the end of the run."""
    fill(project, times)
    done = project.pytester.runpytest_subprocess(*project.words("-k", "load", precisions="fp32 bf16 fp16"))
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert sorted(project.outcomes) == ["bf16", "fp16", "fp32"]
    assert len(project.results) == 3
    done.stdout.fnmatch_lines(
        ["*cannot append the result of tiny/fp??/cpu: the disk is full", "* could not be written at once; now all are in *"]
    )
    done.stdout.fnmatch_lines(["3 results in fitmatrix-results/results.jsonl", "page: *"])
    assert all(f"tiny/{name}/cpu" in (project.path / "fitmatrix-results/index.html").read_text() for name in project.outcomes)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_what_a_full_disk_never_took_lies_elsewhere_and_the_run_says_where(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(other))
    fill(project, ", ".join(["True"] * 99), where=f"'{project.path}/fitmatrix-results'")
    done = project.pytester.runpytest_subprocess(*project.words("-k", "load", precisions="fp32 bf16"))
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    (rescued,) = other.glob("fitmatrix-rescued-*/results.jsonl")
    assert [result.id for result in store.read(rescued)[0]] == ["tiny/fp32/cpu", "tiny/bf16/cpu"]
    assert (
        f"2 results of this run: {rescued}; make room, then: cat {rescued} >> fitmatrix-results/results.jsonl" in done.stdout.str()
    )
    assert "tiny/fp32/cpu" in (project.path / "fitmatrix-results/index.html").read_text()
    assert "0 results in" in done.stdout.str()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_what_no_disk_takes_is_named(project: Project) -> None:
    fill(project, ", ".join(["True"] * 99))
    done = project.pytester.runpytest_subprocess(*project.words("-k", "load", precisions="fp32 bf16"))
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert "so 2 results of this run are lost: tiny/fp32/cpu, tiny/bf16/cpu" in done.stdout.str()


def test_page_that_cannot_be_written_in_the_end_is_told_in_one_sentence(project: Project) -> None:
    (project.path / "cases/test_mean.py").write_text(
        "from pathlib import Path\n\n\ndef test_mean(loaded):\n    Path('page.html').mkdir()\n"
    )
    assert "page.html" in usage_error(project.run("--html", "page.html", "-k", "mean"))
    assert project.outcomes == {"fp32": Outcome.OK}


def test_no_terminal_is_needed(project: Project) -> None:
    assert project.run("-p", "no:terminal", "-k", "load").ret == 0
    assert project.outcomes == {"fp32": Outcome.OK}


# Resuming


def test_what_prepares_a_run_knows_the_live_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming settles all that cases share while it prepares, so a line that came later would never be spec."""
    prepare, seen = Session.prepare, []

    def settled(self: Session, cases: Sequence[Case], tell: Callable[[str], None]) -> None:
        prepare(self, cases, tell)
        seen.append(self.context.on_sample)

    monkeypatch.setattr(Session, "prepare", settled)
    project.run("--resume")
    assert len(seen) == 1
    assert isinstance(seen[0], LiveLine)


def test_a_resumed_run_says_what_it_kept(project: Project) -> None:
    project.behave(bf16="bad_alloc", fp16="bug")
    assert project.run(precisions="fp32 bf16 fp16").ret == pytest.ExitCode.TESTS_FAILED
    done = project.run("--resume", precisions="fp32 bf16 fp16")
    done.stdout.fnmatch_lines(
        [
            "tiny/fp32/cpu  ssss  kept from 20??-??-?? ??:?? UTC: works *",
            "tiny/bf16/cpu  Msss  kept from 20??-??-?? ??:?? UTC: out of memory*",
            "tiny/fp16/cpu  Esss  crashed: *",
            "--resume: 2 cases kept, 1 run: 1 crashed; loaded tiny/fp32/cpu once more, which others are compared with",
            "3 results in fitmatrix-results/results.jsonl",
            "page: fitmatrix-results/index.html",
        ]
    )
    assert [result.case.precision for result in project.results] == ["fp32", "bf16", "fp16", "fp16"]


def test_a_kept_case_is_skipped_with_its_date(project: Project) -> None:
    project.run()
    done = project.run("--resume", "-rs", "--junit-xml", "junit.xml")
    done.assert_outcomes(skipped=4)
    assert done.ret == 0
    done.stdout.fnmatch_lines(["SKIPPED*kept from 20??-??-?? ??:?? UTC"])
    assert 'message="kept from 20' in (project.path / "junit.xml").read_text()


@pytest.mark.parametrize("behavior", ["without_effect", "fewer_tokens", "nan"])
def test_what_failed_runs_and_fails_again(project: Project, behavior: str) -> None:
    """Else a second run of CI would be green although nothing has changed."""
    project.behave(fp32=behavior)
    project.run()
    done = project.run("--resume")
    done.assert_outcomes(passed=3, failed=1)
    (failed,) = project.results[0].failed
    done.stdout.fnmatch_lines([f"--resume: 0 cases kept, 1 run: 1 failed {failed}"])


def test_a_kept_out_of_memory_that_was_to_fit_fails_again(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST.replace("480 << 20", "16 << 30"))
    project.behave(fp32="bad_alloc")
    project.run()
    done = project.run("--resume")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["kept from *: out of memory during loading*; the plan predicted that it fits"])
    assert len(project.results) == 1


def test_a_kept_out_of_memory_fails_when_asked_to(project: Project) -> None:
    project.behave(fp32="bad_alloc")
    assert project.run().ret == 0
    assert project.run("--resume").ret == 0
    assert project.run("--resume", "--fail-on-oom").ret == pytest.ExitCode.TESTS_FAILED


def test_a_part_of_a_case_is_not_taken_for_the_whole(project: Project) -> None:
    project.run("-k", "load")
    done = project.run("--resume")
    done.assert_outcomes(passed=4)
    done.stdout.fnmatch_lines(["--resume: 0 cases kept, 1 run: 1 measured in part"])


# Processes


@pytest.mark.parametrize("words", [("-n", "2"), ("-n", "1", "--dist", "loadfile")])
def test_cases_are_not_measured_side_by_side(project: Project, words: tuple[str, ...]) -> None:
    done = project.pytester.runpytest_subprocess("-p", "xdist", *project.words(*words))
    assert "cases cannot be measured in parallel: run pytest cases/ without -n" in usage_error(done)


def test_tests_that_name_a_case_run_side_by_side(project: Project) -> None:
    names = ["other/fp32/cpu", "--case tiny/fp32/cpu"]
    project.pytester.makepyfile(f"import pytest\n\n@pytest.mark.parametrize('name', {names})\ndef test_it(name): pass\n")
    words = project.words("-n", "1")[1:]
    project.pytester.runpytest_subprocess("-p", "xdist", "--ignore=cases", *words).assert_outcomes(passed=2)
    assert not project.has_results


def test_other_tests_may_run_side_by_side(project: Project) -> None:
    project.pytester.makepyfile(test_mine="def test_it():\n    pass\n")
    done = project.pytester.runpytest_subprocess("-p", "xdist", "-n", "2", "test_mine.py")
    done.assert_outcomes(passed=1)


def test_the_parent_has_no_torch(project: Project) -> None:
    with (project.path / "conftest.py").open("a") as file:
        file.write(
            "\n\ndef pytest_unconfigure(config):\n    import sys\n    print('torch in the parent:', 'torch' in sys.modules)\n"
        )
    done = project.pytester.runpytest_subprocess(*project.words("-k", "load"))
    done.stdout.fnmatch_lines(["torch in the parent: False"])
    assert "torch is imported: False" in project.results[0].log_tail


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ((signal.SIGINT,), pytest.ExitCode.INTERRUPTED),
        ((signal.SIGINT, signal.SIGINT), pytest.ExitCode.INTERRUPTED),
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP, signal.SIGTERM), 129),
        ((signal.SIGKILL,), -9),
    ],
)
def test_a_run_that_is_ended_keeps_what_is_finished_and_leaves_nothing(
    project: Project, numbers: tuple[signal.Signals, ...], status: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What ends it in order reaches all processes of its group, as from a terminal, and the parent puts things in order."""
    project.behave(bf16="grandchild_hangs")
    scratch = tmp_path_factory.mktemp("t")  # the path of a socket must be short
    with running(project, scratch, precisions="fp32 bf16 fp16") as run:
        wait_for_hanging(scratch)
        started = psutil.Process(run.pid).children(recursive=True)
        for number in numbers:
            run.send_signal(number) if number is signal.SIGKILL else os.killpg(run.pid, number)
            time.sleep(0.1)
        output = run.communicate(timeout=60)[0]
    assert len(started) >= 3
    assert all(scripted.ends(process) for process in started)
    assert run.returncode == status
    assert project.outcomes == {"fp32": Outcome.OK}
    until_s = time.monotonic() + 60  # where it could not clear up, its fork server does, after the last process has ended
    while any(scratch.iterdir()) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert list(scratch.iterdir()) == []
    if signal.SIGKILL not in numbers:
        assert output.rstrip().splitlines()[-1] == "page: fitmatrix-results/index.html"
        assert "stopped: the same command with --resume goes on with what is missing" in output.splitlines()
        assert "tiny/fp32/cpu" in (project.path / "fitmatrix-results/index.html").read_text()
        assert "Traceback" not in output


@pytest.mark.parametrize("stage", ["load", "cold", "score"])
def test_ctrl_c_ends_a_run_in_a_few_lines_whatever_warnings_are(
    project: Project, stage: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """pytest-benchmark warns of a fixture not used once the run is interrupted, and our own settings make that an error."""
    project.behave(bf16=f"hang_in_{stage}")
    scratch = tmp_path_factory.mktemp("t")
    with running(project, scratch, "-W", "error", precisions="fp32 bf16") as run:
        wait_for_hanging(scratch)
        os.killpg(run.pid, signal.SIGINT)
        output = run.communicate(timeout=60)[0]
    after = output.partition("KeyboardInterrupt")[2]
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    assert [word for word in ("Traceback", "Benchmark fixture") if word in output] == []
    assert after.rstrip().splitlines()[-1] == "page: fitmatrix-results/index.html"
    assert len(after.splitlines()) < 16, after


def test_a_run_whose_terminal_is_closed_writes_its_page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    project.behave(bf16="hang_in_load")
    scratch = tmp_path_factory.mktemp("t")
    controller, terminal = os.openpty()
    with running(project, scratch, precisions="fp32 bf16", terminal=terminal) as run:
        os.close(terminal)
        wait_for_hanging(scratch)
        os.close(controller)
        run.send_signal(signal.SIGHUP)
        assert run.wait(60) == 129
    assert project.outcomes == {"fp32": Outcome.OK}
    assert "tiny/fp32/cpu" in (project.path / "fitmatrix-results/index.html").read_text()
    assert list(scratch.iterdir()) == []


def test_a_run_that_is_stopped_and_continued_comes_through(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The time for which it was stopped is longer than a case may take; what it works, even on a busy machine, is not."""
    project.behave(fp32="slow")
    with running(project, tmp_path_factory.mktemp("t"), "--case-timeout", "12", precisions="fp32") as run:
        time.sleep(1)
        run.send_signal(signal.SIGSTOP)
        time.sleep(14)
        run.send_signal(signal.SIGCONT)
        assert run.communicate(timeout=60)[0]
    assert run.returncode == 0
    assert project.outcomes == {"fp32": Outcome.OK}


def test_a_case_is_finished_with_its_last_test(project: Project) -> None:
    """Ctrl-C between two cases takes nothing away, nor does one that comes while the result is written."""
    (project.path / "cases/test_zzz.py").write_text(
        "import os, signal\nimport pytest\n\n\n@pytest.mark.stage(9)\ndef test_last(loaded, request):\n"
        "    from harness.plugin import SESSION\n"
        "    store = request.config.stash[SESSION].store\n"
        "    append = store.append\n"
        "    def interrupted(result):\n        os.kill(os.getpid(), signal.SIGINT)\n        append(result)\n"
        "    store.append = interrupted\n"
    )
    done = project.pytester.runpytest_subprocess(*project.words(precisions="fp32 bf16"))
    assert done.ret == pytest.ExitCode.INTERRUPTED
    assert project.outcomes == {"fp32": Outcome.OK}


def running(
    project: Project, scratch: Path, *words: str, precisions: str, terminal: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *project.words(*words, precisions=precisions)],
        cwd=project.path,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=terminal,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_hanging(scratch: Path) -> None:
    until_s = time.monotonic() + 60
    while not any("hanging" in log.read_text() for log in scratch.glob("fitmatrix-*/case-*/log")):
        assert time.monotonic() < until_s
        time.sleep(0.02)
