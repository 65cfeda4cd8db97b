"""A model of the catalog as a checkpoint: the tensors that its files hold, from its config and skeleton, without reading them."""

from __future__ import annotations

from collections.abc import Iterator

from harness.architecture import skeleton, skeleton_source, synthetic
from harness.architecture.skeleton import Skeleton
from harness.catalog import shipped
from harness.checkpoint import quantization
from harness.checkpoint.published import Stored, published
from harness.checkpoint.quantization import Packed
from harness.checkpoint.reader import Checkpoint, StoredTensor, stated_dtype

NOTE = "from the catalog, not from its files; --revision main reads their headers on the hub"


def describe_shipped(hub_id: str) -> Checkpoint:
    """Return the checkpoint of a model whose config is shipped; tensors have the names that transformers has for them.

    Its files are not known, so it has none.
    """
    config, stored = shipped.catalog()[hub_id].config, published(hub_id) or Stored(bytes=0, origin="")
    shape, packed = skeleton_source.named(hub_id), quantization.packed(config)
    dtype = stored.dtype or stated_dtype(config)
    if packed is not None and synthetic.unwritten(shape, packed):
        tensors = tuple(_whole_tensors(shape, dtype, packed))
    else:
        written = synthetic.stored_tensors(shape, stored, dtype, packed)
        tensors = tuple(StoredTensor(name=t.name, dtype=t.dtype, shape=t.shape, bytes=t.bytes, file="") for t in written)
    return Checkpoint(path=hub_id, config=config, tensors=tensors, files=())


def _whole_tensors(shape: Skeleton, dtype: str, packed: Packed) -> Iterator[StoredTensor]:
    """Yield weights whose packed parts have no known names: each as one tensor, of the bytes that it takes packed."""
    for weight in shape.weights:
        if weight.tensor.kind == "unsaved" or weight.tied_to:
            continue
        size = skeleton.packed_weight_bytes(weight, packed)
        kept = size < weight.elements * 2
        yield StoredTensor(name=weight.path, dtype="uint8" if kept else dtype, shape=weight.tensor.shape, bytes=size, file="")
