"""A GGUF that stays in its blocks on a card, with the kernels that transformers fetches from the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.records import Outcome
from harness.results import store
from tests.support.gguf_files import write_lfm2

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def test_blocks_stay_as_they_are(tmp_path: Path) -> None:
    """Unverified: it needs a card, the package kernels and the hub."""
    pytest.importorskip("kernels")
    model, results = write_lfm2(tmp_path / "tiny.gguf"), tmp_path / "results"
    options = ["--model", str(model), "--precision", "gguf", "--placement", "direct", "--results", str(results)]
    done = subprocess.run([sys.executable, "-m", "pytest", "cases", "-q", *options], cwd=ROOT, capture_output=True, text=True)
    found, _ = store.Store(results).read()
    assert found, done.stdout + done.stderr
    assert found[0].outcome is Outcome.OK, found[0].why
    assert set(found[0].checks.values()) == {"ok"}
