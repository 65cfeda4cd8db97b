"""The test files that a fleet or a bisect runs elsewhere"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.fleet.case_files import read_case_files
from harness.fleet import shards
from harness.fleet.contract import CONTRACT
from tests.support.fleets import contract
from tests.support.spoken import saying

ROOT = Path(__file__).parents[2]


def test_they_are_those_of_the_clone() -> None:
    found = read_case_files(ROOT / "cases")
    assert found.keys() == {path.name for path in (ROOT / "cases").glob("*.py")}
    assert all(text == (ROOT / "cases" / name).read_text() for name, text in found.items())


@pytest.mark.parametrize("words", ["fleet run contract.json", "fleet bisect --package p --good 1 --bad 2 --case m/bf16/cpu"])
def test_without_any_it_says_where_they_are(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cut = contract()
    shards.write_issued(tmp_path / CONTRACT, made, cut)
    monkeypatch.chdir(tmp_path)
    said = "fitmatrix: --cases {}: has no test files; name the directory cases/ of a clone"
    status, out, err = saying(capsys, *words.split())("--cases", tmp_path)
    assert (status, out, " ".join(err.split())) == (2, "", said.format(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fleet run missing.json", "missing.json: there is no contract here; fitmatrix fleet plan writes them"),
        (
            "fleet bisect --package p --good 1 --bad 2 --case m/bf17/cpu",
            "no case 'm/bf17/cpu': unknown precision 'bf17': did you mean 'bf16'?",
        ),
    ],
)
def test_a_mistake_in_what_was_typed_is_told_before_the_files_that_were_not(
    words: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a clone there is no cases/."""
    monkeypatch.chdir(tmp_path)
    status, out, err = saying(capsys, *words.split())()
    assert (status, out) == (2, "")
    assert said in " ".join(err.split())
    assert "--cases" not in err
