"""What a plan says beyond its workload: how its KV cache grows, and what to try instead, among plans that were made as well."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Plan, Verdict
from harness.planning.cost.footprint import Footprint

_AXES = ("precision", "placement", "kv", "attention")  # of a case, beside its model


def kv_growth(footprint: Footprint, context_length: int | None) -> dict[str, list[tuple[int, int]]]:
    """Return by tier the bytes of the KV cache at counts of tokens between which it grows evenly, up to the model's context."""
    windows = [kind.window for kind in footprint.skeleton.attention if kind.window]
    cached = footprint.workload.cached_tokens
    most = max(context_length or cached, cached)
    found: dict[str, list[tuple[int, int]]] = {}
    for count in sorted({1, cached, most, *(window for window in windows if window < most)}):
        for tier, size in _kv_after(footprint, count).items():
            found.setdefault(tier, []).append((count, size))
    return found


def _kv_after(footprint: Footprint, tokens: int) -> dict[str, int]:
    """Return the KV cache after so many tokens; a static one is whole from the start."""
    if footprint.kv_form.name == "static":
        return footprint.kv
    return footprint.with_workload(msgspec.structs.replace(footprint.workload, prompt_tokens=tokens, new_tokens=1)).kv


def lighter(one: Plan, others: Sequence[Plan]) -> dict[str, str]:
    """Say by tier of a plan in which one other thing it takes less there: "Try --precision int4 or --kv fp8." """
    found = {}
    for name, tier in one.estimate.tiers.items() if one.estimate else ():
        words = []
        for axis in _AXES:
            alike = [other for other in others if other.verdict.is_good and _differs_in(axis, one.case, other.case)]
            sizes = {getattr(other.case, axis): _needed(other, name) for other in alike}
            least = min(sizes, key=lambda value: sizes[value], default=None)
            words += [f"--{axis} {least}"] if least is not None and sizes[least] < tier.needed_bytes else []
        if words:
            found[name] = f"Try {' or '.join(words)}."
    return found


def _differs_in(axis: str, one: Case, other: Case) -> bool:
    """Say whether a case differs in this one thing, and is asked for by a name."""
    same = (*_AXES, "model", "workload")
    return bool(getattr(other, axis)) and [name for name in same if getattr(one, name) != getattr(other, name)] == [axis]


def _needed(one: Plan, tier: str) -> int:
    tiers = one.estimate.tiers if one.estimate else {}
    return tiers[tier].needed_bytes if tier in tiers else 0


def with_hint(one: Plan, others: Sequence[Plan]) -> Plan:
    """Add to a plan that is too big what else would do: another precision of no more bits, or one other thing in which it goes."""
    if one.verdict is not Verdict.TOO_BIG or one.why is None:
        return one
    order = sorted(others, key=lambda other: other.verdict is not Verdict.FITS)
    good = [other.case for other in order if other.verdict.is_good and other.case.model == one.case.model]
    bits, words = PRECISIONS[one.case.precision].bits, []
    for axis in _AXES:
        alike = (case for case in good if all(getattr(case, name) == getattr(one.case, name) for name in _AXES if name != axis))
        found = next((case for case in alike if PRECISIONS[case.precision].bits <= bits and getattr(case, axis)), None)
        words += [f"--{axis} {getattr(found, axis)}"] if found is not None else []
    return msgspec.structs.replace(one, why=f"{one.why} Try {' or '.join(words)}.") if words else one
