"""The workflows: pinned, with least rights, closed to strangers' code, and calling commands of ours that exist.

Whether they are workflows at all, the lint environment asks check-jsonschema.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from harness.cli.entry import build_parser
from harness.core.records import Outcome, encode_record
from harness.results import store
from tests.support import builders
from tests.support.builders import GOLDEN, loaded, result

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github/workflows").iterdir())
PINNED = re.compile(r"[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
HOSTED = re.compile(r"ubuntu-\d\d\.\d\d")
OURS = ("fitmatrix", "pytest", "tox")
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")
SAME_REPOSITORY = "github.event.pull_request.head.repo.full_name == github.repository"


class Step(NamedTuple):
    """A step of a job and where it stands."""

    workflow: str
    job: str
    name: str
    plain: dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Read a workflow; YAML 1.1 takes its key `on` for true."""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in plain.items()}


WORKFLOWS = {path.name: read(path) for path in FILES}
JOBS = [(name, job, plain) for name, workflow in WORKFLOWS.items() for job, plain in workflow["jobs"].items()]
STEPS = [
    Step(name, job, step.get("name", step.get("uses", "")), step) for name, job, plain in JOBS for step in plain.get("steps", ())
]
RUNS = [step for step in STEPS if "run" in step.plain]


def ids(step: Step) -> str:
    return f"{step.workflow}-{step.job}-{step.name}"


