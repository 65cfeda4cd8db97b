"""The home of the tests: empty at first, gone at last, and the user's is left alone (`conftest.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import harness
from harness.machine import bandwidth
from harness.machine.cache import cache_dir

ROOT = Path(harness.__file__).parents[1]
# Says where things would be kept, and keeps something there.
LOOKS = """
import os
from pathlib import Path
import pytest
from huggingface_hub import constants
from harness.machine.cache import cache_dir

@pytest.mark.parametrize("turn", range(4))
def test_looks(turn):
    for place in (cache_dir(), Path(constants.HF_HOME), Path.home() / ".config/pip"):
        place.mkdir(parents=True, exist_ok=True)
        (place / f"left-{turn}").touch()
    Path(f"seen-{turn}").write_text(f"{Path.home()} {cache_dir()} {constants.HF_HOME} {os.environ.get('PIP_CONFIG_FILE')}")
"""


def test_these_very_tests_run_in_it(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("caches") == "user":
        pytest.skip("--caches=user was asked for")
    home = Path.home()
    assert home.name.startswith("fitmatrix-tests-")
    assert cache_dir() == home / ".cache/fitmatrix"
    assert bandwidth._cache_file().parent == cache_dir()
    assert not [name for name in os.environ if name.startswith(("FITMATRIX_", "HF_H", "XDG_"))]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, where each place holds something, and variables that lead there."""
    home = tmp_path / "user"
    for place in ("cache", "hub", ".config/pip", "xdg"):
        (home / place).mkdir(parents=True)
    (home / ".config/pip/pip.conf").touch()
    monkeypatch.setenv("HOME", str(home))
    for name, place in (("FITMATRIX_CACHE", "cache"), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "xdg")):
        monkeypatch.setenv(name, str(home / place))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return home


def looked(pytester: pytest.Pytester, *words: str) -> set[tuple[str, ...]]:
    """Run four tests in a pytest of their own, under the conftest of these; return what they saw."""
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(LOOKS)
    done = pytester.runpytest_subprocess("-q", *words)
    done.assert_outcomes(passed=4)
    return {tuple(path.read_text(encoding="utf-8").split()) for path in pytester.path.glob("seen-*")}


@pytest.mark.parametrize("words", [(), ("-n", "2"), ("-p", "no:cacheprovider")], ids=" ".join)
def test_the_user_s_is_neither_read_nor_written(pytester: pytest.Pytester, user: Path, words: tuple[str, ...]) -> None:
    before = sorted(user.rglob("*"))
    ((home, cache, hub, settings),) = looked(pytester, *words)
    assert {cache, hub} == {f"{home}/.cache/fitmatrix", f"{home}/.cache/huggingface"}
    assert settings == str(user / ".config/pip/pip.conf")
    assert sorted(user.rglob("*")) == before
    assert not Path(home).exists()


def test_a_run_that_measures_asks_for_the_user_s(pytester: pytest.Pytester, user: Path) -> None:
    ((home, cache, hub, _),) = looked(pytester, "--caches=user")
    assert (home, cache, hub) == (str(user), str(user / "cache"), str(user / "hub"))
    assert (user / "hub/left-3").exists()
