"""Was a case loaded the way it was asked for? Precision and placement are verified, not believed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Loaded, Plan
from harness.core.units import format_share, format_size
from harness.measure.aggregate import dtype_share

OK = "ok"
_HELD_LEAST = 0.99  # a few modules may be kept in 32 bits by the architecture
_PART_OFF = 0.05  # what is cut unevenly
_OVER_MOST = 1.01  # max_memory is obeyed by whole modules; buffers are not counted


def checks(plan: Plan, loaded: Loaded) -> dict[str, str]:
    """Return what was checked, each with "ok" or a sentence that says what is wrong."""
    return {
        "precision": _precision(plan, loaded),
        "max_memory": _max_memory(plan, loaded),
        "placement": _placement(plan, loaded),
        **({"ranks": _ranks(plan, loaded)} if loaded.rank_bytes else {}),
    }


def _precision(plan: Plan, loaded: Loaded) -> str:
    precision = PRECISIONS[plan.case.precision]
    wanted = plan.linear_dtype or precision.linear_dtype
    share = dtype_share(loaded, wanted)
    placed = map(str, plan.device_map.values()) if isinstance(plan.device_map, dict) else ()
    divided = precision.off_gpu is not None and len(_kinds_of(placed)) > 1  # what lies off the GPUs keeps its dtype
    if share >= _HELD_LEAST or ((divided or plan.partly) and share > 0):
        return OK
    found = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in sorted(loaded.linear_dtype_bytes.items()))
    return f"{precision.name} did not take effect: {format_share(share)} of the Linear weights are {wanted} ({found})"


def _max_memory(plan: Plan, loaded: Loaded) -> str:
    """Check that no tier holds more than it may, and a GPU that is not named nothing; what is left over lies on the disk."""
    if plan.max_memory is None:
        return OK
    allowed = {tier: 0 for tier in loaded.tier_bytes if tier.startswith("gpu")} | plan.max_memory
    for tier, most in allowed.items():
        used = loaded.tier_bytes.get(tier, 0)
        if used > most * _OVER_MOST:
            return f"{tier} holds {format_size(used)} of weights, and max_memory allows {format_size(most)}"
    return OK


def _placement(plan: Plan, loaded: Loaded) -> str:
    """Check that weights lie where the placement says: on no other kind of tier, in the last where it must spill, as planned."""
    placement = PLACEMENTS[plan.case.placement]
    used = _kinds_of(_holding(loaded))
    strange = used - set(placement.devices)
    if strange:
        return f"weights lie on {', '.join(sorted(strange))}, which {placement.name} does not use"
    if said := _astray(plan, loaded):
        return said
    if "offloads_to_cpu" in placement.traits and placement.devices[-1] not in used:
        return f"{placement.name} put nothing on the {placement.devices[-1]}"
    return _mapped(plan, loaded) if placement.prints_map else OK


def _astray(plan: Plan, loaded: Loaded) -> str:
    """Say where weights lie that were planned elsewhere; an empty text if none do.

    A placement that names its device must have used that very one. With others the libraries look for themselves which GPUs have
    room; but what was planned on a GPU must have weights on one, and what was not must have none: they go on in the RAM when they
    cannot use a card, and such a figure would stand under the card's name.
    """
    planned = {name for name, tier in plan.estimate.tiers.items() if tier.weights_bytes} if plan.estimate else set()
    found = _holding(loaded)
    if not planned or loaded.rank_bytes:
        return ""
    if not isinstance(PLACEMENTS[plan.case.placement].device_map, Mapping):
        planned, found = _kinds_of(planned), _kinds_of(found)
        found = planned if ("gpu" in planned) == ("gpu" in found) else found
    return "" if found == planned else f"weights lie on {_listed(found)}, and were planned on {_listed(planned)}"


def _holding(loaded: Loaded) -> set[str]:
    """Return the tiers that hold weights."""
    return {tier for tier, size in loaded.tier_bytes.items() if size}


def _kinds_of(tiers: Iterable[str]) -> set[str]:
    return {tier.split(":")[0] for tier in tiers}


def _listed(tiers: Iterable[str]) -> str:
    return ", ".join(sorted(tiers)) or "nothing"


def _ranks(plan: Plan, loaded: Loaded) -> str:
    """Check that each of the processes that share the model holds its part, not all, where that was planned."""
    planned = (
        {name: tier.weights_bytes for name, tier in plan.estimate.tiers.items() if tier.weights_bytes} if plan.estimate else {}
    )
    if not planned:
        return OK
    if strange := sorted(loaded.tier_bytes.keys() - planned):
        return f"weights lie on {', '.join(strange)}, and were to be shared on {', '.join(planned)}"
    whole = sum(planned.values())
    part = whole / len(loaded.rank_bytes)
    for rank, held_bytes in enumerate(loaded.rank_bytes):
        if not part * (1 - _PART_OFF) < held_bytes < (part + whole) / 2:  # an architecture may hold more than is planned whole
            return f"rank {rank} holds {format_size(held_bytes)} of weights, and its part is {format_size(part)}"
    return OK


def _mapped(plan: Plan, loaded: Loaded) -> str:
    """Check that every module lies where the map that we computed says."""
    planned = plan.device_map if isinstance(plan.device_map, dict) else {}
    found = {path: _home(loaded.device_map, path) for path in planned}
    wrong = [path for path, tier in planned.items() if found[path] != tier]
    if not wrong:
        return OK
    first = wrong[0]
    return f"{len(wrong)} of {len(planned)} entries of the device map were not obeyed: {first or 'the model'} is on {found[first]}"


def _home(device_map: Mapping[str, str], path: str) -> str | None:
    """Return the tier that a map gives to a module, by the closest entry at or above it."""
    while path and path not in device_map:
        path = path.rpartition(".")[0]
    place = device_map.get(path)
    return f"gpu:{place}" if place is not None and place.isdecimal() else place
