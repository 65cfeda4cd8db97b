"""The files of a model as they lie on disk: names, shapes and dtypes of the tensors, from headers alone."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from harness.case import Record
from harness.errors import CheckpointError

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


class Tensor(Record, frozen=True, kw_only=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


class Checkpoint(Record, frozen=True, kw_only=True):
    name: str
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors)


def read(path: Path) -> Checkpoint:
    tensors = []
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            for name, entry in json.loads(f.read(n)).items():
                if name != "__metadata__":
                    dtype, size = _DTYPES[entry["dtype"]]
                    tensors.append(
                        Tensor(
                            name=name,
                            dtype=dtype,
                            shape=tuple(entry["shape"]),
                            bytes=math.prod(entry["shape"]) * size,
                            file=file.name,
                        )
                    )
    if not tensors:
        raise CheckpointError(path, "no weights")
    return Checkpoint(name=path.name, config=json.loads((path / "config.json").read_text()), tensors=tuple(tensors))
