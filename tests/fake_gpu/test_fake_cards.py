"""`pytest cases/` on cards that are not there: the libraries' own code places, counts and computes, on tiny models, with values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.records import Result
from harness.results import store
from tests.support import small_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is lent as it lies in libc10.so")

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
SHORT = ("--precision", "bf16", "--repeats", "1", "--prompt-tokens", "16", "--new-tokens", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    small_models.save("llama", folder, num_hidden_layers=6, vocab_size=512, hidden_size=64, intermediate_size=172)
    return folder


def run(cards: str, model: Path, results: Path, *words: str, room: int | None = None) -> dict[str, Result]:
    """Run cases on cards such as "2x8", two of 8 GiB, and return their results by placement."""
    path = os.pathsep.join([str(SITE), str(ROOT)])
    env = {**os.environ, "FAKE_CARDS": cards, "PYTHONPATH": path, **({"FAKE_ROOM": str(room)} if room else {})}
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--model", str(model), "--results", str(results), *SHORT, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    assert (results / store.NAME).exists(), done.stdout + done.stderr
    found, problems = store.Store(results).read()
    assert not problems
    return {result.case.placement: result for result in found}
