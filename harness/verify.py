"""Was a case loaded the way it was asked for? Precision and placement are verified, not believed."""

from __future__ import annotations

from harness.case import Loaded, Plan
from harness.figures import held
from harness.placement import PLACEMENTS
from harness.precision import PRECISIONS
from harness.units import format_share, format_size

OK = "ok"
_HELD_LEAST = 0.99  # a few modules may be kept in 32 bits by the architecture
_OVER_MOST = 1.01  # max_memory is obeyed by whole modules; buffers are not counted


def checks(plan: Plan, loaded: Loaded) -> dict[str, str]:
    """Return what was checked, each with "ok" or a sentence that says what is wrong."""
    return {
        "precision": _precision(plan, loaded),
        "max_memory": _max_memory(plan, loaded),
        "placement": _placement(plan, loaded),
    }


def _precision(plan: Plan, loaded: Loaded) -> str:
    precision = PRECISIONS[plan.case.precision]
    share = held(loaded, precision.holds)
    if share >= _HELD_LEAST:
        return OK
    found = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in sorted(loaded.linear_dtype_bytes.items()))
    return f"{precision.name} did not take effect: {format_share(share)} of the Linear weights are {precision.holds} ({found})"


def _max_memory(plan: Plan, loaded: Loaded) -> str:
    for tier, most in (plan.max_memory or {}).items():
        used = loaded.tier_bytes.get(tier, 0)
        if used > most * _OVER_MOST:
            return f"{tier} holds {format_size(used)} of weights, and max_memory allows {format_size(most)}"
    return OK


def _placement(plan: Plan, loaded: Loaded) -> str:
    """Check that weights lie where the placement says: on no other kind of tier, and in the last where it must spill."""
    placement = PLACEMENTS[plan.case.placement]
    used = {tier.split(":")[0] for tier, size in loaded.tier_bytes.items() if size}
    strange = used - set(placement.devices)
    if strange:
        return f"weights lie on {', '.join(sorted(strange))}, which {placement.name} does not use"
    if "spills" in placement.traits and placement.devices[-1] not in used:
        return f"{placement.name} put nothing on the {placement.devices[-1]}"
    return OK
