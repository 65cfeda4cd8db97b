"""`fitmatrix fleet bisect`: releases as pip lists them, environments as uv makes them, whole searches over wheels made up here."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import rich

import harness
from harness.cli.entry import build_parser, main
from harness.cli.fleet import bisect as command
from harness.core.errors import UsageError
from harness.core.options import OPTION
from harness.fleet import lease
from harness.fleet.bisect import kept, overlay
from harness.fleet.bisect.overlay import NotInstallable
from harness.fleet.bisect.releases import releases_between
from harness.fleet.bisect.search import Unmeasured
from harness.machine.scratch import sweep
from tests.support import runs
from tests.support.scripted import write_model
from tests.support.wheels import write_wheel

SOME = ("1.0", "1.1rc1", "1.1", "1.2", "2.0.dev1")
with_uv = pytest.mark.skipif(shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.defpath}") is None, reason="needs uv")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A directory with releases of a package that does nothing."""
    for version in SOME:
        write_wheel(tmp_path / "wheels", "planted", version, {"planted.py": f"VERSION = {version!r}\n"})
    return tmp_path / "wheels"


def test_releases_are_those_between_in_order_without_pre_releases(wheels: Path) -> None:
    found = releases_between("planted", "1.0", "1.2", wheels)
    assert (found.releases, found.left_out) == (("1.0", "1.1", "1.2"), ("1.1rc1",))
    assert releases_between("planted", "1.2.0", "1.0.0", wheels).releases == ("1.2", "1.1", "1.0")


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("1.0.5", "1.2", "--good 1.0.5: is no release of planted that pip installs here .* next to it are 1.0 and 1.1"),
        ("1.0", "3", "--bad 3: .* next to it is 1.2"),
        ("1.1rc1", "1.2", "pre-releases and yanked ones do not count"),
        ("1.0", "1.0.0", "are one release of planted"),
        ("new", "1.2", "--good 'new': is no version; write one such as 1.2"),
    ],
)
def test_what_is_no_release_is_one_sentence(good: str, bad: str, said: str, wheels: Path) -> None:
    with pytest.raises(UsageError, match=said):
        releases_between("planted", good, bad, wheels)


def test_a_package_that_pip_does_not_find_is_one_sentence(wheels: Path) -> None:
    with pytest.raises(UsageError, match=r"--package other: pip lists no releases of it \(ERROR: No matching distribution"):
        releases_between("other", "1", "2", wheels)
    for name in ("", "../other", "--help", "a b"):
        with pytest.raises(UsageError, match=f"--package '{name}': is no name of a package; write one such as transformers"):
            releases_between(name, "1", "2", wheels)
    with pytest.raises(UsageError, match="there is no such directory; name one with wheels of planted"):
        releases_between("planted", "1", "2", wheels / "none")


def test_uv_looks_for_packages_where_pip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By variables and files of pip, the former before the latter; what is set for uv stays."""
    for name in [one for one in os.environ if one.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://a.invalid/simple\nextra-index-url =\n  https://b.invalid/x\n  https://c.invalid/x\n"
        "find-links = one two\ntimeout = 3\n[install]\nconstraint = pins.txt\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://d.invalid/simple")
    overlay.pip_settings.cache_clear()
    found = overlay.uv_settings(overlay.pip_settings(), {"UV_FIND_LINKS": "own"})
    overlay.pip_settings.cache_clear()
    assert found["UV_DEFAULT_INDEX"] == "https://d.invalid/simple"
    assert found["UV_INDEX"] == "https://b.invalid/x https://c.invalid/x"
    assert "UV_CONSTRAINT" not in found  # which may name the very release that is not to run
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert "UV_FIND_LINKS" not in found


def test_without_uv_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UsageError, match="uv, which is not installed: pip install uv"):
        overlay.uv_program()


def only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have packages come from a directory alone: these names may be somebody's in an index."""
    monkeypatch.setattr(overlay, "pip_settings", lambda: {"no-index": "true", "find-links": str(folder)})


@with_uv
def test_uv_knows_the_variables_that_are_set_for_it() -> None:
    known = subprocess.run([overlay.uv_program(), "pip", "install", "--help"], capture_output=True, text=True, check=True).stdout
    ours = overlay.uv_settings(dict.fromkeys(overlay._SETTINGS, "x"), {})
    assert {name for name in ours if name.startswith("UV_")} <= {*re.findall(r"env:\s+`?(UV_\w+)", known)}