def test_they_are_the_four_of_the_documentation() -> None:
    assert list(WORKFLOWS) == ["intake.yml", "matrix.yml", "publish.yml", "tests.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit_and_names_its_version(path: Path) -> None:
    used = re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    for action in used:
        assert PINNED.fullmatch(action) or (ROOT / action).is_file(), action
    assert used


def test_an_action_is_pinned_to_one_version_everywhere() -> None:
    pins = {action for path in FILES for action in re.findall(r"uses: (.+@.+)", path.read_text(encoding="utf-8"))}
    assert len({action.partition("@")[0] for action in pins}) == len(pins)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_none_until_a_job_asks_for_them(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {}
    assert WORKFLOWS[name]["concurrency"]["group"]
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["permissions"]
        writes = {right for right, level in job["permissions"].items() if level == "write"}
        assert writes <= {"pages", "id-token"}
        assert "uses" in job or isinstance(job["timeout-minutes"], int)


def test_only_the_job_that_deploys_may_write_and_it_runs_no_code_of_ours() -> None:
    for name, job, plain in JOBS:
        if "write" in plain["permissions"].values() and "steps" in plain:
            assert (name, job) == ("publish.yml", "deploy")
            assert not [step for step in plain["steps"] if "run" in step]


def test_nothing_of_an_event_is_pasted_into_a_script() -> None:
    assert len(RUNS) > 5
    assert not [ids(step) for step in RUNS if "${{" in step.plain["run"]]


def test_a_checkout_leaves_no_token_behind() -> None:
    checkouts = [step for step in STEPS if step.plain.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step.plain["with"]["persist-credentials"] is False for step in checkouts)


def test_no_workflow_runs_with_the_rights_of_main_on_what_a_stranger_sent() -> None:
    for workflow in WORKFLOWS.values():
        assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(workflow["on"])


def test_runners_of_one_s_own_run_no_code_of_forks() -> None:
    own = [(name, plain) for name, _, plain in JOBS if "runs-on" in plain and not HOSTED.fullmatch(str(plain["runs-on"]))]
    assert [name for name, _ in own] == ["matrix.yml"]
    for name, plain in own:
        for job in (plain, WORKFLOWS[name]["jobs"][plain["needs"]]):
            condition = " ".join(job["if"].split())
            assert condition.startswith("github.event_name != 'pull_request' || ")
            assert SAME_REPOSITORY in condition
            assert "always()" not in condition


def test_secrets_reach_only_the_step_that_measures() -> None:
    holding = [step.name for step in STEPS if "secrets." in json.dumps(step.plain)]
    assert holding == ["Measure"]
    assert all("secrets" not in json.dumps({key: value for key, value in plain.items() if key != "steps"}) for _, _, plain in JOBS)


# The scripts, run for real with programs that only note what they were called with


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A folder of programs that note their arguments in a file, and nothing of the real ones."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (*OURS, "pip", "gh"):
        program = programs / name
        program.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            f"with pathlib.Path({str(tmp_path / 'calls')!r}).open('a') as file:\n"
            "    print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def run(step: Step, folder: Path, **environment: str) -> list[list[str]]:
    """Run the script of a step as a runner would, and return what it called."""
    shell = step.plain.get("shell", "bash")
    command = {"bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[shell]
    given = dict.fromkeys(step.plain.get("env", {}), "") | environment
    files = {name: str(folder / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_PATH", "RUNNER_TEMP")}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*command, step.plain["run"]], cwd=folder, env={**os.environ, **files, **given, "PATH": path}, check=True)
    noted = folder / "calls"
    return [json.loads(line) for line in noted.read_text(encoding="utf-8").splitlines()] if noted.exists() else []


def step_of(workflow: str, name: str) -> Step:
    return next(step for step in STEPS if (step.workflow, step.name) == (workflow, name))


@pytest.mark.parametrize("step", [step for step in RUNS if re.search(rf"\b({'|'.join(OURS)})\b", step.plain["run"])], ids=ids)
def test_every_command_of_ours_exists_and_takes_its_options(step: Step, calls: Path) -> None:
    for folder in ("results", "baseline"):
        (calls / folder).mkdir()
        (calls / folder / store.NAME).write_bytes(GOLDEN.read_bytes())
    noted = run(step, calls, MODEL="smollm2-135m", WEIGHTS="synthetic", PRECISION="bf16 int4", VRAM="8GiB 12GiB")
    ours = [call for call in noted if call[0] in OURS]
    assert ours
    for program, *arguments in ours:
        if program == "fitmatrix":
            build_parser().parse_args(arguments)
        elif program == "tox":
            assert {f"testenv:{name}" for name in arguments[arguments.index("-e") + 1].split(",")} <= set(TOX)


def measured(calls: Path, **environment: str) -> list[str]:
    (call,) = run(step_of("matrix.yml", "Measure"), calls, **({"MODEL": "smollm2-135m", "WEIGHTS": "real"} | environment))
    assert call[0] == "pytest"
    return call[1:]


def test_pytest_takes_what_the_matrix_asks_for(calls: Path) -> None:
    (calls / "baseline").mkdir()
    (calls / "baseline" / store.NAME).write_bytes(GOLDEN.read_bytes())
    arguments = measured(calls, PRECISION="bf16 int4", VRAM="8GiB 12GiB")
    assert [word for word in arguments if word.startswith(("--precision", "--vram", "--baseline"))] == [
        "--precision=bf16", "--precision=int4", "--vram=8GiB", "--vram=12GiB", "--baseline=baseline",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for word in arguments[1:]:
        assert re.search(rf"{word.partition('=')[0]}[= ]", done.stdout), word


def test_what_was_not_asked_for_is_no_option(calls: Path) -> None:
    assert measured(calls) == [
        "cases/", "--model=smollm2-135m", "--weights=real", "--results=results", "--html=results/index.html",
        "--junit-xml=results/junit.xml",
    ]  # fmt: skip


def test_an_input_is_one_word_and_never_a_command(calls: Path) -> None:
    evil = "--x; touch pwned $(touch pwned) `touch pwned` *"
    arguments = measured(calls, MODEL=evil, PRECISION="$(touch pwned) *", VRAM="`touch pwned`")
    assert f"--model={evil}" in arguments
    assert "--precision=*" in arguments
    assert not (calls / "pwned").exists()


def test_the_lists_become_json_on_one_line_and_names_that_artifacts_may_have(calls: Path) -> None:
    run(step_of("matrix.yml", "Read the lists"), calls, LABELS="self-hosted, gpu", MODELS="chatglm-6b Qwen/Qwen2.5-0.5B\nx=y")
    found = dict(line.split("=", 1) for line in (calls / "GITHUB_OUTPUT").read_text(encoding="utf-8").splitlines())
    assert json.loads(found["labels"]) == ["self-hosted", "gpu"]
    assert json.loads(found["models"]) == [
        {"model": "chatglm-6b", "name": "chatglm-6b"},
        {"model": "Qwen/Qwen2.5-0.5B", "name": "Qwen-Qwen2.5-0.5B"},
        {"model": "x=y", "name": "x-y"},
    ]
    assert len(found) == 2


def test_the_published_results_are_those_of_main_and_of_nobody_s_pull_request(calls: Path) -> None:
    """gh takes a fork's branch that is called main for ours: only the event tells them apart."""
    for step, events in (
        (step_of("matrix.yml", "Find the last good night of main"), ["schedule"]),
        (step_of("publish.yml", "Fetch the results of earlier runs"), ["schedule", "workflow_dispatch"]),
    ):
        (calls / "calls").unlink(missing_ok=True)
        lists = run(step, calls)
        assert [call[:7] for call in lists] == [["gh", "run", "list", "--workflow", "matrix.yml", "--branch", "main"]] * len(events)
        assert [call[call.index("--event") + 1] for call in lists] == events


@pytest.mark.parametrize(
    ("cards", "tiers", "passes"),
    [(1, {"gpu:0": 5, "cpu": 5}, True), (1, {"cpu": 5, "gpu:0": 0}, False), (0, {"cpu": 5}, True), (None, {"cpu": 5}, True)],
)
def test_a_runner_whose_gpu_nothing_ran_on_fails(calls: Path, cards: int | None, tiers: dict[str, int], passes: bool) -> None:
    """`cards` is None without nvidia-smi."""
    without = builders.machine()
    said = result(machine=msgspec.structs.replace(without, gpu_problem="torch is for the CPU only"), loaded=loaded(tiers=tiers))
    (calls / "results").mkdir()
    (calls / "results" / store.NAME).write_bytes(
        encode_record(said) + b"\n" + encode_record(result(outcome=Outcome.SKIPPED)) + b"\n"
    )
    if cards is not None:
        (calls / "bin/nvidia-smi").write_text("#!/bin/sh\n" + "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'\n" * cards)
        (calls / "bin/nvidia-smi").chmod(0o755)
    with contextlib.nullcontext() if passes else pytest.raises(subprocess.CalledProcessError):
        run(step_of("matrix.yml", "See that the GPU was measured"), calls)


def test_a_label_of_another_name_starts_nothing_and_ends_nothing() -> None:
    other = "github.event.action == 'labeled' && github.event.label.name != 'matrix'"
    assert other in WORKFLOWS["matrix.yml"]["concurrency"]["group"]
    assert (
        "(github.event.action != 'labeled' || github.event.label.name == 'matrix')"
        in WORKFLOWS["matrix.yml"]["jobs"]["choose"]["if"]
    )
