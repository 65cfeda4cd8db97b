"""Whether a head that a file holds beside the embedding is the embedding again: some bytes of both are compared.

A config that ties them is not to be believed where the files hold another head: transformers (`tie_weights`) then loads both.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import NamedTuple

from harness.checkpoint.formats.files import Blob, Folder
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.core.dtypes import DTYPE_BYTES

EMBEDDING = re.compile(r"(^|\.)(wte|token_embd|tok_embeddings|embed_tokens|embed_in|word_embeddings)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output)\.weight$")
# Trained rows differ everywhere; the first may be those of tokens that were never used.
PLACES, WINDOW_BYTES = (0.0, 0.37, 0.71, 1.0), 4096
_FLOATS: Mapping[str, str] = {"bfloat16": "", "float16": "e", "float32": "f", "float64": "d"}  # by their letter in `struct`


def other_head(folder: Folder, tensors: Iterable[StoredTensor]) -> str | None:
    """Return the name of the output head if its bytes are not those of the embedding; None if they are, or one is not there.

    Where they cannot be compared, by format or for one is packed, they are taken for the same.
    """
    found = list(tensors)
    embedding = next((tensor for tensor in found if EMBEDDING.search(tensor.name)), None)
    head = next((tensor for tensor in found if HEAD.search(tensor.name)), None)
    if embedding is None or head is None or head.shape != embedding.shape or not head.bytes:
        return None
    if head.dtype != embedding.dtype and not {head.dtype, embedding.dtype} <= _FLOATS.keys():
        return None
    if head.file == embedding.file and head.storage is not None and head.storage == embedding.storage:
        return None
    with closing(folder.open(head.file)) as one, closing(folder.open(embedding.file)) as other:
        first, second = _begin(one, head), _begin(other, embedding)
        if first is None or second is None:
            return None
        return head.name if _differ(_Place(one, first, head), _Place(other, second, embedding)) else None


class _Place(NamedTuple):
    """Where a tensor begins in a file."""

    blob: Blob
    start: int
    tensor: StoredTensor

    def read(self, first: int, count: int) -> bytes:
        """Return the bytes of some elements."""
        width = self.tensor.bytes // math.prod(self.tensor.shape)
        return self.blob.read(self.start + first * width, count * width)


def _differ(one: _Place, other: _Place) -> bool:
    """Compare windows of two tensors: by their bytes, of two dtypes by what both are in the one that they are mostly loaded in."""
    elements, dtypes = math.prod(one.tensor.shape), (one.tensor.dtype, other.tensor.dtype)
    length = min(max(1, WINDOW_BYTES * elements // max(one.tensor.bytes, other.tensor.bytes)), elements)
    for share in PLACES:
        at = int(share * (elements - length))
        found = [place.read(at, length) for place in (one, other)]
        if dtypes[0] != dtypes[1]:
            found = [_as_bfloat16(data, dtype) for data, dtype in zip(found, dtypes, strict=True)]
        if found[0] != found[1]:
            return True
    return False


def _as_bfloat16(data: bytes, dtype: str) -> bytes:
    """Round floats to bfloat16, the nearest and of two the even one, as torch does."""
    if dtype == "bfloat16":
        return data
    values = struct.unpack(f"<{len(data) // struct.calcsize(_FLOATS[dtype])}{_FLOATS[dtype]}", data)
    numbers = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return struct.pack(f"<{len(numbers)}H", *((number + 0x7FFF + (number >> 16 & 1)) >> 16 & 0xFFFF for number in numbers))


def _begin(blob: Blob, tensor: StoredTensor) -> int | None:
    """Return where a tensor begins in its file; None where the format does not tell without reading it all."""
    if tensor.offset is not None or tensor.storage is None or blob.read(0, 4) != b"PK\x03\x04":
        return tensor.offset
    from harness.checkpoint.formats.zip_directory import read_directory, start_of

    key, start, _ = tensor.storage.split(":")
    member = next((member for name, member in read_directory(blob).items() if name.endswith(f"/data/{key}")), None)
    return None if member is None else start_of(blob, member) + int(start) * DTYPE_BYTES.get(tensor.dtype, 1)
