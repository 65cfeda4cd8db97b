"""What the headers of safetensors files and the JSON beside them say, under bounds of size, depth and time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from harness.checkpoint.formats.files import DOWNLOAD_AGAIN, Blob, Cursor, check_present, damaged, quote
from harness.core.dtypes import DTYPE_BITS
from harness.core.errors import CheckpointError
from harness.core.records import Record
from harness.core.units import format_size

CONFIG_BYTES = 4 << 20
INDEX_BYTES = 96 << 20  # 512 experts a layer in GPTQ's four parts each (Qwen3.5-397B-A17B) take 38 MiB
HEADER_BYTES = 25_000_000  # as huggingface_hub's own parser

# Memory is bounded by what a document can hold: every value but the first stands behind one of , : [ {
CONFIG_MARKS = 300_000
INDEX_MARKS = 2_000_000  # two a tensor
HEADER_MARKS = 1_500_000

CONFIG_DEPTH = 64
MOST_DIMENSIONS = 16
MOST_TENSOR_BYTES = 1 << 60

SAFETENSORS_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
}


class StoredTensor(Record, frozen=True, kw_only=True):
    """One tensor as a file describes it.

    `dtype` is torch's short name ("bfloat16") or a GGUF block type ("q4_1"); `shape` is in torch's order, outermost first.
    `storage` is set where a format can share bytes (`.bin`): tensors of one file with the same storage are the same bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    storage: str | None = None
    offset: int | None = None  #: where its bytes begin in the file, of safetensors
    storage_bytes: int | None = None  #: of all that `storage` is a view of, where a format can share bytes
    mapped: bool = True  #: whether torch maps its file; older ones of `.bin` are read
    whole: str | None = None  #: the name of the tensor that it is a part of, where a `.bin` holds that as one object
    whole_class: str | None = None  #: the class of that tensor


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, lt=MOST_TENSOR_BYTES)], ...]
    data_offsets: tuple[
        Annotated[int, msgspec.Meta(ge=0, lt=MOST_TENSOR_BYTES)], Annotated[int, msgspec.Meta(ge=0, lt=MOST_TENSOR_BYTES)]
    ]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


_INDEX = msgspec.json.Decoder(_Index)
_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


def parse_config(blob: Blob) -> dict[str, Any]:
    """Read a config.json: an object of bounded size and depth. NaN and Infinity pass, as they do in transformers."""
    data = _read_json(blob, CONFIG_BYTES, CONFIG_MARKS)
    try:
        config = json.loads(data.decode())  # of bytes it would guess the encoding, which transformers does not
    except (ValueError, RecursionError) as error:
        raise _not_json(blob, error) from error
    if not isinstance(config, dict):
        raise CheckpointError(blob.where, f"holds a JSON {type(config).__name__}, not an object: {DOWNLOAD_AGAIN}")
    _check_depth(blob, config)
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _not_json(blob, error) from error
    return config


def read_index(blob: Blob) -> dict[str, str]:
    """Return the shard of each tensor that a `*.index.json` lists; of one tensor at least."""
    data = _read_json(blob, INDEX_BYTES, INDEX_MARKS)
    try:
        index = _INDEX.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(blob, error) from error
    if not index.weight_map:
        raise CheckpointError(blob.where, f'its "weight_map" is empty: {DOWNLOAD_AGAIN}')
    return index.weight_map


def check_metadata(blob: Blob) -> None:
    """Refuse an index that transformers would end at in a KeyError; accelerate alone does without."""
    if _INDEX.decode(_read_json(blob, INDEX_BYTES, INDEX_MARKS)).metadata is None:
        what = 'has no "metadata", without which transformers ends in a KeyError'
        raise CheckpointError(blob.where, f'{what}: write "metadata": {{}} into it, or {DOWNLOAD_AGAIN}')


