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


GGUF_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32", "TQ1_0", "TQ2_0", "MXFP4")


def small_gguf_of(folder: Path, kind: gguf.GGMLQuantizationType) -> tuple[Path, int]:
    """Write a GGUF of this type; return it and the bytes of its tensors as the gguf package reads them."""
    path = folder / f"{kind.name}.gguf"
    weights: dict[str, np.ndarray[Any, Any]] = {
        "token_embd.weight": np.ones((600, 256), np.float32),
        "blk.0.ffn_up.weight": np.ones((704, 256), np.float32),
        "blk.0.attn_norm.weight": np.ones(256, np.float32),
    }
    write_gguf(path, weights, **{name: kind for name, weight in weights.items() if weight.ndim == 2})
    return path, sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def small_gguf(path: Path) -> Path:
    weights: dict[str, np.ndarray[Any, Any]] = {
        "a": np.ones((3, 64), np.float32),
        "b": np.ones((2, 32), np.float32),
        "c": np.ones(5, np.float16),
    }
    write_gguf(path, weights, a=gguf.GGMLQuantizationType.Q8_0, b=gguf.GGMLQuantizationType.Q4_1)
    return path
