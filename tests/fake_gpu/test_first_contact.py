"""The first contact (tests/gpu) on a card that is not there, as far as that carries: it is not red for a reason of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import small_models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is lent as it lies in libc10.so")

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
# Kernels, libcuda and speeds are those of a real card alone.
_CASES = "bf16 and (direct or gpu+cpu) and (loads_where or vram_is or answers or allocated)"
CHOSEN = f"torch_can_use or both_see or card_is_known or ({_CASES})"


def test_what_a_fake_card_carries_is_green_and_reported(tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "tiny", num_hidden_layers=6, vocab_size=512, hidden_size=64, intermediate_size=172)
    env = {
        **os.environ,
        "FAKE_CARDS": "8",
        "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
        "FIRST_CONTACT": str(tmp_path / "contact"),
        "FIRST_CONTACT_MODEL": str(tmp_path / "tiny"),
        "FIRST_CONTACT_OPTIONS": "--repeats 1 --prompt-tokens 16 --new-tokens 4",
    }
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider", "-k", CHOSEN]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    text = (tmp_path / "contact/report.md").read_text(encoding="utf-8")
    assert "First contact: A100" in text
    assert "| `bf16/direct` | allocated |" in text
    assert "| `bf16/gpu+cpu` | allocated |" in text
    assert "2 cases in " in text
    assert "**no**" not in "".join(line for line in text.splitlines() if "allocated" in line)
    assert "first contact" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1, skipped  # an A100 of 8 GiB is in no table
    assert "gpus.json" in skipped[0]
