"""A run calibrates once when it has nothing to calibrate by, says so, and can be asked not to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UsageError
from harness.core.records import Makeup
from harness.planning.calibrating import kept_calibration, kernel_times
from harness.planning.calibrating.evidence import Observation
from harness.run import forkserver
from harness.run.options import Options
from harness.run.session import CaseSubset, Session, may_calibrate
from tests.support import builders, small_models

MACHINE = builders.machine()
TIMED = Observation(result="timed", case="bf16", figure="product_s", measured=0.2, makeup=Makeup(whole=0.1, parts={"load_s": 0.1}))


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says; products take no time here, and the cache is empty."""
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_times, "time_products", lambda _: [TIMED])
    monkeypatch.setattr(kept_calibration, "with_bandwidths", lambda machine, _: machine)
    return []


def test_what_is_timed_once_is_kept(said: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert kept_calibration.calibrate_once(MACHINE, tmp_path, said.append) == MACHINE
    assert said == ["Measuring this processor once, for 60 s at most; --calibrate never leaves it out."]
    kept = kept_calibration.kept_evidence(MACHINE)
    assert kept is not None
    assert kept.observations == (TIMED,)


def test_what_fails_ends_no_run(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> list[Observation]:
        raise UsageError("products were not timed: transformers did not answer in 60 s")

    monkeypatch.setattr(kernel_times, "time_products", fails)
    for _ in range(2):
        kept_calibration.calibrate_once(MACHINE, tmp_path, said.append)
    why = "products were not timed: transformers did not answer in 60 s"
    assert said[1:] == [f"Not calibrated: {why}"]  # once: what takes a minute and fails is not tried in every run
    note = kept_calibration.corrected((), MACHINE).note
    assert note is not None
    assert note.startswith("Not calibrated on 20")
    assert note.endswith(f": {why}; fitmatrix calibrate measures again")


def test_a_damaged_file_is_left_alone(said: list[str], tmp_path: Path) -> None:
    kept_calibration.kept_file().parent.mkdir()
    kept_calibration.kept_file().write_text("{", encoding="utf-8")
    kept_calibration.calibrate_once(MACHINE, tmp_path, said.append)
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
    try:
        session.prepare(asked, said.append)
    finally:
        session.close()
    assert bool(said) != part
    assert (kept_calibration.kept_evidence(session.machine) is None) == part
