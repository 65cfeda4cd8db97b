"""Whether a head that a file holds beside the embedding is the embedding again: some bytes of both are compared.

A config that ties them is not to be believed where the files hold another head: transformers (`tie_weights`) then loads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing

from harness.checkpoint.formats.files import Blob, Folder
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.core.dtypes import DTYPE_BYTES

EMBEDDING = re.compile(r"(^|\.)(wte|token_embd|tok_embeddings|embed_tokens|embed_in|word_embeddings)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output)\.weight$")
# Trained rows differ everywhere; the first may be those of tokens that were never used.
PLACES, WINDOW_BYTES = (0.0, 0.37, 0.71, 1.0), 4096


def other_head(folder: Folder, tensors: Iterable[StoredTensor]) -> str | None:
    """Return the name of the output head if its bytes are not those of the embedding; None if they are, or one is not there.

    Where they cannot be compared, by dtype or format, they are taken for the same.
    """
    found = list(tensors)
    embedding = next((tensor for tensor in found if EMBEDDING.search(tensor.name)), None)
    head = next((tensor for tensor in found if HEAD.search(tensor.name)), None)
    if embedding is None or head is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return None
    if head.file == embedding.file and head.storage is not None and head.storage == embedding.storage:
        return None
    with closing(folder.open(head.file)) as one, closing(folder.open(embedding.file)) as other:
        places = _begin(one, head), _begin(other, embedding)
        if None in places or not head.bytes:
            return None
        return head.name if _differ(one, other, places, head.bytes) else None


def _differ(one: Blob, other: Blob, places: tuple[int | None, ...], size: int) -> bool:
    first, second = (place or 0 for place in places)
    length = min(WINDOW_BYTES, size)
    steps = [int(share * (size - length)) for share in PLACES]
    return any(one.read(first + step, length) != other.read(second + step, length) for step in steps)


def _begin(blob: Blob, tensor: StoredTensor) -> int | None:
    """Return where a tensor begins in its file; None where the format does not tell without reading it all."""
    if tensor.offset is not None or tensor.storage is None or blob.read(0, 4) != b"PK\x03\x04":
        return tensor.offset
    from harness.checkpoint.formats.zip_directory import read_directory, start_of

    key, start, _ = tensor.storage.split(":")
    member = next((member for name, member in read_directory(blob).items() if name.endswith(f"/data/{key}")), None)
    return None if member is None else start_of(blob, member) + int(start) * DTYPE_BYTES.get(tensor.dtype, 1)
