"""What a `.bin` of torch.save holds: names, shapes and dtypes, from its pickle and its directory.

Two containers, as torch/serialization.py has them: since torch 1.6 a zip archive with `PREFIX/data.pkl` and the storages as
`PREFIX/data/KEY`; before that a sequence of pickles with the storages behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from harness.checkpoint.formats.files import DOWNLOAD_AGAIN, Blob, Cursor, check_present, damaged, quote
from harness.checkpoint.formats.pickle_objects import Storage, View, Whole
from harness.checkpoint.formats.pickle_reader import CONVERT, Unpickler
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.checkpoint.formats.zip_directory import Member, read_directory, start_of
from harness.core.errors import CheckpointError

PICKLE_BYTES = 8 << 20  # 15,000 tensors take about 3 MiB

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_bin(blob: Blob) -> list[StoredTensor]:
    """Return the tensors of a file that torch.save wrote, zip or older, by name.

    Tensors that share a storage (tied weights) carry the same `Tensor.storage`.
    """
    check_present(blob)
    magic = blob.read(0, min(4, blob.size))
    is_zip = magic == b"PK\x03\x04"
    views = _read_zip(blob) if is_zip else _read_legacy(blob)
    if not views:
        raise CheckpointError(blob.where, f"holds no tensors by name at its top level, so it is not a state dict: {CONVERT}")
    return [tensor for name, held in views.items() for tensor in _tensors(blob, name, held, mapped=is_zip)]


def _read_zip(blob: Blob) -> dict[str, View | Whole]:
    members = read_directory(blob)
    prefix = next(iter(members), "").partition("/")[0]
    member = members.get(f"{prefix}/data.pkl")
    if member is None:
        raise CheckpointError(blob.where, f"is a zip archive without {quote(prefix)}/data.pkl, so torch.save did not write it")
    if member.compressed or member.size > PICKLE_BYTES:
        raise CheckpointError(blob.where, f"its data.pkl is compressed or larger than any checkpoint's: {CONVERT}")
    start = start_of(blob, member)
    unpickler = Unpickler(Cursor(blob, start=start, end=start + member.size, first=member.size))
    views = _named_views(unpickler.load())
    _check_members(blob, prefix, members, unpickler.storages.values())
    return views


def _check_members(blob: Blob, prefix: str, members: Mapping[str, Member], storages: Iterable[Storage]) -> None:
    for storage in storages:
        member = members.get(f"{prefix}/data/{storage.key}")
        if member is None or member.size < storage.bytes:
            held = f"{member.size} bytes" if member else "nothing"
            raise damaged(blob, f"holds {held} for storage {quote(storage.key)} of {storage.bytes} bytes")


def _read_legacy(blob: Blob) -> dict[str, View | Whole]:
    """Read the pickles of magic number, protocol, system, object and storage keys; the storages follow, each with its length."""
    cursor = Cursor(blob, end=PICKLE_BYTES)
    if cursor.take(2)[:1] != b"\x80":
        start = blob.read(0, min(8, blob.size))
        raise CheckpointError(blob.where, f"is not a file of torch.save: it begins with {start!r}")
    cursor = Cursor(blob, end=PICKLE_BYTES)
    magic, protocol = Unpickler(cursor).load(), Unpickler(cursor).load()
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise CheckpointError(blob.where, f"is a pickle, but not of torch.save: {CONVERT}")
    Unpickler(cursor).load()
    unpickler = Unpickler(cursor)
    views = _named_views(unpickler.load())
    keys = Unpickler(cursor).load()
    needed = cursor.position + sum(8 + storage.bytes for storage in unpickler.storages.values())
    if type(keys) is not list or needed > blob.size:
        raise CheckpointError(blob.where, f"is cut short: its storages end at byte {needed} of {blob.size}: {DOWNLOAD_AGAIN}")
    return views


def _named_views(value: Any) -> dict[str, View | Whole]:
    if type(value) is not dict:
        return {}
    return {name: held for name, held in value.items() if type(name) is str and type(held) in (View, Whole)}


def _tensors(blob: Blob, name: str, held: View | Whole, *, mapped: bool) -> list[StoredTensor]:
    """Return a tensor, or those that it wraps, by the names that torchao's flatten_tensor_state_dict gives them in safetensors."""
    if isinstance(held, View):
        return [_tensor(blob, name, held, mapped=mapped)]
    module, _, own = name.rpartition(".")
    return [
        replace(_tensor(blob, f"{module}._{own}_{part}", view, mapped=mapped), whole=name, whole_class=held.path)
        for part, view in held.parts.items()
    ]


def _tensor(blob: Blob, name: str, view: View, *, mapped: bool) -> StoredTensor:
    return StoredTensor(
        name=name,
        dtype=view.dtype,
        shape=view.shape,
        bytes=view.bytes,
        file=blob.name,
        storage=f"{view.storage.key}:{view.offset}:{view.bytes}",
        storage_bytes=view.storage.bytes,
        mapped=mapped,
    )
