"""Trace every text model type of the installed transformers that has a causal language model, from a small config of its own.

    pytest -s -o python_files=oracle_*.py tests/oracle

Nothing here knows an architecture: sizes that a config's own defaults give are made small by the names that configs share.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.core.records import Workload
from harness.worker.trace.direct import trace
from tests.support.reporting import Figure, Section, table

LEAST_SHARE = 0.95
LOAD = Workload(prompt_tokens=33, new_tokens=3, batch=2)
FEW_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def small(kind: str) -> dict[str, Any]:
    """Return the default config of a model type with few layers; what a config lists by layer is cut alike."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    said: dict[str, Any] = config.to_dict()
    inner = [part for part in said.values() if isinstance(part, dict) and "hidden_size" in part]
    inside = inner[0] if inner and text is not config else said
    for name, value in list(inside.items()):
        if name in FEW_LAYERS and isinstance(value, int):
            inside[name] = min(value, 4)
        elif isinstance(value, list) and len(value) == count and count > 4:
            inside[name] = value[:4]
    return said


def kinds() -> Iterator[str]:
    """Yield the model types that have a causal language model: text in, text out."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in CONFIG_MAPPING and not getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False):
            yield kind


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"


def test_nearly_every_text_architecture_is_traced(capsys: pytest.CaptureFixture[str], section: Section) -> None:
    """Count what is traced from a small config, and print why the others are not."""
    failed: dict[str, str] = {}
    names = list(kinds())
    for kind in names:
        try:
            (traced,) = trace(small(kind), "bf16", [LOAD])
            assert traced.peak_bytes > traced.weights_bytes > 0
        except Exception as error:  # noqa: BLE001 every kind of failure is what is counted here
            failed[kind] = _told(error)
    with capsys.disabled():
        print(f"\ntransformers {transformers.__version__}: {len(names) - len(failed)} of {len(names)} model types traced")
        for kind, why in failed.items():
            print(f"  {kind}: {why}")
    what = f"text model types of transformers {transformers.__version__} that are traced from a small config"
    found = f"{len(names) - len(failed)}, {1 - len(failed) / len(names):.1%}"
    section.figures.append(Figure(what=what, found=found, wanted=f"{LEAST_SHARE:.0%}", rows=len(names)))
    section.notes.append(
        "\n".join(table(["not traced", "why"], [(f"`{kind}`", why.replace("|", "/")) for kind, why in failed.items()]))
    )
    assert len(names) - len(failed) >= LEAST_SHARE * len(names)
