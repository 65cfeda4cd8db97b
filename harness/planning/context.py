"""How long a prompt and its answer may get before a case no longer fits."""

from __future__ import annotations

import msgspec

from harness.core.records import Case
from harness.planning.cost import estimate
from harness.planning.cost.footprint import Footprint
from harness.planning.verdict import Judge, pooled

# Where a config does not say how many tokens its model knows.
_MOST_TOKENS = 1 << 20


def max_context(footprint: Footprint, case: Case, judge: Judge) -> int | None:
    """Return the most tokens, prompt and answer together, with which a case still fits; at most what the model knows.

    None if it does not even fit with one token of prompt.
    """
    least, most = case.workload.new_tokens + 1, judge.spec.context_length or _MOST_TOKENS
    if not _fits(footprint, case, judge, least):
        return None
    if _fits(footprint, case, judge, most):  # as it mostly does: no search
        return most
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if _fits(footprint, case, judge, middle) else (least, middle - 1)
    return least


def _fits(footprint: Footprint, case: Case, judge: Judge, context: int) -> bool:
    """Say whether a case fits with `context` tokens, by the best estimate."""
    prompt = max(1, context - case.workload.new_tokens)
    longer = footprint.with_workload(msgspec.structs.replace(case.workload, prompt_tokens=prompt))
    tiers = pooled(estimate.memory(longer, judge.machine), judge.machine)
    return not any(judge.is_short(name, tier, case) for name, tier in tiers.items() if name != "disk")
