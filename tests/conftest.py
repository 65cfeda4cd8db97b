"""What all tests share: an empty home of their own, and signals as a terminal leaves them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from harness.architecture import ask_worker
from tests.support import asked

# Tests run beside each other, and threads that spin while they wait take the cores from those that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing is timed in a test: a busy neighbor makes any example slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# What leads to caches and settings of the user beside HOME.
_LEADS = ("FITMATRIX_", "HF_", "HUGGINGFACE_", "TORCH_HOME", "XDG_")
# How a question is asked outside of tests.
_STARTS = ask_worker._run
_GIVEN: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the runs that measure this machine use what was measured, made and downloaded before."""
    parser.addoption(
        "--caches", choices=("own", "user"), default="own", help="run in an empty home (own) or in the user's (default own)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Move into an empty home before any module looks for its cache; processes that are started inherit it."""
    config.stash[_GIVEN] = {name: value for name, value in os.environ.items() if name.startswith(_LEADS)}
    started_in_it = hasattr(config, "workerinput")  # by xdist
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # else pytest-benchmark takes every run that a test starts for one of xdist
    if config.getoption("caches", "own") == "user" or started_in_it:
        return
    if wanted := next((path for path in _pip_settings() if path.is_file()), None):
        os.environ.setdefault("PIP_CONFIG_FILE", str(wanted))  # the index that the default model comes from
    for name in config.stash[_GIVEN]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="fitmatrix-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["HOME"] = str(home)
    if hasattr(config, "cache"):  # the default model takes half a minute to make, and is hashed before it is used
        (home / ".cache/fitmatrix").mkdir(parents=True)
        (home / ".cache/fitmatrix/models").symlink_to(config.cache.mkdir("models"))


def _pip_settings() -> Iterator[Path]:
    """Yield where pip looks for the user's own settings, which go by HOME."""
    yield Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "pip/pip.conf"
    yield Path("~/.pip/pip.conf").expanduser()


@pytest.fixture(scope="session")
def given(pytestconfig: pytest.Config) -> dict[str, str]:
    """What the shell said of caches and settings, for tests that need what lies there."""
    return pytestconfig.stash[_GIVEN]


@pytest.fixture(scope="session", autouse=True)
def _signals_as_a_terminal_leaves_them() -> Iterator[None]:
    """Hear signals again that whoever started pytest ignores: a script in the background, or nohup. Children inherit that."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def _asked_of_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a process that has imported transformers fork for each question to it, which else imports it again.

    For the whole session: fixtures of modules ask as well, and a test that undoes its own changes does not undo this.
    """
    with asked.answering(tmp_path_factory.mktemp("asked")) as answer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_worker, "_run", answer)
        yield


@pytest.fixture(autouse=True)
def _workers_of_their_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a process for each question where a test says that it asks so."""
    if request.node.get_closest_marker("starts_workers") is not None:
        monkeypatch.setattr(ask_worker, "_run", _STARTS)
