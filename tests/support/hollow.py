"""Hollow checkpoints as models are published: sparse files, names and shapes as transformers writes them, every expert by itself.

`fitmatrix synth --hollow` names tensors as transformers holds them, so experts are stacked there already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from harness.checkpoint.formats.tensor_writer import TensorToWrite, write_bin, write_safetensors
from harness.worker.build_skeleton import read_model_config

WRITERS = {"safetensors": ("model", write_safetensors), "bin": ("pytorch_model", write_bin)}
SHARD_BYTES = 4 << 30


def write(
    folder: Path, config: Mapping[str, Any], dtype: str = "bfloat16", ending: str = "safetensors", repeats_head: bool = False
) -> Path:
    """Write the hollow checkpoint of a config; with `repeats_head` a tied head is stored again. MXFP4 packs stacks of experts."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    packs = config.get("quantization_config", {}).get("quant_method") == "mxfp4"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_model_config(plain), dtype=getattr(torch, dtype))
    held = {name: tensor for name, tensor in model.state_dict().items() if repeats_head or name not in model.all_tied_weights_keys}
    state: Mapping[str, torch.Tensor] = revert_weight_conversion(model, held)
    shards: list[list[TensorToWrite]] = [[]]
    for name, tensor in state.items():
        if sum(one.bytes for one in shards[-1]) > SHARD_BYTES:
            shards.append([])
        stacked = packs and tensor.dim() == 3 and "experts" in name
        shards[-1] += _packed(name, tensor.shape) if stacked else [TensorToWrite(name=name, dtype=dtype, shape=tuple(tensor.shape))]
    folder.mkdir(parents=True, exist_ok=True)
    stem, writer = WRITERS[ending]
    files = {f"{stem}-{number:05}-of-{len(shards):05}.{ending}": shard for number, shard in enumerate(shards, start=1)}
    for file, shard in files.items():
        writer(folder / file, shard, None)
    index = {"metadata": {}, "weight_map": {tensor.name: file for file, shard in files.items() for tensor in shard}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def _packed(name: str, shape: Sequence[int]) -> Iterator[TensorToWrite]:
    """Yield what GPT-OSS stores of a stack of experts: 32 inputs that share a scale lie in 16 bytes, outputs first."""
    experts, inputs, outputs = shape
    yield TensorToWrite(name=f"{name}_blocks", dtype="uint8", shape=(experts, outputs, inputs // 32, 16))
    yield TensorToWrite(name=f"{name}_scales", dtype="uint8", shape=(experts, outputs, inputs // 32))
