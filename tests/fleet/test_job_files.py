"""Job files from shards: bash and sbatch's options for Slurm, a workflow that GitHub's own schema takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.cli.entry import build_parser
from harness.core.errors import UsageError
from harness.fleet import job_files, shards
from harness.fleet.contract import Contract
from tests.support.fleets import contract, machine_class
from tests.test_workflows import PINNED, WORKFLOWS

CARD = machine_class(
    "rtx3060", machines=("lab-1", "lab-2"), runs_on=("self-hosted", "rtx3060"), sbatch=("--partition=gpu", "--gres=gpu:1")
)
FOLDER = Path("our: fleet #1")  # YAML and the shell both have an opinion on it


@pytest.fixture
def made() -> Contract:
    """A contract over two classes, one of which has two shards."""
    return contract(CARD, machine_class(runs_on=("ubuntu-24.04",)), models=("a", "b"))[0]


def directives(text: str) -> list[str]:
    """Return the options of sbatch as Slurm reads them: lines before the first command, split as a shell would."""
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[end:] if line.startswith("#SBATCH")]
    return [word for line in lines[:end] if line.startswith("#SBATCH ") for word in shlex.split(line.removeprefix("#SBATCH "))]


def test_an_array_has_a_task_for_each_shard_and_the_options_of_its_class(made: Contract) -> None:
    name, text = job_files.slurm(made, "rtx3060", FOLDER)
    assert name == "fleet-rtx3060.sbatch"
    assert text.startswith("#!/bin/bash\n")
    assert directives(text) == [
        "--job-name=fitmatrix-rtx3060", "--array=0-1", "--time=32", "--exclusive", "--output=fitmatrix-rtx3060-%A_%a.log",
        "--partition=gpu", "--gres=gpu:1",
    ]  # fmt: skip


@pytest.mark.parametrize(("task", "shard"), [("0", "rtx3060-1"), ("1", "rtx3060-2")])
def test_a_task_runs_its_shard(made: Contract, tmp_path: Path, task: str, shard: str) -> None:
    """Run by bash, with a pytest that only tells what it was called with."""
    _, text = job_files.slurm(made, "rtx3060", FOLDER)
    (tmp_path / "job").write_text(text, encoding="utf-8")
    program = tmp_path / "pytest"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$FITMATRIX_MACHINE" "${OMP_NUM_THREADS-none}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": task, "SLURMD_NODENAME": "node7", "OMP_NUM_THREADS": "1"}
    assert subprocess.run(["bash", "-n", tmp_path / "job"], check=False).returncode == 0
    told = subprocess.run(["bash", tmp_path / "job"], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[:2] == ["node7", "none"]
    assert told[2:] == [
        "cases/", "--shard", f"{FOLDER}/shards/{shard}.json", "--results", f"{FOLDER}/results/{shard}", "--resume",
    ]  # fmt: skip


def test_a_job_without_its_array_measures_nothing(made: Contract, tmp_path: Path) -> None:
    """As when the file is run by hand: it would measure the first shard, which a task of the array measures as well."""
    (tmp_path / "job").write_text(job_files.slurm(made, "rtx3060", FOLDER)[1], encoding="utf-8")
    program = tmp_path / "pytest"
    program.write_text("#!/bin/bash\necho measured\n", encoding="utf-8")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURMD_NODENAME": "node7"}
    done = subprocess.run(["bash", tmp_path / "job"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["rm -rf /", "--partition=gpu\nrm -rf /"])
def test_what_is_no_option_of_sbatch_is_refused(option: str) -> None:
    made, _ = contract(machine_class(sbatch=(option,)))
    with pytest.raises(UsageError, match="is no option of sbatch, such as --partition=gpu"):
        job_files.slurm(made, "small", FOLDER)


def test_only_what_was_handed_out_last_is_emitted(made: Contract) -> None:
    again, _ = shards.issue(made, [one.key for one in made.terms.cases if one.machine_class == "rtx3060"][:1])
    assert "shards=(rtx3060-1-try2)" in job_files.slurm(again, "rtx3060", FOLDER)[1]
    assert "shards=(small-1)" in job_files.slurm(again, "small", FOLDER)[1]


def test_a_task_has_the_time_of_the_longest_shard_in_whole_minutes() -> None:
    made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b", "c"), case_timeout_s=50.0)
    assert [shard.deadline_s for shard in cut] == [2000.0, 1900.0]
    assert "--time=34" in directives(job_files.slurm(made, "small", FOLDER)[1])  # 33.3 minutes


@pytest.mark.parametrize("write", [job_files.slurm, lambda made, _, folder: job_files.github(made, folder, "3.12")])
def test_a_class_without_cases_has_no_job(write: Callable[[Contract, str, Path], object]) -> None:
    made, _ = contract(machine_class(runs_on=("x",)), precisions=())
    with pytest.raises(UsageError, match="no shard of class small was handed out: its precisions and placements name no case"):
        write(made, "small", FOLDER)


def workflow(made: Contract) -> tuple[str, dict[str, Any]]:
    text = job_files.github(made, FOLDER, "3.12")
    return text, yaml.safe_load(text)


def test_github_s_schema_takes_the_workflow(made: Contract, tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    path = tmp_path / "fleet.yml"
    path.write_text(workflow(made)[0], encoding="utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    path.write_text(workflow(made)[0].replace("runs-on: ubuntu", "runs_on: ubuntu"), encoding="utf-8")
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 1  # it does look


def test_each_shard_is_a_job_on_runners_of_its_class(made: Contract) -> None:
    _, plain = workflow(made)
    assert plain["jobs"]["measure"]["strategy"]["matrix"]["include"] == [
        {"shard": "rtx3060-1", "labels": ["self-hosted", "rtx3060"], "minutes": 32},
        {"shard": "rtx3060-2", "labels": ["self-hosted", "rtx3060"], "minutes": 32},
        {"shard": "small-1", "labels": ["ubuntu-24.04"], "minutes": 34},
    ]


def test_the_workflow_is_as_careful_as_our_own(made: Contract) -> None:
    """Pinned to the same commits, without rights, and nothing of an event in a script."""
    text, plain = workflow(made)
    used = re.findall(r"uses: (.+)", text)
    ours = {
        step["uses"]
        for flow in WORKFLOWS.values()
        for job in flow["jobs"].values()
        for step in job.get("steps", ())
        if "uses" in step
    }
    assert all(PINNED.fullmatch(action) and action.partition(" ")[0] in ours for action in used)
    assert plain["permissions"] == {}
    steps = [step for job in plain["jobs"].values() for step in job["steps"]]
    assert not [step for step in steps if "${{" in step.get("run", "")]
    assert all(step["with"]["persist-credentials"] is False for step in steps if "checkout" in step.get("uses", ""))


def test_what_one_shard_does_stops_no_other_and_all_is_collected(made: Contract) -> None:
    jobs = workflow(made)[1]["jobs"]
    measure, collect = jobs["measure"], jobs["collect"]
    assert measure["strategy"]["fail-fast"] is False
    assert measure["timeout-minutes"] == "${{ matrix.minutes }}"
    assert (collect["needs"], collect["if"]) == ("measure", "always()")
    uploads = [step for job in (measure, collect) for step in job["steps"] if "upload" in step.get("uses", "")]
    assert [step["if"] for step in uploads] == ["always()", "always()"]
    (step,) = [step for step in measure["steps"] if step.get("name") == "Measure"]
    assert step["env"] == {"SHARD": "${{ matrix.shard }}", "FITMATRIX_MACHINE": "${{ runner.name }}"}


def test_the_workflow_installs_what_was_agreed_on() -> None:
    """Of no build for a device, by the Python of the contract, in an environment that an earlier job has left nothing in."""
    versions = {"torch": "2.13.0+cpu", "fitmatrix": "0.1.0", "python": "3.11.7", "transformers": "5.24.0"}
    made, _ = contract(machine_class(runs_on=("x",)), versions=versions)
    jobs = workflow(made)[1]["jobs"]
    (install,) = [step["run"].splitlines() for step in jobs["measure"]["steps"] if step.get("name") == "Install"]
    assert install[0] == 'python -m venv --clear "$RUNNER_TEMP/venv"'
    assert install[-1].endswith("install . torch==2.13.0 transformers==5.24.0")
    pythons = [step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "setup-python" in str(step)]
    assert pythons == ["3.11.7", "3.11.7"]
    assert "3.12" in {
        step["with"]["python-version"]
        for job in workflow(contract(machine_class(runs_on=("x",)))[0])[1]["jobs"].values()
        for step in job["steps"]
        if "setup-python" in str(step)
    }


def test_the_steps_are_what_a_user_would_type(made: Contract) -> None:
    steps = {step.get("name"): step["run"] for job in workflow(made)[1]["jobs"].values() for step in job["steps"] if "run" in step}
    measure = ["pytest", "cases/", "--shard", f"{FOLDER}/shards/$SHARD.json", "--results", "results/$SHARD"]
    assert shlex.split(steps["Measure"]) == measure
    command = shlex.split(steps["Collect"])
    assert command == ["fitmatrix", "fleet", "collect", f"{FOLDER}/contract.json", "receipts", "--to", "results"]
    assert build_parser().parse_args(command[1:]).to == Path("results")


def test_a_class_without_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="class small has no labels of runners"):
        job_files.github(contract()[0], FOLDER, "3.12")