def read_safetensors(blob: Blob) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, by name.

    Refuses what the safetensors library refuses: offsets that overlap or leave holes, sizes that contradict dtype and
    shape, and tensors that end before or behind the end of the file.
    """
    check_present(blob)
    cursor = Cursor(blob)
    length = cursor.unpack("<Q")
    if length > cursor.left:
        what = f"says that its header has {length} bytes while {cursor.left} follow"
        raise CheckpointError(blob.where, f"{what}: it is cut short, or not a safetensors file; {DOWNLOAD_AGAIN}")
    if length > HEADER_BYTES:
        raise CheckpointError(blob.where, f"has a header of {format_size(length)}; this reader takes {format_size(HEADER_BYTES)}")
    entries = _decode_header(blob, cursor.take(length))
    _check_layout(blob, entries, blob.size - 8 - length)
    return [_tensor(blob, name, entry, 8 + length) for name, entry in entries.items()]


def check_shape(blob: Blob, name: str, shape: tuple[int, ...]) -> int:
    """Return the number of elements, else raise CheckpointError: too many dimensions or elements to be real."""
    elements = math.prod(shape) if len(shape) <= MOST_DIMENSIONS else MOST_TENSOR_BYTES
    if elements >= MOST_TENSOR_BYTES or max(shape, default=0) >= MOST_TENSOR_BYTES:
        raise damaged(blob, f"tensor {quote(name)} has an impossible shape of {len(shape)} dimensions")
    return elements


def _decode_header(blob: Blob, data: bytes) -> dict[str, _Entry]:
    if marks(data) > HEADER_MARKS:
        raise CheckpointError(blob.where, f"describes more tensors than a file can hold: {DOWNLOAD_AGAIN}")
    name = ""
    entries = {}
    try:
        raw = _HEADER.decode(data)
        raw.pop("__metadata__", None)
        for name, text in raw.items():
            entries[name] = _ENTRY.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        where = f"tensor {quote(name)} in its header" if name else "its header"
        raise damaged(blob, f"{where} cannot be understood ({_first_line(error)})") from error
    return entries


def _check_layout(blob: Blob, entries: Mapping[str, _Entry], size: int) -> None:
    """Check that the tensors follow one another without holes, as dtype and shape say, to the end of the file."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != position or end < begin:
            what = "ends before it begins" if end < begin else "overlaps another" if begin < position else "leaves a hole before it"
            raise damaged(blob, f"tensor {quote(name)} at bytes {begin} to {end} {what}")
        if (end - begin) * 8 != check_shape(blob, name, entry.shape) * _bits(blob, name, entry.dtype):
            raise damaged(blob, f"tensor {quote(name)} spans {end - begin} bytes, which contradicts its dtype and shape")
        position = end
    if position > size:
        raise CheckpointError(blob.where, f"is cut short: its tensors have {position} bytes, {size} are there: {DOWNLOAD_AGAIN}")
    if position < size:
        raise damaged(blob, f"holds {size - position} bytes behind its last tensor")


def _bits(blob: Blob, name: str, dtype: str) -> int:
    if dtype not in SAFETENSORS_DTYPES:
        known = ", ".join(sorted(SAFETENSORS_DTYPES))
        raise CheckpointError(blob.where, f"tensor {quote(name)} has the unknown dtype {quote(dtype)}; known: {known}")
    return DTYPE_BITS[SAFETENSORS_DTYPES[dtype]]


def _tensor(blob: Blob, name: str, entry: _Entry, start: int) -> StoredTensor:
    begin, end = entry.data_offsets
    return StoredTensor(
        name=name,
        dtype=SAFETENSORS_DTYPES[entry.dtype],
        shape=entry.shape,
        bytes=end - begin,
        file=blob.name,
        offset=start + begin,
    )


def _read_json(blob: Blob, most_bytes: int, most_marks: int) -> bytes:
    check_present(blob)
    if blob.size > most_bytes:
        raise CheckpointError(
            blob.where, f"has {format_size(blob.size)} while {format_size(most_bytes)} is the most that is read of it"
        )
    data = blob.read(0, blob.size)
    if marks(data) > most_marks:
        raise CheckpointError(blob.where, f"holds more than {most_marks:,} values: this is not what its name says")
    return data


def marks(data: bytes) -> int:
    """Count what parts values in a JSON text, without building them."""
    return sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))


def _check_depth(blob: Blob, config: dict[str, Any]) -> None:
    """Bound the depth, so that whoever walks the config later may recurse."""
    level: list[Any] = [config]
    for _ in range(CONFIG_DEPTH):
        lists = [value for value in level if isinstance(value, list)]
        level = [child for value in level if isinstance(value, dict) for child in value.values()]
        level += [child for value in lists for child in value]
        if not level:
            return
    raise CheckpointError(blob.where, f"is nested more than {CONFIG_DEPTH} levels deep: this is not what its name says")


def _not_json(blob: Blob, error: Exception) -> CheckpointError:
    return CheckpointError(blob.where, f"cannot be understood as JSON ({_first_line(error)}): {DOWNLOAD_AGAIN}")


def _first_line(error: Exception) -> str:
    """Shorten an error of a decoder, which may quote the file, and drop what a terminal would obey."""
    lines = str(error).splitlines() or [type(error).__name__]
    return "".join(letter if letter.isprintable() else "?" for letter in lines[0][:120])
