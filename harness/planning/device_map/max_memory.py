"""The max_memory to load with: by the placement's own rule, or so that transformers obeys limits that it does not see."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from harness.core.dtypes import DTYPE_BYTES
from harness.core.placements import Placement
from harness.core.records import Machine
from harness.planning.device_map.infer import MARGIN, STRATEGIES, free_bytes
from harness.planning.device_map.tiers import fillable

if TYPE_CHECKING:
    from harness.checkpoint.reader import Checkpoint


_BLOCK = re.compile(r"\.(\d+)\.")


class Named(NamedTuple):
    """A tensor by name and shape."""

    name: str
    shape: tuple[int, ...]


class Stock(NamedTuple):
    """The tensors of a model without a checkpoint."""

    tensors: Sequence[Named]


class Sizes:
    """Bytes of a model's weights: the largest tensor outside the blocks, and the blocks.

    They take a 16- or 32-bit dtype, but for those in `packed`, bytes by name.
    """

    def __init__(self, weights: Checkpoint | Stock, dtype: str, packed: Mapping[str, int] | None = None) -> None:
        blocks: dict[str, int] = defaultdict(int)
        outside, width = [0], DTYPE_BYTES[dtype]
        for tensor in weights.tensors:
            plain = math.prod(tensor.shape) * width
            size = packed.get(tensor.name, plain) if packed else plain
            block = _BLOCK.search(tensor.name)
            if block:
                blocks[tensor.name[: block.end() - 1]] += size
            else:
                outside.append(size)
        self.outside_bytes, self.blocks_bytes = max(outside), sum(blocks.values())
        # The placement algorithm keeps room for the largest layer on every device from which it spills to the disk.
        self.room_bytes = max(self.outside_bytes, max(blocks.values(), default=0))


def _spill_to_cpu(sizes: Sizes, machine: Machine) -> dict[str, int]:
    """Let about 60 % of the blocks live on one GPU, less if three quarters of it are too small for them; the rest in RAM."""
    wanted = sizes.outside_bytes + sizes.blocks_bytes * 6 // 10 + sizes.room_bytes
    gpu, cpu = machine.gpus[machine.main_gpu], machine.tier("cpu")
    return {
        gpu.name: min(wanted, (gpu.capacity_bytes or wanted) * 3 // 4),
        "cpu": (cpu.capacity_bytes if cpu else None) or 1 << 40,
    }


def _spill_to_disk(sizes: Sizes, machine: Machine) -> dict[str, int]:
    """Let the fast tiers take the embedding and half of the blocks between them; the other half stays on the disk."""
    if not machine.gpus:
        return {"cpu": sizes.outside_bytes + sizes.blocks_bytes // 2 + sizes.room_bytes}
    gpu = machine.gpus[machine.main_gpu]
    wanted = sizes.outside_bytes + sizes.blocks_bytes // 4 + sizes.room_bytes
    return {
        gpu.name: min(wanted, (gpu.capacity_bytes or wanted) * 3 // 4),
        "cpu": sizes.blocks_bytes // 4 + sizes.room_bytes,
    }


def max_memory(placement: Placement, machine: Machine, sizes: Callable[[], Sizes]) -> dict[str, int] | None:
    """Return the `max_memory` to load with: by the placement's own rule, or so that transformers obeys limits that it does not see.

    None if the libraries may look for themselves. Under a limit they are given what they would take of a machine of that size.
    """
    if placement.limits is not None:
        return LIMITS[placement.limits](sizes(), machine)
    tiers = [tier for tier in fillable(machine) if tier.capacity_bytes is not None]
    if placement.device_map not in STRATEGIES or all(tier.limit_bytes is None for tier in tiers):
        return None
    takes_all = {"cpu": placement.takes_all_ram, "gpu": len(machine.gpus) > 1}
    return {tier.name: int((free_bytes(tier) or 0) * (1.0 if takes_all[tier.kind] else MARGIN)) for tier in tiers}


LIMITS: Mapping[str, Callable[[Sizes, Machine], dict[str, int]]] = {
    "spill-to-cpu": _spill_to_cpu,
    "spill-to-disk": _spill_to_disk,
}


def looks_for_itself(placement: Placement, machine: Machine) -> bool:
    """Say whether a library asks every GPU what is free, which begins on it (`max_memory` gives no limits)."""
    is_limited = any(tier.limit_bytes is not None for tier in machine.tiers if tier.kind in ("gpu", "cpu"))
    return placement.device_map in STRATEGIES and placement.limits is None and not is_limited
