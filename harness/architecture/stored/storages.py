"""What torch.load keeps of `.bin` files: whole storages, of which weights are views.

transformers 5.24 (`modeling_utils.load_state_dict`) maps a zip, so that of a storage only pages of its views come into memory, and
lets torch read what is older, each storage whole. Weights that are not cast stay views, and keep their storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from harness.architecture.key_mapping import Naming
from harness.architecture.skeleton import Skeleton
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.core.records import Record

_CAST = ("float16", "bfloat16", "float32", "float64")  # to the dtype that is asked for; no integer, nor float of 8 bits


class Storages(Record, frozen=True, kw_only=True):
    """How torch holds the files of a model; of safetensors there is nothing to say."""

    mapped: bool = True  #: whether it maps them
    #: by dtype, bytes that weights keep beyond their own, as views of storages; below 0 where several share bytes
    beyond: Mapping[str, int] = {}

    def kept_in(self, dtype: str) -> int:
        """Return what weights keep beyond their own where all floats are in `dtype`: what is cast is no view any more."""
        return sum(size for stored, size in self.beyond.items() if stored == dtype or stored not in _CAST)


def storages_of(tensors: Iterable[StoredTensor], found: Skeleton) -> Storages:
    """Return how the files of these tensors are held; weights that a skeleton ties count once."""
    stored = [tensor for tensor in tensors if tensor.storage is not None and tensor.storage_bytes is not None]
    mapped = all(tensor.mapped for tensor in stored)
    if not stored:
        return Storages()
    own = {tensor.name for tensor in _own(stored, found)}
    rest: dict[tuple[str, str], int] = {}
    dtypes = {}
    for tensor in stored:
        key = (tensor.file, str(tensor.storage).partition(":")[0])
        rest.setdefault(key, tensor.storage_bytes or 0)
        dtypes[key] = tensor.dtype
        rest[key] -= tensor.bytes if tensor.name in own else 0
    beyond: Counter[str] = Counter()
    for key, size in rest.items():
        beyond[dtypes[key]] += min(size, 0) if mapped else size
    return Storages(mapped=mapped, beyond=dict(beyond))


def weight_bytes(tensors: Iterable[StoredTensor], found: Skeleton) -> int:
    """Return the bytes of the tensors that a model has as its own: masks are not loaded, and what it ties counts once."""
    return sum(tensor.bytes for tensor in _own(tensors, found) if tensor.dtype != "bool")


def _own(tensors: Iterable[StoredTensor], found: Skeleton) -> Iterator[StoredTensor]:
    """Yield the tensors that are no other's by a tie."""
    naming, wanted = found.naming or Naming(), {weight.path for weight in found.weights}
    for tensor in tensors:
        path = tensor.name if tensor.name in wanted or not found.tied else naming.place(tensor.name, wanted).name
        if path not in found.tied:
            yield tensor
