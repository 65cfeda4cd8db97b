"""Traced RAM against real runs.

The same ledger, with fake tensors on the CPU, against the rise of the resident memory of a process that runs the model for real:
0.9 GB of random weights in float32, a prompt whose activations are 0.1 GB and more, so that the 8 to 16 MB which libraries take for
themselves are less than 2 %. glibc gives freed blocks back at once in that process (MALLOC_MMAP_THRESHOLD_), so that what is
resident is what is alive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

from harness.core.records import Workload
from harness.worker.trace import direct, fake_model, workload
from harness.worker.trace.ledger import swapped
from tests.support.reporting import Figure, Section, table

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 96000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
GROUPED = {"num_key_value_heads": 4, "head_dim": 64}
SMALL_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
KINDS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 1024},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": GROUPED,
    "gemma2": GROUPED | {"query_pre_attn_scalar": 64, "sliding_window": 1024},
    "gemma3_text": GROUPED | {"sliding_window": 1024},
    "phi3": {"num_key_value_heads": 4, "pad_token_id": 0},
    "gpt_neox": {},
    "olmo2": {"num_key_value_heads": 4},
    "stablelm": {"num_key_value_heads": 4},
}
LOAD = Workload(prompt_tokens=4096, new_tokens=3, batch=1)
WITHIN = 0.02
CPU = torch.device("cpu")


def config(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": kind, **sizes}


def traced(kind: str) -> int:
    """Return the most that is alive in RAM, weights included."""
    asked = config(kind, SIZES | KINDS[kind])
    with swapped(fake_model, "CARD", CPU), swapped(workload, "CARD", CPU), swapped(direct, "CARD", CPU):
        (found,) = direct.trace(asked, "fp32", [LOAD])
    return found.peak_bytes


def real(kind: str) -> int:
    """Return by how much a process grows that runs the model."""
    small = TINY | {name: SMALL_GROUPED.get(name, value) for name, value in KINDS[kind].items()}
    asked = {
        "config": config(kind, SIZES | KINDS[kind]),
        "tiny": config(kind, small | {"num_key_value_heads": 2} if "num_key_value_heads" in small else small),
        "prompt_tokens": LOAD.prompt_tokens,
        "new_tokens": LOAD.new_tokens,
        "batch": LOAD.batch,
    }
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.oracle.real_run"]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, env={**os.environ, **gives_back}, check=True
    )
    return int(done.stdout)


def test_ram_is_what_real_runs_take(figures: list[Figure], section: Section, capsys: pytest.CaptureFixture[str]) -> None:
    """Hold ten architectures against themselves."""
    transformers.logging.set_verbosity_error()
    found = {kind: (traced(kind), real(kind)) for kind in KINDS}
    errors = {kind: expected / seen - 1 for kind, (expected, seen) in found.items()}
    lines = [(kind, f"{found[kind][0]:,}", f"{found[kind][1]:,}", f"{error:+.2%}") for kind, error in errors.items()]
    with capsys.disabled():
        print("\n".join(table(["architecture", "traced bytes", "real bytes", "error"], lines)))
    worst = max(map(abs, errors.values()))
    what = "peak RAM as traced against a real run: worst error of any architecture"
    figures.append(Figure(what=what, found=f"{worst:.2%}", wanted=f"{WITHIN:.0%}", rows=len(found)))
    section.notes.append("\n".join(table(["architecture", "traced bytes", "real bytes", "error"], lines)))
    assert worst <= WITHIN
