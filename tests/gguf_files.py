"""Small GGUF files, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(path: Path, tensors: dict[str, np.ndarray[Any, Any]], **quantized: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_token_list([f"token{i}" for i in range(600)])
    writer.add_array("llama.attention.head_count_kv", [1, 2, 3])
    writer.add_token_scores([0.0] * 600)
    for name, value in tensors.items():
        kind = quantized.get(name)
        writer.add_tensor(name, gguf.quants.quantize(value, kind) if kind else value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_gguf(path: Path) -> Path:
    weights: dict[str, np.ndarray[Any, Any]] = {
        "a": np.ones((3, 64), np.float32),
        "b": np.ones((2, 32), np.float32),
        "c": np.ones(5, np.float16),
    }
    write_gguf(path, weights, a=gguf.GGMLQuantizationType.Q8_0, b=gguf.GGMLQuantizationType.Q4_1)
    return path
