"""Checkpoints that are quantized already: GPTQ's and AWQ's layouts as hollow files of any size, and how the planner takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec, skeleton, skeleton_source
from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Skeleton
from harness.catalog import shipped
from harness.checkpoint import reader
from harness.core.precisions import PRECISIONS
from harness.planning.cost import estimate
from tests.support import small_models
from tests.support.builders import weight_bytes

_IN_A_FILE = 100_000  # tensors, whose header is then of a size that readers take


def spec(folder: Path) -> ModelSpec:
    """Draw the spec of a checkpoint from its headers."""
    return model_spec.of_checkpoint("packed", "packed", reader.read(folder), folder)


def estimated(one: ModelSpec, precision: str = "fp16", *, saved: bool = True) -> int:
    """Return the bytes of weights that the planner counts; with `saved` without buffers, such as masks, that no file holds."""
    kept = estimate.weight_format(PRECISIONS[precision], PRECISIONS[precision].dtype, one)
    sizes = weight_bytes(one.skeleton, kept)
    return sum(sizes[weight.path] for weight in one.skeleton.weights if not saved or weight.tensor.kind != "unsaved")


def packed_layout(built: Skeleton, bits: int, group: int, method: str = "gptq") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Lay a model out as GPTQ or AWQ does: every Linear but the head packed, along its inputs or outputs, each expert by itself."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for owner, weight in ((module, weight) for module in built.root.walk() for weight in module.weights):
        shape = weight.tensor.shape
        if weight.tied_to or weight.tensor.kind == "unsaved":
            continue
        if skeleton.is_stacked(weight):
            halves = 2 if weight.path.endswith("gate_up_proj") else 1
            parts = [f"{weight.path}.{expert}.w{half}" for expert in range(shape[0]) for half in range(halves)]
            outputs, inputs = shape[1] // halves, shape[2]
        elif weight.quantizes:
            parts = [weight.path.removesuffix(".weight")]
            outputs, inputs = reversed(shape) if owner.block.linear == "conv1d" else shape
        else:
            tensors[weight.path] = ("F16", shape)
            continue
        for part in parts:
            groups = -(-inputs // group)
            rows = (inputs * bits // 32, outputs) if method == "gptq" else (inputs, outputs * bits // 32)
            tensors[f"{part}.qweight"] = ("I32", rows)
            tensors[f"{part}.qzeros"] = ("I32", (groups, outputs * bits // 32))
            tensors[f"{part}.scales"] = ("F16", (groups, outputs))
            if method == "gptq":
                tensors[f"{part}.g_idx"] = ("I32", (inputs,))
    return tensors


def write_hollow(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Write a safetensors file whose data is a hole, of any size; return the bytes of its tensors."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def write_shards(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Write a hollow model in as many files as their headers need, with an index if that is more than one; return its bytes."""
    names = list(tensors)
    pieces = [names[at : at + _IN_A_FILE] for at in range(0, len(names), _IN_A_FILE)]
    if len(pieces) == 1:
        return write_hollow(folder / "model.safetensors", tensors)
    files = [f"model-{number:05}-of-{len(pieces):05}.safetensors" for number in range(1, len(pieces) + 1)]
    written = [
        write_hollow(folder / file, {name: tensors[name] for name in some}) for file, some in zip(files, pieces, strict=True)
    ]
    places = {name: file for file, some in zip(files, pieces, strict=True) for name in some}
    index = {"metadata": {"total_size": sum(written)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(written)


def write_plain(folder: Path, name: str) -> Path:
    """Write a model of the catalog in bfloat16, its data a hole; return the folder."""
    config, shape = shipped.catalog()[shipped.hub_id(name)].config, skeleton_source.named(name)
    saved = [weight for weight in shape.weights if not weight.tied_to and weight.tensor.kind != "unsaved"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_shards(folder, {weight.path: ("BF16", weight.tensor.shape) for weight in saved})
    return folder


def write_packed(folder: Path, name: str, bits: int, group: int, method: str = "gptq") -> int:
    """Write a model of the catalog as GPTQ, or AWQ, leaves it; return the bytes of its tensors."""
    config: dict[str, Any] = dict(shipped.catalog()[shipped.hub_id(name)].config)
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "awq":
        config["quantization_config"] |= {"version": "gemm", "zero_point": True}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return write_shards(folder, packed_layout(skeleton_source.named(name), bits, group, method))


def save_gptq(folder: Path, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Write a small Llama as GPTQ leaves it, rounded to the nearest; return the weights that its packed ones stand for.

    A `group` of -1 is a whole column, as GPTQ has it.
    """
    small_models.save("llama", folder, intermediate_size=768)  # the kernel for processors wants whole groups
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj." in name]:
        path, weight = name.removesuffix(".weight"), tensors.pop(name).float().T  # inputs x outputs, as GPTQ packs
        inputs, outputs = weight.shape
        rows = inputs if group == -1 else group
        middle, groups = 2 ** (bits - 1), torch.arange(inputs) // rows
        scales = torch.stack([part.abs().amax(0) for part in weight.split(rows)]) / (middle - 1)
        fields = (weight / scales[groups]).round() + middle
        tensors[f"{path}.qweight"] = pack(fields.long(), bits)
        tensors[f"{path}.qzeros"] = pack(torch.full((outputs, len(scales)), middle - 1), bits).T.contiguous()
        tensors[f"{path}.scales"], tensors[f"{path}.g_idx"] = scales.half(), groups.int()
        meant[name] = ((fields - middle) * scales.half().float()[groups]).T
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scheme = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}), encoding="utf-8")
    return meant


# AutoAWQ's "gemm" interleaves eight outputs in a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def save_awq(folder: Path, group: int) -> dict[str, torch.Tensor]:
    """Write a small Llama as AWQ leaves it, rounded to the nearest in 4 bits; return the weights that its packed ones stand for.

    A `group` of -1 is a whole column.
    """
    small_models.save("llama", folder, intermediate_size=768)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj." in name]:
        path, weight = name.removesuffix(".weight"), tensors.pop(name).float().T
        rows = len(weight) if group == -1 else group
        groups = torch.arange(len(weight)) // rows
        scales = (torch.stack([part.abs().amax(0) for part in weight.split(rows)]) / 7).half()
        fields = ((weight / scales.float()[groups]).round() + 8).long().clamp(0, 15)
        tensors[f"{path}.qweight"] = _pack_interleaved(fields)
        tensors[f"{path}.qzeros"] = _pack_interleaved(torch.full((len(scales), weight.shape[1]), 8))
        tensors[f"{path}.scales"] = scales
        meant[name] = ((fields - 8) * scales.float()[groups]).T
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scheme = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}), encoding="utf-8")
    return meant


def _pack_interleaved(fields: torch.Tensor) -> torch.Tensor:
    rows, columns = fields.shape
    ordered = fields.reshape(rows, columns // 8, 8)[:, :, list(AWQ_ORDER)].reshape(rows, columns)
    return pack(ordered.T, 4).T.contiguous()


def pack(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned bit fields [rows, columns] into int32 along the rows, the lowest bits first."""
    words = fields.reshape(-1, 32 // bits, fields.shape[1]) << torch.arange(0, 32, bits)[:, None]
    whole = words.sum(1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()
