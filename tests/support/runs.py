"""Real runs: of `pytest cases/` in a folder of its own, with scripted workers and small models written by hand; of one case."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.run import worker_process
from harness.run.case_result import RunContext
from tests.support import builders
from tests.support.scripted import ends, workers, write_model

ROOT = Path(__file__).parents[2]
_PYPROJECT = """
[tool.pytest.ini_options]
addopts = ["-p", "pytest_benchmark.plugin"]
markers = ["stage(n): the order of the tests of one case"]
"""
_PLUGIN = """
pytest_plugins = ["harness.plugin"]
"""
_SCRIPTED = """
import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    from harness.plugin import SESSION
    from tests.support import builders, scripted

    scripted.preload()
    config.stash[SESSION].worker_main = scripted.by_model
    config.stash[SESSION].machine = builders.machine()
"""


def folder(path: Path, models: Sequence[str], conftest: str = "", *, scripted: bool = True) -> Path:
    """Make a folder with cases/, models written by hand, and a conftest.py that takes the plugin; workers may be real."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "cases", path / "cases", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "pyproject.toml").write_text(_PYPROJECT, encoding="utf-8")
    (path / "conftest.py").write_text(_PLUGIN + (_SCRIPTED if scripted else "") + conftest, encoding="utf-8")
    for model in models:
        write_model(path / model)
    return path


def start(
    path: Path, models: Sequence[str], *words: str, env: dict[str, str] | None = None, session: bool = False
) -> subprocess.Popen[str]:
    """Start a run of these models, bf16 on the processor unless `words` say otherwise, two rounds of three tokens.

    `session`: as the first of a session of its own, as a terminal starts it.
    """
    named = [part for model in models for part in ("--model", f"./{model}")]
    fast = ("--precision", "bf16", "--placement", "cpu", "--new-tokens", "3", "--repeats", "2", "--case-timeout", "60")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "cases", *named, *fast, *words],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=session,
        text=True,
    )


@contextlib.contextmanager
def context(scratch: Path, timeout_s: float) -> Iterator[RunContext]:
    """A context for cases in real workers, of which nothing is left at the end: no process, and no file in `scratch`."""
    scratch.mkdir()
    yield RunContext(
        run="a run",
        machine=builders.machine(),
        environment={},
        scratch=scratch,
        worker_main=worker_process.torch_worker,
        timeout_s=timeout_s,
    )
    assert all(ends(one) for one in workers())
    assert not list(scratch.iterdir())
