"""Runs over a cluster of Ray with scripted workers: a folder with test files and models, and `fitmatrix fleet` in processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from harness.core.units import GIB
from tests.support import runs
from tests.support.scripted import write_model

_CONFTEST = """
import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    from harness.plugin import SESSION
    from tests.support import scripted

    scripted.preload()
    config.stash[SESSION].worker_main = scripted.by_model
"""
FAST = ("--placement", "cpu", "--new-tokens", "3", "--repeats", "2")


def folder(path: Path, models: Sequence[str], machines: Sequence[str], **behaviors: str) -> Path:
    """Make a folder with cases/, models, and a fleet file with one class, which this machine is of."""
    path.mkdir(parents=True)
    shutil.copytree(runs.ROOT / "cases", path / "cases", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "cases/conftest.py").write_text(_CONFTEST, encoding="utf-8")
    for model in models:
        write_model(path / model, **behaviors)
    names = ", ".join(f'"{name}"' for name in machines)
    ram = psutil.virtual_memory().total / GIB
    (path / "fleet.toml").write_text(f'[class.here]\nram = "{ram:.2f}GiB"\nmachines = [{names}]\n', encoding="utf-8")
    return path


def environment(path: Path) -> dict[str, str]:
    """Return the environment of programs in a folder: a lease for each node, temporary files of its own."""
    (path / "tmp").mkdir(exist_ok=True)
    own = {"PYTHONPATH": str(runs.ROOT), "FITMATRIX_LEASE": str(path / "{node}.lease"), "TMPDIR": str(path / "tmp")}
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return kept | own | {"RAY_TMPDIR": tempfile.gettempdir()}  # sockets have short paths


_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def token(mode: str) -> dict[str, str]:
    """Return the variables of who has the token of a cluster, or of one that knows none."""
    return {"RAY_AUTH_MODE": mode} | ({"RAY_AUTH_TOKEN": "a" * 64} if mode == "token" else {})


@contextmanager
def cluster(path: Path, mode: str) -> Iterator[str]:
    """Lend the address of a cluster of a head alone, which wants a token or does not; it ends with its use."""
    own = {"RAY_TMPDIR": str(path), "HOME": str(path), "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        env={**os.environ, **own, **token(mode)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if re.fullmatch(r"[\w.]+:\d+\s*", line))
    finally:
        process.communicate("")


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    """Start `fitmatrix fleet` in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "fleet", *words],
        cwd=path,
        env=environment(path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    """Return how a program ended and all that it said."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out + err


def plan(path: Path, models: Sequence[str], precisions: Sequence[str], *words: str) -> None:
    """Plan a fleet over models of the folder."""
    named = [part for model in models for part in ("--model", str(path / model))]
    status, said = finish(start(path, "plan", *named, "--precision", *precisions, *FAST, *words))
    assert status == 0, said
