"""A run calibrates once when it has nothing to calibrate by, says so, and can be asked not to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harness.core.records import Makeup
from harness.planning.calibrating import kept_calibration
from harness.planning.calibrating.evidence import Observation
from harness.run import forkserver
from harness.run.options import Options
from harness.run.session import CaseSubset, Session, may_calibrate
from tests.support import builders, small_models

MACHINE = builders.machine()
TOKEN = Observation(result="one", case="bf16", figure="token_s", measured=0.2, makeup=Makeup(whole=0.1, parts={"load_s": 0.1}))
FIRST = "Measuring this machine once, for about a minute; --calibrate never leaves it out."


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says; measuring takes no time here, and the cache is empty."""

    def keeps() -> str:
        kept_calibration.keep_evidence(MACHINE, [TOKEN])
        return ""

    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_calibration, "_measure", keeps)
    return []


def test_what_is_measured_once_is_kept(said: list[str]) -> None:
    for _ in range(2):
        kept_calibration.calibrate_once(MACHINE, said.append)
    assert said == [FIRST]
    kept = kept_calibration.kept_evidence(MACHINE)
    assert kept is not None
    assert kept.observations == (TOKEN,)


def test_what_fails_ends_no_run_and_is_not_tried_in_each(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_calibration, "_measure", lambda: "nothing works here")
    for _ in range(2):
        kept_calibration.calibrate_once(MACHINE, said.append)
    assert said == [FIRST, "Not calibrated: nothing works here"]
    note = kept_calibration.corrected((), MACHINE).note
    assert note is not None
    assert note.startswith("Not calibrated on 20")
    assert note.endswith(": nothing works here; fitmatrix calibrate measures again")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('kept')", ""),
        ("import sys; print('one\\nfitmatrix: no room left\\n', file=sys.stderr); sys.exit(2)", "no room left"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "it took longer than 1 s"),
    ],
)
def test_the_process_that_measures_says_why_it_could_not(program: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = list[list[str]](), subprocess.run

    def ran(command: list[str], **how: Any) -> Any:
        asked.append(command)
        return run([sys.executable, "-c", program], **how)

    monkeypatch.setattr(kept_calibration, "_LIMIT_S", 1.0)
    monkeypatch.setattr(subprocess, "run", ran)
    assert kept_calibration._measure() == why
    assert asked == [[sys.executable, "-m", "harness", "calibrate", "--measure"]]


def test_a_damaged_file_is_left_alone(said: list[str]) -> None:
    kept_calibration.kept_file().parent.mkdir()
    kept_calibration.kept_file().write_text("{", encoding="utf-8")
    kept_calibration.calibrate_once(MACHINE, said.append)
    assert said == []
    assert kept_calibration.kept_file().read_text(encoding="utf-8") == "{"


@pytest.mark.parametrize(
    ("given", "may"),
    [
        ({}, True),
        ({"calibrate": "never"}, False),
        ({"resume": True}, False),
        ({"case_timeout": "60"}, False),
        ({"case_timeout": "600"}, True),
    ],
)
def test_which_runs_measure_first(given: dict[str, Any], may: bool) -> None:
    assert may_calibrate(Options(given=given)) == may


@pytest.mark.parametrize("part", [False, True])
def test_a_run_plans_by_what_it_has_just_measured_and_a_shard_does_not_measure(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: bool
) -> None:
    small_models.save("llama", tmp_path / "tiny")
    monkeypatch.setattr(forkserver, "warm_up", lambda _: None)
    given = {"model": [str(tmp_path / "tiny")], "precision": ["bf16"], "placement": ["cpu"], "results": tmp_path / "results"}
    asked = Session(Options(given=given)).cases()
    session = Session(Options(given=given), CaseSubset(cases=frozenset(asked), since="") if part else None)

    def keeps() -> str:
        name = "cpu_s_per_operation"
        slow = [replace(TOKEN, case=f"{number}", makeup=Makeup(whole=0.1, parts={name: 0.09})) for number in range(4)]
        kept_calibration.keep_evidence(session.machine, slow)
        return ""

    monkeypatch.setattr(kept_calibration, "_measure", keeps)
    try:
        session.prepare(asked, said.append)
        planned = session.plan(asked[0]).estimate
    finally:
        session.close()
    assert planned is not None
    assert bool(said) != part
    assert bool(planned.corrections) != part
