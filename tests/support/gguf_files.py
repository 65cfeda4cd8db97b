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


# ---- whole models, which transformers loads -----------------------------------------------------------------------------


def _said(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """Write the sizes that all architectures name alike, and a tokenizer of single bytes."""
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)


def _words() -> list[str]:
    """List the letters that byte-level BPE writes bytes with, an end of text and two joined words."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)] + ["<|end|>", "th", "the"]


# Names and shapes of a block beside its norms; 8 heads of 32, of which 2 have keys and values.
_ATTENTION = {"attn_q": (256, 256), "attn_k": (64, 256), "attn_v": (64, 256), "attn_output": (256, 256)}
_MLP = {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}


def write_llama(path: Path, kind: str = "Q8_0", architecture: str = "llama") -> Path:
    """Write a Llama of 1.5 million random weights, tied, with the tensors of a matrix in blocks of this type."""
    writer, words = gguf.GGUFWriter(path, architecture), _words()
    _said(writer, words)
    writer.add_head_count_kv(2)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), 256)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in (_ATTENTION | _MLP).items()}
        shapes |= {f"blk.{block}.{name}": (256,) for name in ("attn_norm", "ffn_norm")}
    return _write(writer, path, shapes | {"output_norm": (256,)}, kind)


def write_lfm2(path: Path, kind: str = "Q8_0") -> Path:
    """Write an LFM2 of random weights, one convolution and one attention block: transformers can keep its blocks."""
    writer, words = gguf.GGUFWriter(path, "lfm2"), _words()
    _said(writer, words)
    writer.add_array("lfm2.attention.head_count_kv", [0, 2])
    writer.add_uint32("lfm2.shortconv.l_cache", 3)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), 256), "token_embd_norm": (256,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in _MLP.items()}
        shapes |= {f"blk.{block}.{name}": (256,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.shortconv.conv": (256, 3), "blk.0.shortconv.in_proj": (768, 256), "blk.0.shortconv.out_proj": (256, 256)}
    shapes |= {f"blk.1.{name}": shape for name, shape in _ATTENTION.items()}
    return _write(writer, path, shapes | {"blk.1.attn_q_norm": (32,), "blk.1.attn_k_norm": (32,)}, kind)


def _write(writer: gguf.GGUFWriter, path: Path, shapes: dict[str, tuple[int, ...]], kind: str) -> Path:
    random, blocks = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        value = random.standard_normal(shape, dtype=np.float32) * 0.02 + (len(shape) == 1)
        if len(shape) == 2 and shape[-1] % 32 == 0:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, blocks), raw_dtype=blocks)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(path: Path, parts: int = 2) -> list[Path]:
    """Write a file in parts, as llama-gguf-split does: the first has the metadata, each some of the tensors; the whole goes."""
    read = gguf.GGUFReader(path)
    step, written = -(-len(read.tensors) // parts), []
    for part in range(parts):
        written.append(path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf"))
        writer = gguf.GGUFWriter(written[-1], str(read.fields["general.architecture"].contents()))
        for key, field in read.fields.items() if part == 0 else ():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            else:
                writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in read.tensors[part * step : (part + 1) * step]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return written
