"""Folders that are no model of transformers, told by the files in them: what each is, and what would load it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from typing import NamedTuple

from harness.checkpoint.auxiliary_files import ADAPTER
from harness.checkpoint.formats.files import Folder, quote
from harness.checkpoint.formats.safetensors_header import parse_config
from harness.core.errors import CheckpointError


class ForeignFolder(NamedTuple):
    """A kind of folder: known by a file whose name fits `pattern`; `say` makes the sentence of it."""

    pattern: str
    say: Callable[[Folder, str], str]


def what_it_is(folder: Folder, names: Sequence[str]) -> str | None:
    """Say what a folder without a model of transformers is and what loads it; None where nothing is known of it."""
    for kind in FOREIGN_FOLDERS:
        found = next((name for name in names if fnmatchcase(name, kind.pattern)), None)
        if found is not None:
            return kind.say(folder, found)
    return None


def is_model_file(name: str) -> bool:
    """Say whether a GGUF may be a whole model by its name, not what lies beside one."""
    return not any(fnmatchcase(name, pattern) for pattern in _BESIDE_GGUF)


def _adapter(folder: Folder, name: str) -> str:
    """Say which model an adapter belongs to, and how large it is beside it."""
    with closing(folder.open(name)) as blob:
        config = parse_config(blob)
    base, rank, kind = config.get("base_model_name_or_path"), config.get("r"), str(config.get("peft_type") or "peft")
    what = f"is an adapter ({quote(kind)}{f' of rank {rank}' if isinstance(rank, int) else ''}), not a model"
    if not isinstance(base, str) or not base:
        return f"{what}: write the model that it was made for as base_model_name_or_path into {ADAPTER}"
    return f"{what}: download it and name its directory, which is planned on top of {quote(base)}"


def _fixed(what: str, way: str) -> Callable[[Folder, str], str]:
    return lambda _, name: f"is {what} ({quote(name)}), not a model of transformers: {way}"


def _variant(_: Folder, name: str) -> str:
    """Say that files are those of a variant, which a loader asks for by name."""
    variant = next(part for part in name.split(".")[1:] if part not in ("index", "safetensors", "bin", "json"))
    way = f"from_pretrained finds it by variant={variant!r}; here rename its files to those without it"
    return f"has its weights as a variant ({quote(name)}) alone: {way}"


_VARIANTS = ("model.*.safetensors", "model.safetensors.index.*.json", "pytorch_model.*.bin", "pytorch_model.bin.index.*.json")
_OF_MAKERS = ("a model as its makers' own code keeps it", "take the copy for transformers, which has a config.json")
# What lies beside a model for llama.cpp, which may be a GGUF as well.
_BESIDE_GGUF = {
    "*mmproj*.gguf": "the part of a model that sees, as llama.cpp loads it beside the model",
    "*imatrix*": "what llama.cpp counted to quantize a model by",
}
FOREIGN_FOLDERS = (
    ForeignFolder(ADAPTER, _adapter),
    ForeignFolder("model_index.json", _fixed("a pipeline of diffusers, which makes images or sound", "DiffusionPipeline loads it")),
    ForeignFolder("diffusion_pytorch_model*", _fixed("a part of a pipeline of diffusers", "the pipeline around it loads it")),
    ForeignFolder("pytorch_lora_weights.*", _fixed("an adapter for diffusers", "load_lora_weights of its pipeline loads it")),
    ForeignFolder("params.json", _fixed(*_OF_MAKERS)),
    ForeignFolder("consolidated*", _fixed(*_OF_MAKERS)),
    *(ForeignFolder(pattern, _variant) for pattern in _VARIANTS),
    ForeignFolder("ggml-*.bin", _fixed("a file of llama.cpp from before GGUF", "convert it by an older llama.cpp, or take a GGUF")),
    ForeignFolder("openvino_model.xml", _fixed("an export for OpenVINO", "optimum-intel loads it; here take the original")),
    ForeignFolder("*.engine", _fixed("an engine of TensorRT-LLM", "TensorRT-LLM runs it on the card that it was built for")),
    ForeignFolder("*.onnx", _fixed("an export to ONNX", "onnxruntime or optimum load it; here take the original")),
    ForeignFolder("tf_model.h5", _fixed("a checkpoint of TensorFlow", "transformers 5 reads none: take one with safetensors")),
    ForeignFolder("flax_model.msgpack", _fixed("a checkpoint of Flax", "transformers 5 reads none: take one with safetensors")),
    *(ForeignFolder(pattern, _fixed(what, "take the GGUF of the model itself")) for pattern, what in _BESIDE_GGUF.items()),
    ForeignFolder("*.nemo", _fixed("an archive of NeMo", "NeMo loads it; here take the copy for transformers")),
)  # fmt: skip


def refuse(folder: Folder, names: Sequence[str], otherwise: str) -> CheckpointError:
    """Return the error for a folder that lacks what transformers needs: what it is, else the sentence `otherwise`."""
    return CheckpointError(folder.where, what_it_is(folder, names) or otherwise)