@with_uv
def test_an_environment_has_the_release_and_what_it_needs_anew_over_the_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is left."""
    here = tmp_path / "wheels"
    requires = ["helper>=2", "rich>=1", 'absent; python_version < "3"', 'x; extra == "y"']
    write_wheel(here, "planted", "1.0", {"planted.py": ""}, requires)
    write_wheel(here, "helper", "2.1", {"helper.py": "HERE = True\n"}, ["below"])
    write_wheel(here, "below", "0.1", {"below.py": ""})
    only(here, monkeypatch)
    ask = "import helper, below, planted, rich, harness; print(planted.__file__, rich.__file__, harness.__file__)"
    with overlay.overlay("planted", "1.0", here) as python:
        done = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=False)
        place = Path(python).parents[1]
    assert done.returncode == 0, done.stderr
    own, of_rich, of_harness = map(Path, done.stdout.split())
    assert own.is_relative_to(place)
    assert (of_rich, of_harness) == (Path(rich.__file__), Path(harness.__file__))
    assert not place.exists()


@with_uv
def test_a_release_in_the_environment_comes_before_the_one_that_runs(tmp_path: Path) -> None:
    write_wheel(tmp_path, "rich", "99.0", {"rich/__init__.py": "OURS = True\n"})
    with overlay.overlay("rich", "99.0", tmp_path) as python:
        ask = "import rich, importlib.metadata as m; print(rich.OURS, m.version('rich'))"
        done = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "99.0"]


@with_uv
def test_what_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, monkeypatch)
    write_wheel(tmp_path, "planted", "1.0", {"planted.py": ""}, ["nowhere-to-be-found>=3"])
    for release in ("1.0", "2.0"):
        said = "nowhere-to-be-found" if release == "1.0" else "planted==2.0"
        with pytest.raises(NotInstallable, match=said), overlay.overlay("planted", release, tmp_path):
            pass


CONFTEST = """
import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    import planted

    from harness.plugin import SESSION
    from tests.support import scripted

    scripted.preload()
    config.stash[SESSION].worker_main = scripted.worker(planted.BEHAVIOR)
"""
BEHAVIORS = {"1.0": "ok", "1.1": "ok", "1.2": "ok", "1.3": None, "1.4": "{bad}", "1.5": "{bad}", "1.6": "{bad}", "1.7": "{bad}"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cases/, a scripted model and wheels: with 1.3 pytest itself fails, from 1.4 on the worker aborts."""
    path = tmp_path / "machine"
    path.mkdir()
    shutil.copytree(runs.ROOT / "cases", path / "cases", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "cases/conftest.py").write_text(CONFTEST, encoding="utf-8")
    write_model(path / "tiny")
    for version, behavior in BEHAVIORS.items():
        text = "" if behavior is None else f"BEHAVIOR = {behavior.format(bad='abort')!r}\n"
        write_wheel(path / "wheels", "planted", version, {"planted.py": text})
    monkeypatch.chdir(path)
    monkeypatch.setenv(lease.LEASE, str(tmp_path / "lease"))
    return path


def words(*more: str, good: str = "1.0", bad: str = "1.7") -> list[str]:
    asked = ["fleet", "bisect", "--package", "planted", "--find-links", "wheels", "--good", good, "--bad", bad]
    return [*asked, "--case", "./tiny/bf16/cpu", "--new-tokens", "3", "--repeats", "2", *more]


