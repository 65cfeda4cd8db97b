"""Routed experts in RAM and all else on a GPU, as a device map without entries inside others: accelerate moves what is inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from harness.architecture.skeleton import Piece, Skeleton, is_stacked
from harness.planning.cost.inventory import is_expert
from harness.planning.device_map.infer import Device


@lru_cache(maxsize=16)  # every case of a search asks for the same
def experts_of(skeleton: Skeleton) -> Mapping[str, str]:
    """Return the modules that hold routed experts, stacked as transformers 5 does, and the block of each; none of a dense model."""
    inside = ((piece, weight) for piece in skeleton.pieces for part in piece.like.inside for weight in part.weights)
    stacked = ((piece, weight.path) for piece, weight in inside if is_stacked(weight) and is_expert(weight.path))
    return {piece.path + path.rpartition(".")[0].removeprefix(piece.like.path): piece.path for piece, path in stacked}


def blocks_of_experts(skeleton: Skeleton) -> list[str]:
    """Return the blocks that have routed experts, in order."""
    return list(dict.fromkeys(experts_of(skeleton).values()))


def experts_map(skeleton: Skeleton, gpu: Device, blocks: Iterable[str]) -> dict[str, Device]:
    """Map a model to a GPU but for the experts of some blocks, which stay in RAM."""
    apart = set(blocks)
    homes = {module for module, block in experts_of(skeleton).items() if block in apart}
    found: dict[str, Device] = {}
    for piece in skeleton.pieces:
        paths = _paths(piece) if piece.path in apart else [piece.path]
        for path in paths:
            home = next((module for module in homes if path.startswith(f"{module}.")), None)
            found[home or _outermost(path, homes)] = "cpu" if home else gpu
    return found


def _paths(piece: Piece) -> list[str]:
    return [piece.path + weight.path.removeprefix(piece.like.path) for part in piece.like.inside for weight in part.weights]


def _outermost(path: str, homes: set[str]) -> str:
    """Return the outermost module around a tensor that has no experts in it."""
    parts = path.split(".")
    around = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return next(name for name in around if not any(f"{module}.".startswith(f"{name}.") for module in homes))
