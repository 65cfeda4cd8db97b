"""What the names of stored tensors say of a model's weights: whether each is held as such, and which tables are packed."""

from __future__ import annotations

from collections.abc import Set

from harness.architecture.skeleton import Skeleton
from harness.checkpoint.quantization import Packed


def as_held(found: Skeleton, names: Set[str]) -> bool:
    """Say whether files hold every tensor of a model under its own name."""
    return all(weight.path in names for weight in found.weights if weight.tensor.kind != "unsaved" and not weight.tied_to)


def packed_tables(found: Skeleton, packed: Packed | None, names: Set[str]) -> frozenset[str]:
    """Return embedding and head that are packed as the Linear weights of blocks are, of which files have parts alone."""
    if packed is None or packed.layout is None or not packed.layout.anywhere:
        return frozenset()
    tables = (weight for weight, _ in found.tally if len(weight.tensor.shape) == 2 and not weight.quantizes and not weight.tied_to)
    absent = frozenset(weight.path for weight in tables if weight.path not in names and weight.tensor.kind != "unsaved")
    return frozenset(path for path in absent if packed.layout.holds_whole(path, names))