@with_uv
def test_a_search_finds_the_release_keeps_all_and_goes_on_where_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(good="1.4")) == 2  # crashes there already
    assert "--good 1.4: the case does not work with it (crash: " in capsys.readouterr().err
    assert main(words(bad="1.2")) == 1
    assert "changed from 1.0 to 1.2 by the gate's rule" in capsys.readouterr().out
    assert main(words("--figure", "ram_needed_bytes", bad="1.2")) == 1
    assert "by the gate's rule" in capsys.readouterr().out
    kept_before = {path: path.read_bytes() for path in place.glob("fitmatrix-bisect/planted-*/results.jsonl")}
    assert {path.parent.name for path in kept_before} == {"planted-1.0", "planted-1.2", "planted-1.4"}
    assert main(words("--json")) == 1
    shown = capsys.readouterr()
    answer = json.loads(shown.out)["answer"]
    assert (answer["figure"], answer["last_good"], answer["first_bad"], answer["between"]) == ("end", "1.2", "1.4", ["1.3"])
    assert [(one["release"], one["side"]) for one in answer["tried"]] == [
        ("1.0", "good"), ("1.2", "good"), ("1.3", "skipped"), ("1.4", "bad"), ("1.7", "bad"),
    ]  # fmt: skip
    assert "pytest brought no result of it" in answer["tried"][2]["why"]
    assert "about 3 steps" in shown.err
    assert {path: path.read_bytes() for path in kept_before} == kept_before  # nothing that was there was measured again
    assert main(words()) == 1
    shown_text = " ".join(capsys.readouterr().out.split())
    assert "changed after planted 1.2 and no later than with 1.4; the releases between were skipped" in shown_text
    assert "1.3 was skipped: pytest brought no result of it: " in shown_text
    assert main(words("--batch", "2")) == 2
    assert "fitmatrix-bisect has a bisect of --model" in capsys.readouterr().err


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files, in which sockets have room for their paths."""
    with tempfile.TemporaryDirectory(prefix="fb-") as folder:
        yield Path(folder)


def running_in(place: Path) -> list[list[str]]:
    """Return the commands of the processes whose directory is in a folder."""
    found = [one for one in psutil.process_iter(["cwd", "cmdline"]) if one.pid != os.getpid()]
    return [one.info["cmdline"] for one in found if Path(one.info["cwd"] or "/").is_relative_to(place)]


@with_uv
def test_ctrl_c_keeps_what_was_measured_and_leaves_nothing_running(place: Path, short: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "TMPDIR": str(short)}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *words()], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (place / "fitmatrix-bisect/planted-1.0/results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped; what was measured is kept, and the same command goes on from there" in err
    assert "no end was measured yet" in out
    deadline = time.monotonic() + 30
    while (left := running_in(place) + running_in(short)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    sweep(short)  # as the next run does: a folder whose removal was interrupted is nobody's
    assert not [one for one in short.iterdir() if one.name.startswith("fitmatrix-")]
    assert (place / "fitmatrix-bisect/planted-1.0/results.jsonl").read_bytes().count(b"\n") == 1


def question(**changes: object) -> kept.BisectQuestion:
    given: dict[str, object] = {"package": "planted", "words": ("--model", "a"), "versions": {"torch": "2.13.0"}}
    return kept.BisectQuestion(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"package": "other"}, "has a bisect of planted; name another directory with --results"),
        ({"words": ("--model", "b")}, "has a bisect of --model a; name"),
        ({"versions": {"torch": "2.14.0"}}, "has results with torch 2.13.0, and here is 2.14.0; name"),
    ],
)
def test_results_of_another_question_are_not_taken(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    kept.Measurements(question(), tmp_path, {})
    kept.Measurements(question(), tmp_path, {})
    with pytest.raises(UsageError, match=said):
        kept.Measurements(question(**changes), tmp_path, {})
    (tmp_path / kept.QUESTION).write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="is no bisect of this version"):
        kept.Measurements(question(), tmp_path, {})


def test_a_run_that_had_another_release_does_not_count(tmp_path: Path) -> None:
    from harness.core.records import encode_record
    from tests.support import builders

    place = tmp_path / "planted-1.0"
    place.mkdir()
    (place / "results.jsonl").write_bytes(encode_record(builders.result(environment={"planted": "1.4"})) + b"\n")
    with pytest.raises(Unmeasured, match=r"the run had planted 1\.4: something on its path comes first"):
        kept.Measurements(question(), tmp_path, {}).measure("1.0", 0)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["--case", "org/name/bf16/cpu"], ["--model", "org/name", "--precision", "bf16", "--placement", "cpu"]),
        (["--case", "int8/direct", "--model", "m"], ["--model", "m", "--precision", "int8", "--placement", "direct"]),
        (["--case", "bf16/cpu"], ["--precision", "bf16", "--placement", "cpu"]),
        (
            ["--case", "m/bf16/gpu+cpu@kv-fp8@eager@vram8GiB@ram16GiB", "--batch", "4", "--run-all"],
            [
                "--model", "m", "--precision", "bf16", "--placement", "gpu+cpu", "--kv", "fp8", "--attention", "eager",
                "--vram", "8GiB", "--ram", "16GiB", "--batch", "4", "--run-all",
            ],
        ),
    ],
)  # fmt: skip
def test_a_case_is_run_by_the_options_of_its_id(asked: Sequence[str], found: Sequence[str]) -> None:
    assert list(command._words(_given(asked))) == found


def test_a_case_of_two_models_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="names a model, and --model b too"):
        list(command._words(_given(["--case", "a/bf16/cpu", "--model", "b"])))
    with pytest.raises(UsageError, match="one case is of one model"):
        list(command._words(_given(["--case", "bf16/cpu", "--model", "a", "--model", "b"])))


def _given(asked: Sequence[str]) -> argparse.Namespace:
    return build_parser().parse_args(["fleet", "bisect", "--package", "p", "--good", "1", "--bad", "2", *asked])


def test_the_options_of_a_case_are_those_of_a_run() -> None:
    assert set(command.OF_THE_CASE) <= OPTION.keys()
