"""`fitmatrix calibrate`: what results of this machine say is kept, shown, used by plans, and forgotten again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import msgspec
import pytest

from harness.cli import calibrate
from harness.cli.entry import main
from harness.cli.plan_args import constants, earlier_results
from harness.core.errors import UsageError
from harness.core.quantizers import UNPACKINGS
from harness.core.records import Case, Machine, Outcome, Result, Tier
from harness.machine import accelerators, probe
from harness.planning.calibrating import evidence, kept_calibration, packed_times
from harness.planning.calibration import default
from harness.results import store
from harness.run import min_ram
from harness.run.session import Session
from tests.planning.test_calibration import TOKEN, estimate
from tests.support import builders, small_models

NAME = "cpu_s_per_operation"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return accelerators.usable(probe.probe(), ask=False)


def ran(machine: Machine, times: float, number: int = 0, changes: Mapping[str, object] = MappingProxyType({})) -> Result:
    """A case that took `times` as long as the package says."""
    case = builders.case(model=f"model{number}")
    metrics = {"token_p50_s": TOKEN.whole * times}
    made = builders.result(case, metrics=metrics, estimate=estimate({"token_s": TOKEN}), machine=machine)
    return msgspec.structs.replace(made, **changes)


def write(directory: Path, *results: Result) -> Path:
    kept = store.Store(directory)
    kept.prepare()
    for result in results:
        kept.append(result)
    return directory


def factor(machine: Machine) -> float:
    return constants(earlier_results(None), machine)[NAME].best / default()[NAME].best


def test_what_it_keeps_corrects_plans_from_then_on(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results", *(ran(here, 2.0, number) for number in range(4)))
    assert factor(here) == 1.0
    assert main(["calibrate", str(results)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{NAME} 2.6" in out
    assert "of the package 1.05e-05; 4 results, 4 cases" in out
    assert "4 results, 4 figures" in out
    assert "were off by 100 % or more" in out
    assert factor(here) > 1.5
    assert main(["hardware"]) == 0
    assert "by 4 results of this machine: cpu_s_per_operation" in " ".join(capsys.readouterr().out.split())


def test_results_that_are_kept_and_lie_in_the_directory_count_once(here: Machine, tmp_path: Path) -> None:
    results = write(tmp_path / "fitmatrix-results", ran(here, 2.0))
    assert main(["calibrate"]) == 0
    both, kept = constants(earlier_results(results), here), kept_calibration.corrected((), here)
    assert both == kept
    assert both.fitted[NAME].results == 1


def test_a_second_time_adds_to_the_first(here: Machine, tmp_path: Path) -> None:
    for number in range(2):
        assert main(["calibrate", str(write(tmp_path / str(number), ran(here, 2.0, number)))]) == 0
    assert constants(earlier_results(None), here).fitted[NAME].results == 2


def test_a_dry_run_shows_and_keeps_nothing(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results", ran(here, 2.0))
    assert main(["calibrate", "--dry-run", str(results / "results.jsonl")]) == 0
    assert "Nothing was kept" in capsys.readouterr().out
    assert not kept_calibration.kept_file().exists()


def test_as_json(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results", ran(here, 2.0))
    assert main(["calibrate", "--json", str(results)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["kept"], found["figures"]) == (1, True, 1)
    assert found["constants"][NAME]["package"]["best"] == default()[NAME].best
    assert found["median_error_before"] == pytest.approx(1.0)
    assert found["median_error_after"] < 0.2


def test_reset_forgets_this_machine_and_no_other(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = msgspec.structs.replace(here, cpu="another processor")
    kept_calibration.keep_evidence(other, evidence.observations([ran(other, 3.0)], default().digest))
    assert main(["calibrate", str(write(tmp_path / "results", ran(here, 2.0)))]) == 0
    assert main(["calibrate", "--reset"]) == 0
    assert factor(here) == 1.0
    assert factor(other) > 1.5
    assert main(["calibrate", "--reset"]) == 0
    assert "Nothing was kept" in capsys.readouterr().out


def test_a_damaged_file_is_said_and_does_not_count(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = kept_calibration.kept_file()
    place.parent.mkdir(parents=True)
    place.write_text('{"schema": 1, "machines": [', encoding="utf-8")
    assert factor(here) == 1.0
    note = constants(earlier_results(None), here).note
    assert note is not None
    assert "cannot be read" in note
    assert "fitmatrix calibrate --reset removes it" in note
    assert main(["calibrate", str(write(tmp_path / "results", ran(here, 2.0)))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["calibrate", "--reset"]) == 0
    assert constants(earlier_results(None), here).note is None


def test_what_was_kept_for_other_constants_is_said_and_does_not_count(here: Machine) -> None:
    kept = kept_calibration.keep_evidence(here, evidence.observations([ran(here, 2.0)], default().digest))
    old = msgspec.structs.replace(kept, digest="0123abcd")
    kept_calibration._write(kept_calibration._File(machines=(old,)))
    assert factor(here) == 1.0
    assert "was for an earlier fitmatrix and does not count: fitmatrix calibrate makes a new one" in (
        constants(earlier_results(None), here).note or ""
    )


def test_what_was_kept_with_another_torch_counts_and_says_so(here: Machine) -> None:
    kept = kept_calibration.keep_evidence(here, evidence.observations([ran(here, 2.0)], default().digest))
    assert kept.versions["torch"] == version("torch")
    assert "calibrate again" not in (constants(earlier_results(None), here).note or "")
    old = msgspec.structs.replace(kept, versions={"torch": "2.1.0"})
    kept_calibration._write(kept_calibration._File(machines=(old,)))
    assert factor(here) > 1.5
    assert f"with torch 2.1.0 (now {version('torch')}): calibrate again" in (constants(earlier_results(None), here).note or "")


@pytest.mark.parametrize(("measured", "whole"), [(0.0, 0.1), (0.1, 0.0), (-1.0, 0.1), (1e300, 1e-300)])
def test_a_figure_that_cannot_be_one_corrects_nothing(here: Machine, measured: float, whole: float) -> None:
    (kept,) = evidence.observations([ran(here, 2.0)], default().digest)
    makeup = msgspec.structs.replace(TOKEN, whole=whole)
    kept_calibration.keep_evidence(here, [msgspec.structs.replace(kept, measured=measured, makeup=makeup)])
    assert factor(here) == 1.0


ELSEWHERE = builders.machine(Tier(name="gpu:0", kind="gpu", model="another card"))


@pytest.mark.parametrize(
    ("machine", "changes", "why"),
    [
        (ELSEWHERE, {}, "of 1 result none is of this machine"),
        (None, {"outcome": Outcome.OOM}, "none of 1 result ran to its end"),
        (None, {"estimate": None}, "none of 1 result was estimated by this version"),
        (None, {"metrics": {}}, "what ran was under a limit on RAM, or lay elsewhere"),
    ],
)
def test_nothing_to_calibrate_by_is_one_sentence(
    here: Machine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    machine: Machine | None,
    changes: dict[str, object],
    why: str,
) -> None:
    results = write(tmp_path / "results", ran(machine or here, 2.0, changes=changes))
    assert main(["calibrate", str(results)]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert "pytest cases/ --model MODEL" in said
    assert said.count("\n") == 1


def test_contradicting_results_are_named(here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [*(ran(here, 1.0, number) for number in range(5)), ran(here, 9.0, 5)]
    assert main(["calibrate", str(write(tmp_path / "results", *results))]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of little weight: 1 of 6 figures: model5" in out


def test_without_results_a_small_model_is_measured(
    here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real: a case in a process of its own, and no more once the minute is over."""
    small_models.save("llama", tmp_path / "tiny")
    monkeypatch.setattr(calibrate, "MODEL", str(tmp_path / "tiny"))
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(packed_times, "LAYER_SHAPES", ((256, 64),))
    assert main(["calibrate", "--json"]) == 0
    told = capsys.readouterr()
    assert "measuring 1 of 5: tiny/bf16/cpu" in told.err
    assert "left out, for the minute is over: tiny/int4/cpu, tiny/int8/cpu, tiny/fp32/cpu, tiny/fp16/cpu" in told.err
    assert "layers whose weights are stored packed" in told.err
    assert json.loads(told.out)["figures"] > 0
    kept = kept_calibration.kept_evidence(here)
    assert kept is not None
    assert kept.results == 1
    timed = [one for one in kept.observations if one.figure == packed_times.FIGURE]
    assert {one.case.partition(" ")[0] for one in timed} <= UNPACKINGS.keys()
    assert not list(tmp_path.glob("fitmatrix-results*"))


