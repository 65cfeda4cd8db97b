"""The config that transformers makes of a GGUF file's metadata, without the file, and the names that it gives its tensors.

transformers reads a config from a file only, so one is written that has the header and, for its data, a hole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from harness.architecture.key_mapping import Naming
from harness.checkpoint.formats.gguf_header import TYPES
from harness.core.families import GGUF

# transformers takes the size of a vocabulary from the length of this array; what is in it does not matter.
_VOCABULARY = "tokenizer.ggml.tokens"
_NUMBERS = {name: (number, elements, size) for number, (name, elements, size) in TYPES.items()}


def config_of(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> dict[str, Any]:
    """Return transformers' config for a GGUF with this metadata and these tensors (name, shape in torch's order, dtype).

    Raises:
        ValueError: transformers does not load this architecture, or one of the block types.
    """
    listed = list(tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hollow.gguf"
        _write_hollow(path, metadata, listed)
        _check_types(path, str(metadata.get("general.architecture")), {dtype for _, _, dtype in listed})
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, gguf_file=path.name).to_dict()
    return config


def gguf_naming(model: Any, architecture: str) -> Naming | None:
    """Return the names that a GGUF's tensors get in a model; None if some get another shape or become several."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    if architecture in GGUF.packed_architectures or processor not in (TensorProcessor, LlamaTensorProcessor):
        return None
    names = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))  # type: ignore[no-untyped-call]
    return Naming(names=names) if set(model.state_dict()) <= set(names.values()) else None


def _check_types(path: Path, architecture: str, dtypes: Iterable[str]) -> None:
    """Unpack a block of each type with what loading would use: transformers itself, or the gguf package."""
    if architecture in GGUF.packed_architectures and find_spec("transformers.integrations.gguf"):
        from transformers.integrations.gguf.reader import GgufHeader

        GgufHeader.from_file(str(path))
        return
    for dtype in sorted(dtypes):
        number, elements, size = _NUMBERS[dtype]
        if elements > 1:
            try:
                gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(number))
            except (NotImplementedError, ValueError):
                raise ValueError(f"GGUF tensors of type {dtype} cannot be unpacked by gguf {version('gguf')}") from None


def _write_hollow(path: Path, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture")))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    end = 0
    for name, shape, dtype in tensors:
        number, elements, size = _NUMBERS[dtype]
        held = int(np.prod(shape, dtype=np.int64)) // elements * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), held, gguf.GGMLQuantizationType(number))
        end += gguf.GGUFWriter.ggml_pad(held, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.truncate(file.tell() + end + writer.data_alignment)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one value in a type that holds it; of long arrays only the vocabulary, empty."""
    kinds = gguf.GGUFValueType
    if isinstance(value, dict):
        if key == _VOCABULARY:
            writer.add_array(key, [""] * int(value["count"]))
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_key_value(key, value, kinds.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kinds.UINT32 if 0 <= value < 1 << 32 else kinds.INT64)
    else:
        writer.add_key_value(key, value, kinds.FLOAT64 if isinstance(value, float) else kinds.STRING)
