"""Which cases of a run need not run again, because what an earlier run showed of them is still valid. Pure functions.

A result is kept when case, files of the model, loading code, versions and machine are what they were, and the case came to an
end that would be the same again. What failed a test is never kept in silence: a second run must not be green where the first
was red. So crashes, interrupted and partial cases and those with a failed test run again; an out-of-memory, a time-out and what
a library does not support are kept, and end their tests as they did then.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from harness.core.records import Case, Machine, Outcome, Result, Tier
from harness.core.text import plural
from harness.core.units import format_instant, format_seconds, format_size
from harness.run.case_result import CaseEnded

NEW = "not measured before"

_SAME_SHARE = 0.01  # a kernel update changes the total of the RAM by some pages
_MORE_SHARE = 1.1  # less than a tenth more memory is what comes and goes
_MAX_MEMORY = re.compile(r"max_memory=\{.*?\}")


class Kept:
    """Stands in the place of a `Run` for a case that does not run again."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.ended: CaseEnded | None = None

    def end(self) -> CaseEnded:
        """Return how the case ended, for its tests to raise. What did not work is reported once, as when it happened."""
        why = f"{since(self.result)}: {self.result.why}" if self.result.why else since(self.result)
        end = CaseEnded(self.result.outcome, why)
        if self.result.outcome is not Outcome.OK:
            self.ended = end
        return end


def since(result: Result) -> str:
    """Return e.g. ``kept from 2026-11-24 10:12 UTC``."""
    return f"kept from {format_instant(result.at)}"


def why_again(earlier: Result | None, now: Result, *, run_all: bool = False) -> str | None:
    """Say in a few words why a case must run again; None if its earlier result is still valid.

    `now` is what can be said of the case before it runs (`case_result.not_run`). `run_all` asks for what ran out of memory.
    """
    if earlier is None:
        return NEW
    if run_all and earlier.outcome is Outcome.OOM:
        return "out of memory, and --run-all asks for it"
    return next((why for rule in RULES if (why := rule(earlier, now)) is not None), None)


def finds_the_same(earlier: Result | None, now: Result) -> bool:
    """Say whether a case that is not run was found wanting before in the same way; how many bytes are free may differ."""
    if earlier is None or (earlier.stage, earlier.verdict) != (now.stage, now.verdict):
        return False
    return earlier.fingerprint == now.fingerprint and not (_versions(earlier, now) or _machine(earlier, now))


def judged_by_a_lesser(earlier: Result, reference: Case, order: Sequence[Case]) -> str | None:
    """Say why the quality of a case must be judged again: this run has a wider reference than the case was compared with."""
    if earlier.quality is None or earlier.case == reference:
        return None
    ids = [case.id for case in order]
    used = earlier.quality.reference or earlier.id
    if used in ids and ids.index(used) > ids.index(reference.id):
        return f"not compared with {reference.id} before"
    return None


def _machine(earlier: Result, now: Result) -> str | None:
    return None if _same_machine(earlier.machine, now.machine) else "the machine has changed"


def _same_machine(one: Machine, other: Machine) -> bool:
    """Compare all but what is free and how fast it was measured to be."""
    if replace(one, tiers=()) != replace(other, tiers=()) or len(one.tiers) != len(other.tiers):
        return False
    return all(_same_tier(mine, theirs) for mine, theirs in zip(one.tiers, other.tiers, strict=True))


def _same_tier(one: Tier, other: Tier) -> bool:
    passing = {"total_bytes": None, "free_bytes": None, "bytes_per_s": None, "link_bytes_per_s": None}
    if one.total_bytes is None or other.total_bytes is None:
        close = one.total_bytes == other.total_bytes
    else:
        close = math.isclose(one.total_bytes, other.total_bytes, rel_tol=_SAME_SHARE)
    return close and replace(one, **passing) == replace(other, **passing)


def _files(earlier: Result, now: Result) -> str | None:
    if not earlier.fingerprint:
        return "of what files it was measured is not recorded"
    return None if (earlier.fingerprint, earlier.weights) == (now.fingerprint, now.weights) else "the model's files have changed"


def _versions(earlier: Result, now: Result) -> str | None:
    names = sorted(earlier.environment.keys() | now.environment.keys())
    changes = [(name, earlier.environment.get(name, "absent"), now.environment.get(name, "absent")) for name in names]
    return next((f"{name} {then} is {here} now" for name, then, here in changes if then != here), None)


def _code(earlier: Result, now: Result) -> str | None:
    """Compare the loading code, all but the bytes of `max_memory`, which follow from what is free."""
    then, here = (_MAX_MEMORY.sub("", code or "") for code in (earlier.code, now.code))
    return None if then == here or now.code is None else "the code that loads it has changed"


def _planned(earlier: Result, now: Result) -> str | None:
    del now
    return "not run before" if earlier.stage == "plan" or earlier.outcome is Outcome.SKIPPED else None


def _crash(earlier: Result, now: Result) -> str | None:
    del now
    return "crashed" if earlier.outcome is Outcome.CRASH else None


def _timeout(earlier: Result, now: Result) -> str | None:
    if earlier.outcome is not Outcome.TIMEOUT:
        return None
    raised = [name for name, seconds in now.allowed_s.items() if seconds > earlier.allowed_s.get(name, 0)]
    return f"timed out, and --{raised[0]} is {format_seconds(now.allowed_s[raised[0]])} now" if raised else None


def _oom(earlier: Result, now: Result) -> str | None:
    if earlier.outcome is not Outcome.OOM:
        return None
    for tier in now.machine.tiers:
        before = earlier.machine.tier(tier.name)
        then, here = before.capacity_bytes if before else None, tier.capacity_bytes
        if tier.kind != "disk" and then is not None and here is not None and here > then * _MORE_SHARE:
            return f"out of memory, and {tier.name} has {format_size(here)} now, not {format_size(then)}"
    return None


def _partial(earlier: Result, now: Result) -> str | None:
    del now
    rounds = len(earlier.samples.get("round_s", ()))
    whole = "load_s" in earlier.metrics and rounds >= earlier.case.workload.repeats and earlier.quality is not None
    return None if earlier.outcome is not Outcome.OK or whole else "measured in part"


def _failed(earlier: Result, now: Result) -> str | None:
    del now
    return f"failed {', '.join(earlier.failed)}" if earlier.outcome is Outcome.OK and earlier.failed else None


RULES: tuple[Callable[[Result, Result], str | None], ...] = (
    _planned,
    _machine,
    _files,
    _versions,
    _code,
    _crash,
    _timeout,
    _oom,
    _partial,
    _failed,
)
"""Each says why a case must run again, or None; the first that says something is the reason given."""


def describe_kept(kept: int, again: Sequence[str], reloaded: Sequence[str] = ()) -> str:
    """Return e.g. ``--resume: 12 cases kept, 3 run: 2 not measured before, 1 crashed``.

    `again` is why each of the others ran, `reloaded` the cases whose predictions were made again for others to compare with.
    """
    text = f"--resume: {plural(kept, 'case')} kept, {len(again)} run"
    if again:
        text += ": " + ", ".join(f"{count} {why}" for why, count in Counter(again).items())
    return text + "".join(f"; loaded {case} once more, which others are compared with" for case in reloaded)


def describe_stop(resumes: bool) -> str:
    """Say how a run that was stopped goes on; `resumes` is whether it went on from an earlier one."""
    return f"stopped: the same command{'' if resumes else ' with --resume'} goes on with what is missing"
