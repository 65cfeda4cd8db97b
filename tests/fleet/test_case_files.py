"""The test files that a fleet or a bisect runs elsewhere"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.fleet.case_files import read_case_files
from tests.support.spoken import saying

ROOT = Path(__file__).parents[2]


def test_they_are_those_of_the_clone() -> None:
    found = read_case_files(ROOT / "cases")
    assert found.keys() == {path.name for path in (ROOT / "cases").glob("*.py")}
    assert all(text == (ROOT / "cases" / name).read_text() for name, text in found.items())


@pytest.mark.parametrize("words", ["fleet run contract.json", "fleet bisect --package p --good 1 --bad 2 --case m/bf16/cpu"])
def test_without_any_it_says_where_they_are(words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = "fitmatrix: --cases {}: has no test files; name the directory cases/ of a clone"
    status, out, err = saying(capsys, *words.split())("--cases", tmp_path)
    assert (status, out, " ".join(err.split())) == (2, "", said.format(tmp_path))
