"""Write data/attention.json: the classes of transformers that generate text and lack an implementation of attention.

`python -m harness.worker.attention_support` after a new release; `tests/core/test_attention.py` says when that is due.
"""

from __future__ import annotations

import json
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from harness.data import DATA
from harness.machine.atomic import write_bytes

# The flag of a class, by the part of an implementation's name that goes by it.
FLAGS = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn"}


def support() -> dict[str, list[str]]:
    """Return the classes without each implementation, in the order of their names."""
    mapped = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = {name for table in mapped for name in table.values() if isinstance(name, str)}
    classes: dict[str, Any] = {name: getattr(transformers, name) for name in sorted(names) if hasattr(transformers, name)}
    return {kind: [name for name, found in classes.items() if not getattr(found, flag)] for kind, flag in FLAGS.items()}


if __name__ == "__main__":
    write_bytes(DATA / "attention.json", json.dumps(support(), indent=1).encode() + b"\n")
