"""What torch.load keeps of `.bin` files: whole storages, of which weights are views.

transformers 5.24 (`modeling_utils.load_state_dict`) maps a zip, so that of a storage only pages of its views come into memory, and
lets torch read what is older, each storage whole. Weights that are not cast stay views, and keep their storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from harness.architecture.key_mapping import Naming
from harness.architecture.skeleton import Skeleton
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.core.records import Record


class Storages(Record, frozen=True, kw_only=True):
    """How torch holds the files of a model; of safetensors there is nothing to say."""

    mapped: bool = True  #: whether it maps them
    beyond: int = 0  #: bytes that weights keep beyond their own, as views of storages; below 0 where several share bytes


def storages_of(tensors: Iterable[StoredTensor], found: Skeleton) -> Storages:
    """Return how the files of these tensors are held; weights that a skeleton ties count once."""
    stored = [tensor for tensor in tensors if tensor.storage is not None and tensor.storage_bytes is not None]
    mapped = all(tensor.mapped for tensor in stored)
    if not stored:
        return Storages()
    naming, wanted = found.naming or Naming(), {weight.path: weight for weight in found.weights}
    sizes: dict[tuple[str, str], int] = {}
    viewed: Counter[tuple[str, str]] = Counter()
    for tensor in stored:
        key = (tensor.file, str(tensor.storage).partition(":")[0])
        sizes[key] = tensor.storage_bytes or 0
        path = tensor.name if tensor.name in wanted else naming.place(tensor.name, wanted).name
        viewed[key] += 0 if path in found.tied else tensor.bytes
    rest = [size - viewed[key] for key, size in sizes.items()]
    return Storages(mapped=mapped, beyond=sum(min(one, 0) if mapped else one for one in rest))
