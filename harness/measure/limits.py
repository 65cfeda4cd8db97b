"""The guard: called with every sample, it ends a case that passes its own limit, or before the machine is out of memory.

RULES is the table: what is compared with what, and in which direction. If the kernel enforces a case's limit on RAM
(`harness.machine.cgroup`), the guard leaves that one to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from harness.core.records import Record
from harness.machine.headroom import Available, available
from harness.measure.sampler import Sample

# No rule of samples: what the worker's start alone takes is more than its group may hold (`harness.run.runner`).
OVER_AT_START = "ram-limit at start"


class Limits(Record, frozen=True, kw_only=True):
    """What a case may use, None for no limit: anonymous memory, device memory on each GPU; and what must be left to the machine."""

    anon_bytes: int | None = None
    vram_bytes: int | None = None
    floor_bytes: int | None = None


class Breach(Record, frozen=True, kw_only=True):
    """Which rule was broken, its limit and the value that was seen; `held_bytes` is the case's memory that cannot be dropped."""

    rule: str
    limit_bytes: int
    value_bytes: int
    held_bytes: int


class LimitRule(NamedTuple):
    """One row: `broken(value, limit)` ends the case; the value is the sample's, or what is available to everybody."""

    name: str
    limit: Callable[[Limits], int | None]
    value: Callable[[Sample, Available], int]
    broken: Callable[[int, int], bool]


RULES = (
    LimitRule("ram-limit", lambda limits: limits.anon_bytes, lambda sample, _: sample.anon_bytes, operator.gt),
    LimitRule(
        "vram-limit", lambda limits: limits.vram_bytes, lambda sample, _: max(sample.vram_bytes.values(), default=0), operator.gt
    ),
    LimitRule("machine-memory", lambda limits: limits.floor_bytes, lambda _, available: available(), operator.lt),
)


class LimitGuard:
    """Holds samples against RULES; at the first breach it calls `end` with the rule's name, once, and keeps the breach."""

    def __init__(self, limits: Limits, end: Callable[[str], None]) -> None:
        self.limits, self._end, self._available = limits, end, available()
        self.breach: Breach | None = None

    def __call__(self, sample: Sample) -> None:
        if self.breach is None and (breach := judge_limits(sample, self.limits, self._available)) is not None:
            self.trip(breach)

    def trip(self, breach: Breach) -> None:
        """End the case for a breach that was seen elsewhere."""
        self.breach = breach
        self._end(breach.rule)


def judge_limits(sample: Sample, limits: Limits, available: Available) -> Breach | None:
    """Return the first rule that a sample breaks, None if it breaks none."""
    for rule in RULES:
        limit = rule.limit(limits)
        if limit is not None and rule.broken(value := rule.value(sample, available), limit):
            return Breach(rule=rule.name, limit_bytes=limit, value_bytes=value, held_bytes=sample.anon_bytes)
    return None
