"""Files of zeros: nothing of torch is needed to read headers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.architecture import synthetic
from harness.architecture.skeleton import Skeleton
from harness.architecture.synthetic import Synthetic
from harness.checkpoint.formats.tensor_writer import TensorToWrite

# How a model is published: the format, and in how many files.
FORMS: Mapping[str, tuple[str, int]] = {
    "safetensors": ("safetensors", 1),
    "bin": ("bin", 1),
    "shards": ("safetensors", 3),
    "bin shards": ("bin", 3),
}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write tensors of 16-bit zeros."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def specs(found: Skeleton, dtype: str = "bfloat16") -> dict[str, TensorToWrite]:
    """Return what a checkpoint of this model holds, by name."""
    kept = [weight for weight in found.weights if not weight.tied_to and weight.tensor.kind != "unsaved"]
    return {weight.path: TensorToWrite(name=weight.path, dtype=dtype, shape=weight.tensor.shape) for weight in kept}


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Sequence[TensorToWrite], form: str = "safetensors") -> Path:
    """Write a checkpoint of hollow files, in one of FORMS; of several files each has as many tensors."""
    file_format, count = FORMS[form]
    each = -(-len(tensors) // count)
    shards = tuple(tuple(tensors[begin : begin + each]) for begin in range(0, len(tensors), each))
    return synthetic.write_synthetic(
        Synthetic(name="made", config=dict(config), format=file_format, shards=shards), folder, hollow=True
    )