def test_all_precisions_are_measured_where_there_is_time(
    here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_models.save("llama", tmp_path / "tiny")
    monkeypatch.setattr(calibrate, "MODEL", str(tmp_path / "tiny"))
    write(tmp_path / "fitmatrix-results", ran(here, 9.0))  # which --measure leaves alone
    seen: list[str] = []

    def measure(_: Session, case: Case) -> Result:
        seen.append(case.precision)
        result = ran(here, 2.0, len(seen))
        return msgspec.structs.replace(result, case=msgspec.structs.replace(result.case, precision=case.precision))

    def fails(_: Machine) -> NoReturn:
        raise UsageError("packed layers were not timed: no room")

    monkeypatch.setattr(min_ram, "measure", measure)
    monkeypatch.setattr(packed_times, "time_packed", fails)
    assert main(["calibrate", "--measure"]) == 0  # the cases say enough without them
    assert seen == ["bf16", "int4", "int8", "fp32", "fp16"]
    told = capsys.readouterr()
    assert "5 results" in told.out
    assert "packed layers were not timed: no room" in told.err


@pytest.mark.parametrize("words", [["--reset", "results"], ["--reset", "--dry-run"], ["--reset", "--measure"], ["missing"]])
def test_a_wrong_request_is_one_sentence(here: Machine, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert here.tiers
    assert main(["calibrate", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
