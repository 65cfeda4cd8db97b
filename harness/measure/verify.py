"""Was a case loaded the way it was asked for? Precision and placement are verified, not believed."""

from __future__ import annotations

from collections.abc import Mapping

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
    divided = precision.off_gpu is not None and len(_kinds(plan)) > 1  # what lies off the GPUs keeps its dtype
    if share >= _HELD_LEAST or (divided and share > 0):
        return OK
    found = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in sorted(loaded.linear_dtype_bytes.items()))
    return f"{precision.name} did not take effect: {format_share(share)} of the Linear weights are {wanted} ({found})"


def _kinds(plan: Plan) -> set[str]:
    """Return the kinds of tiers that the device map names."""
    placed = plan.device_map.values() if isinstance(plan.device_map, dict) else ()
    return {str(tier).split(":")[0] for tier in placed}


def _planned_kinds(plan: Plan) -> set[str]:
    """Return the kinds of tiers that the estimate has weights on; empty without an estimate."""
    tiers = plan.estimate.tiers if plan.estimate else {}
    return {name.split(":")[0] for name, tier in tiers.items() if tier.weights_bytes}


def _max_memory(plan: Plan, loaded: Loaded) -> str:
    for tier, most in (plan.max_memory or {}).items():
        used = loaded.tier_bytes.get(tier, 0)
        if used > most * _OVER_MOST:
            return f"{tier} holds {format_size(used)} of weights, and max_memory allows {format_size(most)}"
    return OK


def _placement(plan: Plan, loaded: Loaded) -> str:
    """Check that weights lie where the placement says: on no other kind of tier, and in the last where it must spill.

    What was planned for a GPU must have some of its weights on one, and what was not must have none: the libraries go on in the RAM
    when they cannot use a card, and such a figure would stand under the card's name.
    """
    placement = PLACEMENTS[plan.case.placement]
    used = {tier.split(":")[0] for tier, size in loaded.tier_bytes.items() if size}
    strange = used - set(placement.devices)
    if strange:
        return f"weights lie on {', '.join(sorted(strange))}, which {placement.name} does not use"
    planned = _planned_kinds(plan)
    if planned and not loaded.rank_bytes and ("gpu" in planned) != ("gpu" in used):
        return f"weights lie on {', '.join(sorted(used)) or 'nothing'}, and were planned on {', '.join(sorted(planned))}"
    if "offloads_to_cpu" in placement.traits and placement.devices[-1] not in used:
        return f"{placement.name} put nothing on the {placement.devices[-1]}"
    return _mapped(plan, loaded) if placement.prints_map else OK


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
