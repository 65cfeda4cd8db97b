"""Safetensors files of zeros, by hand: nothing of torch is needed to read headers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write tensors of 16-bit zeros."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
