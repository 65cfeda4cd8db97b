"""Where a case puts every tensor, as the libraries decide it: the device map of its call, and the tier of each piece."""

from __future__ import annotations

from collections.abc import Mapping

from harness.architecture.skeleton import Skeleton
from harness.core.placements import Placement
from harness.core.records import Machine, Tier
from harness.planning.cost.memory import WeightFormat, counted_bytes
from harness.planning.device_map.infer import MARGIN, Device, Widths, device_of, free_bytes, infer

# A tier of unknown size counts as endless for the map; the verdict says that it is unknown.
ENDLESS = 1 << 50


def device_map(
    skeleton: Skeleton,
    placement: Placement,
    widths: Widths,
    machine: Machine,
    max_memory: Mapping[str, int] | None,
) -> dict[str, Device]:
    """Return the map that this placement's call ends up with: module -> number of a GPU, "cpu" or "disk"."""
    if placement.moves_after_loading:
        return {"": placement.gpu}
    if not isinstance(placement.device_map, str):
        return dict(placement.device_map or {"": "cpu"})
    if max_memory is not None:
        given: dict[Device, int | str] = {device(tier): size for tier, size in max_memory.items()}
        return infer(skeleton, widths, strategy=placement.device_map, max_memory=given)
    return infer(skeleton, widths, strategy=placement.device_map, free=_free(placement, machine))


def _free(placement: Placement, machine: Machine) -> dict[Device, int]:
    found = {device(tier.name): free_bytes(tier) for tier in fillable(machine)}
    free = {place: ENDLESS if size is None else size for place, size in found.items()}
    if placement.takes_all_ram and "cpu" in free:
        free["cpu"] = int(free["cpu"] / MARGIN)  # accelerate's own dispatch takes all of the RAM
    return free


def fillable(machine: Machine) -> list[Tier]:
    """Return the tiers that libraries fill before the disk: the GPUs and the RAM, but for a GPU that shares it.

    There accelerate lists no "cpu", which would count the same bytes twice (utils/modeling.py, get_max_memory).
    """
    kinds = ("gpu",) if machine.shares_ram else ("gpu", "cpu")
    return [tier for tier in machine.tiers if tier.kind in kinds]


def device(tier: str) -> Device:
    """Turn a tier's name into what the libraries call it: "gpu:0" is 0."""
    return int(tier.removeprefix("gpu:")) if tier.startswith("gpu:") else tier


def tier(device: Device) -> str:
    """Turn a device of a map into the name of its tier."""
    return f"gpu:{device}" if isinstance(device, int) else device


def tiers(skeleton: Skeleton, placed: Mapping[str, Device]) -> tuple[str, ...] | str:
    """Return the tier of every piece, in order, or the one tier of all.

    What a map leaves out (buffers beside split modules) is in RAM.
    """
    homes = set(placed.values())
    if len(homes) == 1 and "" in placed:
        return tier(homes.pop())
    names: dict[Device | None, str] = {place: tier(place) for place in homes} | {None: "cpu"}
    return tuple([names[device_of(placed, piece.path)] for piece in skeleton.pieces])


def widths_of(skeleton: Skeleton, fmt: WeightFormat) -> Widths:
    """Return how transformers counts a weight format when it infers a device map."""
    if fmt.packed_bits is None:
        return Widths(fmt.dtype, fmt.quantizer)
    kinds = skeleton.kinds if fmt.counted_as is None else ()
    sizes = {path: size for kind in kinds for path, size in counted_bytes(kind, fmt).items()}
    return Widths(fmt.dtype, fmt.counted_as, sizes or None, fmt.margin)
