"""What the header of a GGUF file says: its metadata and its tensors.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian; block sizes as ggml's type traits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from harness.checkpoint.formats.files import DOWNLOAD_AGAIN, Blob, Cursor, check_present, damaged, quote
from harness.checkpoint.formats.safetensors_header import StoredTensor, check_shape
from harness.core.errors import CheckpointError
from harness.core.units import format_size

GGUF_HEADER_BYTES = 24 << 20  # a vocabulary of 260,000 words and 510,000 merges takes 15 MB
FIRST_GGUF_BYTES = 1 << 19  # a tokenizer of 50,000 words
MOST_GGUF_TENSORS = 100_000
MOST_KEYS = 2_000
MOST_STRINGS = 1_000_000  # of all arrays together
NAME_BYTES = 1 << 10
GGUF_TEXT_BYTES = 1 << 20
KEPT_VALUES = 512

# ggml's number of a type -> (name here, elements in a block, bytes of a block)
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("float32", 1, 4),
    1: ("float16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("float64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bfloat16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}

BLOCK_TYPES = frozenset(name for name, elements, _ in TYPES.values() if elements > 1)

# GGUF's number of a value type -> layout in `struct`
SCALARS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read_gguf(blob: Blob) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Return the metadata under GGUF's own keys, and the tensors, with shapes in torch's order (GGUF's reversed).

    Long arrays and arrays of strings (the vocabulary) are given as {"type": ..., "count": ...}.
    """
    check_present(blob)
    cursor = Cursor(blob, end=GGUF_HEADER_BYTES, first=FIRST_GGUF_BYTES)
    _check_version(blob, cursor)
    tensors, keys = cursor.unpack("<Q"), cursor.unpack("<Q")
    if tensors > MOST_GGUF_TENSORS or keys > MOST_KEYS:
        raise damaged(blob, f"says it has {tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    strings = MOST_STRINGS
    for _ in range(keys):
        key = _text(cursor, NAME_BYTES)
        metadata[key] = value = _value(cursor, key, strings)
        strings -= value["count"] if isinstance(value, dict) and value["type"] == "string" else 0
    described = [_described(cursor) for _ in range(tensors)]
    _check_layout(blob, described, _data_start(blob, metadata, cursor.position), _alignment(blob, metadata))
    return metadata, [tensor for tensor, _ in described]


def _check_version(blob: Blob, cursor: Cursor) -> None:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise CheckpointError(blob.where, f"is not a GGUF file: it begins with {magic!r}, not with b'GGUF'")
    version = cursor.unpack("<I")
    if version in (2, 3):
        return
    if version and not version & 0xFFFF:
        raise CheckpointError(blob.where, "is a big-endian GGUF file: get the little-endian one")
    raise CheckpointError(blob.where, f"has GGUF version {version}; versions 2 and 3 can be read: convert the model again")


def _text(cursor: Cursor, most: int, errors: str = "strict") -> str:
    length = cursor.unpack("<Q")
    if length > most:
        raise damaged(cursor.blob, f"holds a string of {length} bytes at byte {cursor.position} where {most} are the most")
    try:
        return cursor.take(length).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise damaged(cursor.blob, f"holds a name that is not UTF-8 before byte {cursor.position}") from error


def _value(cursor: Cursor, key: str, most_strings: int) -> Any:
    kind = cursor.unpack("<I")
    if kind == STRING:
        return _text(cursor, GGUF_TEXT_BYTES, "replace")
    if kind == ARRAY:
        return _array(cursor, key, most_strings)
    return _scalars(cursor, key, kind, 1)[0]


def _array(cursor: Cursor, key: str, most_strings: int) -> Any:
    kind, count = cursor.unpack("<I"), cursor.unpack("<Q")
    if kind == STRING:
        if count > most_strings:
            raise damaged(cursor.blob, f"key {quote(key)} says it has {count} strings, which makes more than {MOST_STRINGS:,}")
        cursor.skip_strings(count)
        return {"type": "string", "count": count}
    if count <= KEPT_VALUES:
        return list(_scalars(cursor, key, kind, count))
    cursor.skip(count * struct.calcsize(_layout(cursor, key, kind)))
    return {"type": "number", "count": count}


def _scalars(cursor: Cursor, key: str, kind: int, count: int) -> tuple[Any, ...]:
    layout = f"<{count}{_layout(cursor, key, kind)[1:]}"
    return struct.unpack(layout, cursor.take(struct.calcsize(layout)))


def _layout(cursor: Cursor, key: str, kind: int) -> str:
    if kind not in SCALARS:
        raise damaged(cursor.blob, f"key {quote(key)} has values of the unknown type {kind}")
    return "<" + SCALARS[kind]


def _described(cursor: Cursor) -> tuple[StoredTensor, int]:
    """Read one tensor's description; returns it with its offset into the data."""
    blob = cursor.blob
    name = _text(cursor, NAME_BYTES)
    dimensions = cursor.unpack("<I")
    if dimensions > 8:
        raise damaged(blob, f"tensor {quote(name)} has {dimensions} dimensions")
    shape = tuple(cursor.unpack("<Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.unpack("<I"), cursor.unpack("<Q")
    if kind not in TYPES:
        raise CheckpointError(
            blob.where, f"tensor {quote(name)} has the block type {kind}, which is unknown or no longer used: convert again"
        )
    dtype, block, block_bytes = TYPES[kind]
    elements = check_shape(blob, name, shape)
    if (shape[-1] if shape else 1) % block:
        raise damaged(blob, f"tensor {quote(name)} has rows that are not made of whole {dtype} blocks of {block}")
    size = elements // block * block_bytes
    return StoredTensor(name=name, dtype=dtype, shape=shape, bytes=size, file=blob.name), offset


def _alignment(blob: Blob, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise damaged(blob, f"its general.alignment is {quote(alignment)}, not a power of two")
    return alignment


def _data_start(blob: Blob, metadata: Mapping[str, Any], end: int) -> int:
    alignment = _alignment(blob, metadata)
    return -(-end // alignment) * alignment


def _check_layout(blob: Blob, described: list[tuple[StoredTensor, int]], start: int, alignment: int) -> None:
    """Check that names are unique, tensors aligned and apart, and the file long enough."""
    if len({tensor.name for tensor, _ in described}) != len(described):
        raise damaged(blob, "describes a tensor twice")
    end = 0
    for tensor, offset in sorted(described, key=lambda item: item[1]):
        if offset < end or offset % alignment:
            raise damaged(blob, f"tensor {quote(tensor.name)} at offset {offset} overlaps another or is not aligned to {alignment}")
        end = offset + tensor.bytes
    if described and start + end > blob.size:
        there = format_size(blob.size)
        raise CheckpointError(
            blob.where, f"is cut short: its tensors end at {format_size(start + end)}, {there} are there: {DOWNLOAD_AGAIN}"
        )
