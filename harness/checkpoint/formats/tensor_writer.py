"""Files of tensors, written without torch: safetensors, and the zip with a pickle that torch.save writes.

Contents come in pieces, so a file of any size takes the memory of one piece. Formats: the README of safetensors; torch's
serialization notes, of which pickle protocol 2 and stored, aligned members of the archive are used.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from harness.core.dtypes import DTYPE_BYTES
from harness.core.records import Record

ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
_ZIP64_EXTRA = 20  # which zipfile puts into the extra field of a member that may be large
_EPOCH = (1980, 1, 1, 0, 0, 0)

# torch's dtype -> its name in safetensors, its storage class in torch.save
DTYPES: Mapping[str, tuple[str, str]] = {
    "float32": ("F32", "FloatStorage"),
    "float16": ("F16", "HalfStorage"),
    "bfloat16": ("BF16", "BFloat16Storage"),
    "bool": ("BOOL", "BoolStorage"),
    "int8": ("I8", "CharStorage"),
    "uint8": ("U8", "ByteStorage"),
    "int32": ("I32", "IntStorage"),
}


class TensorToWrite(Record, frozen=True, kw_only=True):
    """A tensor to be written: its name, its torch dtype (a key of DTYPES), its shape; `repeats` names one that it is a copy of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    repeats: str | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Pieces = Callable[[TensorToWrite], Iterable[memoryview]]


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite], pieces: Pieces | None) -> None:
    """Write a safetensors file; without `pieces` a sparse one, whose tensors are zeros that take no disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": DTYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if pieces is None:
            file.truncate(8 + len(text) + end)
            return
        for tensor in tensors:
            for piece in pieces(tensor):
                _write_whole(file, piece)


def write_bin(path: Path, tensors: Sequence[TensorToWrite], pieces: Pieces | None) -> None:
    """Write what torch.save writes of a state dict; without `pieces` a sparse one (whose checksums are those of nothing)."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, "archive/data.pkl", [memoryview(_pickled(tensors))])
        for number, tensor in enumerate(tensors):
            name = f"archive/data/{number}"
            if pieces is None:
                _sparse_member(archive, file, name, tensor.bytes)
            else:
                _member(archive, name, pieces(tensor))
        _member(archive, "archive/version", [memoryview(b"3\n")])


def _info(name: str, offset: int) -> zipfile.ZipInfo:
    """Describe a member whose contents begin at a multiple of ALIGNMENT, padded as torch pads it."""
    info = zipfile.ZipInfo(name, _EPOCH)
    begin = offset + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA + 4
    padding = -begin % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def _member(archive: zipfile.ZipFile, name: str, pieces: Iterable[memoryview]) -> None:
    assert archive.fp is not None
    with archive.open(_info(name, archive.fp.tell()), "w", force_zip64=True) as member:
        for piece in pieces:
            member.write(piece)


def _sparse_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, size: int) -> None:
    """Leave a hole of `size` bytes as a member; zipfile writes its header, and then the file is made longer."""
    info = _info(name, file.tell())
    with archive.open(info, "w", force_zip64=True):
        pass
    end = file.tell() + size
    file.truncate(end)
    file.seek(end)
    info.file_size = info.compress_size = size
    archive.start_dir = end


def _write_whole(file: BinaryIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def _pickled(tensors: Sequence[TensorToWrite]) -> bytes:
    """Pickle a dict from names to tensors whose storages lie in the archive, as torch's persistent ids name them."""
    opcodes = [b"\x80\x02}("]  # PROTO 2, EMPTY_DICT, MARK
    for number, tensor in enumerate(tensors):
        storage = DTYPES[tensor.dtype][1]
        elements = math.prod(tensor.shape)
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        opcodes += [
            _text(tensor.name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",  # GLOBAL; MARK of the arguments, MARK of the persistent id
            _text("storage"),
            f"ctorch\n{storage}\n".encode(),
            _text(str(number)),
            _text("cpu"),
            _integer(elements),
            b"tQ",  # TUPLE, BINPERSID
            _integer(0),
            _tuple(tensor.shape),
            _tuple(strides),
            b"\x89ccollections\nOrderedDict\n)R",  # False, then OrderedDict()
            b"tR",  # TUPLE, REDUCE
        ]
    return b"".join([*opcodes, b"u."])  # SETITEMS, STOP


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(8, "little")
    return b"\x8a\x08" + data


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
