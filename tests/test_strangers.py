"""Models of strangers in real runs: their code runs only when allowed, their pickles never, and what they print stays private."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli.entry import main
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Outcome, Result, Verdict
from harness.core.text import visible
from harness.measure.protocol import Load
from harness.planning.code import Destination, loading_code
from harness.results import store
from harness.worker import model as work
from tests.support import strangers

ROOT = Path(__file__).parent.parent
ON_CPU = [name for name, row in PLACEMENTS.items() if not row.needs_gpu and not row.parallel and not row.prints_map]
TOKEN = "hf_" + "PlantedTokenOfATest" * 2
SHORT = ("--precision", "fp32", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--calibrate", "never")

# Prints whatever it can find out; a model that says so in its config fails with it as well.
NOSY = """
import os, socket, getpass, tempfile
told = [os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir(), socket.gethostname(), str(config._name_or_path), __file__]
told += [f"{name}={value}" for name, value in os.environ.items()]
for line in told:
    print(line)
print("\\x1b]0;owned\\x07\\x1b[2J\\u202eevil")
if getattr(config, "fails", False):
    raise ValueError("; ".join(told))
"""


# Pickles


@pytest.mark.parametrize("placement", ON_CPU)
def test_no_loading_code_runs_a_pickle(placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker executes, with our own reader of pickles left out of the way."""
    canary = tmp_path / "ran"
    folder = strangers.save_pickle(tmp_path / "model", canary)
    monkeypatch.chdir(tmp_path)
    limits = {"cpu": 150_000} if PLACEMENTS[placement].limits else None
    code = loading_code(PRECISIONS["fp32"], PLACEMENTS[placement], "float32", Destination(max_memory=limits))
    with pytest.raises(Exception, match=r"[Ww]eights.only|pytorch_model\.bin"):
        work.load(Load(model=str(folder), code=code, tokenizer=False), lambda _: contextlib.nullcontext())
    assert not canary.exists()
    strangers.runs_when_unpickled(folder / "pytorch_model.bin", canary)


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_no_command_runs_a_pickle(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = tmp_path / "ran"
    folder = strangers.save_pickle(tmp_path / "model", canary)
    assert main([command, str(folder)]) == 2
    assert "which is code and not weights; nothing was executed" in capsys.readouterr().err
    assert not canary.exists()


# Real runs

Environment = dict[str, str]


def measure(folder: Path, environment: Environment, *arguments: str) -> tuple[list[Result], subprocess.CompletedProcess[str]]:
    """Run pytest on the cases; return the results and what it printed."""
    command = [sys.executable, "-m", "pytest", "cases", "--results", str(folder / "results"), *SHORT, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    file = folder / "results" / store.NAME
    return (store.read(file)[0] if file.is_file() else []), done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def environment(place: Path) -> Environment:
    """Somebody's environment, with things to find in it."""
    made = {
        "USER": "trillian",
        "HOME": str(place / "of/trillian"),
        "TMPDIR": str(place / "t"),
        "HF_HOME": str(place / "hf"),
        "HF_TOKEN": TOKEN,
        "DEPLOY_KEY": "sesame-open-7",
        "PROJECT": "operation overlord 7",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("HOME", "TMPDIR", "HF_HOME"):
        Path(made[name]).mkdir(parents=True)
    return made


@pytest.fixture(scope="module")
def canary(place: Path) -> Path:
    return place / "ran"


@pytest.fixture(scope="module")
def models(environment: Environment, canary: Path) -> list[str]:
    """A model with code of its own, below the home; and the same failing."""
    home = Path(environment["HOME"])
    works = strangers.save_with_code(home / "own", canary, NOSY)
    shutil.copytree(works, home / "trillian-fails")
    strangers.change(home / "trillian-fails/config.json", {"fails": True})
    return [str(works), str(home / "trillian-fails")]


def test_code_does_not_run_unless_allowed(place: Path, environment: Environment, models: list[str], canary: Path) -> None:
    results, done = measure(place / "no", environment, "--model", models[0], "--placement", "cpu", "--placement", "dispatch")
    assert done.returncode == 0, done.stdout
    assert [(result.verdict, result.outcome, result.stage) for result in results] == [
        (Verdict.INVALID, Outcome.UNSUPPORTED, "plan")
    ] * 2
    for result in results:
        assert result.why is not None
        assert result.why.startswith("config.json asks for code of the model's own, 'modeling_own.OwnConfig'")
        assert "--trust-remote-code" in result.why
        assert result.remote_code == []
    assert not canary.exists()


@pytest.fixture(scope="module")
def allowed(
    place: Path, environment: Environment, models: list[str]
) -> tuple[list[Result], subprocess.CompletedProcess[str], dict[str, str]]:
    """Results of both models with their code allowed, what was printed, and what is to publish."""
    arguments = [word for model in models for word in ("--model", model)]
    placements = [word for name in ON_CPU for word in ("--placement", name)]
    results, done = measure(place / "yes", environment, *arguments, *placements, "--trust-remote-code")
    files = {name: (place / "yes/results" / name).read_text(encoding="utf-8") for name in (store.NAME, "index.html")}
    return results, done, files


def test_allowed_code_runs_and_is_named(
    allowed: tuple[list[Result], subprocess.CompletedProcess[str], dict[str, str]], canary: Path
) -> None:
    results, done, files = allowed
    assert canary.exists(), done.stdout
    works = [result for result in results if result.case.model == "own"]
    assert [result.case.placement for result in works] == ON_CPU
    for result in works:
        assert result.outcome is Outcome.OK, result.why
        assert result.remote_code == ["modeling_own.OwnConfig (config.json)", "modeling_own.OwnForCausalLM (config.json)"]
        assert result.loaded is not None
        assert result.loaded.model_class == "OwnForCausalLM"
        assert str(result.code).count("trust_remote_code=True") == (2 if result.case.placement == "dispatch" else 1)
        assert "--trust-remote-code" in str(result.command)
    assert "Remote code that ran" in files["index.html"]
    assert "modeling_own.OwnForCausalLM (config.json)" in files["index.html"]


def test_results_to_publish_tell_nothing(
    allowed: tuple[list[Result], subprocess.CompletedProcess[str], dict[str, str]], place: Path, environment: Environment
) -> None:
    results, _, files = allowed
    fails = [result for result in results if result.case.model == "<user>-fails"]
    assert fails
    for result in fails:
        assert result.outcome is Outcome.CRASH
        assert "loading failed: ValueError" in str(result.why)
    # It did print: the names are there, the values are not.
    assert all("HF_TOKEN=<$HF_TOKEN>" in result.log_tail for result in results)
    private = [TOKEN, TOKEN[:12], "trillian", "sesame-open", "overlord", str(place), environment["HOME"]]
    private += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    for text in files.values():
        assert [told for told in private if told in text] == []


def test_what_a_model_prints_stays_text(
    allowed: tuple[list[Result], subprocess.CompletedProcess[str], dict[str, str]],
) -> None:
    results, done, files = allowed
    assert any("\u202e" in result.log_tail for result in results), "it did print it"
    assert "‹U+202E›evil" in files["index.html"]
    for text in (done.stdout, files["index.html"]):
        assert visible(text) == text


def test_a_pickle_in_place_of_weights_ends_the_run_before_anything_is_loaded(place: Path, environment: Environment) -> None:
    folder = strangers.save_pickle(place / "pickled", place / "pickle-ran")
    results, done = measure(place / "pickle", environment, "--model", str(folder), "--placement", "cpu")
    assert (results, done.returncode) == ([], 4)
    assert "which is code and not weights; nothing was executed" in done.stderr + done.stdout
    assert not (place / "pickle-ran").exists()


def test_a_pickle_beside_good_weights_runs_in_no_placement(place: Path, environment: Environment) -> None:
    """accelerate prefers pytorch_model.bin to model.safetensors, which is what transformers reads and what we looked at."""
    folder = strangers.add_pickle(strangers.save_llama(place / "beside"), place / "beside-ran")
    placements = [word for name in ON_CPU for word in ("--placement", name)]
    results, _ = measure(place / "besides", environment, "--model", str(folder), *placements)
    assert [result.case.placement for result in results] == ON_CPU
    assert not (place / "beside-ran").exists()
    by_name = {result.case.placement: result.outcome for result in results}
    assert by_name.pop("dispatch") is not Outcome.OK
    assert set(by_name.values()) == {Outcome.OK}
