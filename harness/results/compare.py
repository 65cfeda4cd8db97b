"""Two sets of results side by side: what changed, how surely, and whether a gate lets it pass.

A figure with raw samples gets an interval of its change: the percentile bootstrap of the ratio of medians (Efron and Tibshirani
1993), with a fixed seed. A figure measured once (memory, load) has none; there the threshold alone has to be wider than its noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from statistics import median
from typing import Any

from harness.core.errors import UsageError, did_you_mean
from harness.core.metrics import METRICS, read_alike
from harness.core.records import Outcome, Record, Result
from harness.core.text import as_written
from harness.core.units import format_share
from harness.results.selection import is_proposed

RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 20230314
_LEAST_SAMPLES = 3


class Rule(Record, frozen=True, kw_only=True):
    """A row of RULES: how much worse the figures of a group may get, as a share, and which figures they are.

    `of_machine`: they say nothing unless both were measured on the same machine.
    """

    keys: tuple[str, ...]
    worse: float
    of_machine: bool


# The defaults are wider than what ten runs of one case differ by on a quiet machine: 1 % of memory, 5 % of speed, 15 % of loading.
RULES: Mapping[str, Rule] = {
    "memory": Rule(
        keys=("ram_needed_bytes", "vram_process_peak_bytes", "vram_peak_bytes", "load_vram_peak_bytes"),
        worse=0.05,
        of_machine=False,
    ),
    "load": Rule(keys=("ready_s",), worse=0.30, of_machine=True),
    "speed": Rule(keys=("decode_tok_s", "prefill_tok_s"), worse=0.10, of_machine=True),
    "quality": Rule(keys=("perplexity", "top1_agreement"), worse=0.02, of_machine=False),
}


class Call(str, Enum):
    """What is said of one figure: `better` and `worse` are sure, `unsure` is worse with an interval that reaches the threshold.

    A change beyond the threshold is `not judged`, however narrow its interval, where the figure has a `_doubt`.
    """

    SAME = "same"
    BETTER = "better"
    WORSE = "worse"
    UNSURE = "unsure"
    UNJUDGED = "not judged"


class Change(Record, frozen=True, kw_only=True):
    """One figure of one case, before and after; `change` is after / before - 1, with its interval where there are samples."""

    key: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    call: Call
    gated: bool
    why: str = ""  #: it was not judged; empty of what was


class Pair(Record, frozen=True, kw_only=True):
    """One case in both sets, or in one. `said` is what changed of its end, `failed` whether the gate stops there."""

    id: str
    before: Outcome | None
    after: Outcome | None
    said: str | None
    failed: bool
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()


class Comparison(Record, frozen=True, kw_only=True):
    """All cases of two sets, in the order of the second, and the thresholds that they were held to."""

    pairs: tuple[Pair, ...]
    limits: dict[str, float] = {}

    @property
    def compared(self) -> tuple[Pair, ...]:
        """The cases that are in both sets."""
        return tuple(pair for pair in self.pairs if pair.before and pair.after)

    @property
    def is_identical(self) -> bool:
        """Whether every case is in both sets and no figure, no end and no circumstance differs."""
        same = (not pair.said and not pair.notes and all(one.before == one.after for one in pair.changes) for pair in self.pairs)
        return len(self.compared) == len(self.pairs) and all(same)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """One sentence for each figure that changed and was not judged, and why."""
        return tuple(f"{said}: {why}" for why, figures in self.doubts.items() for said in figures)

    @property
    def doubts(self) -> dict[str, list[str]]:
        """The figures that changed and were not judged, a sentence each, by the reason."""
        found: dict[str, list[str]] = {}
        for pair in self.pairs:
            for change in pair.changes:
                if change.call is Call.UNJUDGED:
                    found.setdefault(change.why, []).append(f"{pair.id}: {sentence(change)}")
        return found

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each thing that stops the gate."""
        said = []
        for pair in self.pairs:
            if pair.failed and pair.said:
                said.append(f"{pair.id}: {pair.said}")
            said += [f"{pair.id}: {sentence(change)}" for change in pair.changes if change.gated and change.call is Call.WORSE]
        return tuple(said)


def thresholds(config: Any) -> dict[str, float]:
    """Read `[tool.fitmatrix.gate]`: a share for each group of RULES, such as `speed = 0.1`; what is not named keeps its default.

    Raises:
        UsageError: an unknown group, or no share.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"[tool.fitmatrix]: gate = {as_written(config)} is not a table: write [tool.fitmatrix.gate]")
    found = {name: rule.worse for name, rule in RULES.items()}
    for name, value in config.items():
        if name not in RULES:
            raise UsageError(f"[tool.fitmatrix.gate]: unknown group {name!r}: {did_you_mean(name, RULES)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10:
            raise UsageError(f"[tool.fitmatrix.gate]: {name} = {as_written(value)} is no share: write 0.05 for 5 %")
        found[name] = float(value)
    return found


def compare(before: Iterable[Result], after: Iterable[Result], limits: Mapping[str, float] | None = None) -> Comparison:
    """Compare the newest result of each case in two sets."""
    old, new = _newest(before), _newest(after)
    limits = limits or thresholds({})
    ids = [*new, *(name for name in old if name not in new)]
    return Comparison(pairs=tuple(_pair(name, old.get(name), new.get(name), limits) for name in ids), limits=dict(limits))


def _newest(results: Iterable[Result]) -> dict[str, Result]:
    """Return the last result of each case; a case is its id and what makes its figures comparable at all.

    What a run proposed beyond its cases is none of them.
    """
    return {_name(result): result for result in results if not is_proposed(result)}


def _name(result: Result) -> str:
    workload = result.case.workload
    synthetic = "" if result.weights == "real" else f" {result.weights}"
    return f"{result.id} {workload.prompt_tokens}+{workload.new_tokens}x{workload.batch}{synthetic}"


def _pair(name: str, before: Result | None, after: Result | None, limits: Mapping[str, float]) -> Pair:
    if before is None or after is None:
        return Pair(
            id=name,
            before=before.outcome if before else None,
            after=after.outcome if after else None,
            said="not measured before" if before is None else "not measured any more",
            failed=False,
        )
    said, failed = _ends(before, after)
    changes = tuple(_changes(before, after, limits)) if before.outcome is after.outcome is Outcome.OK else ()
    notes = (*_differences(before, after), *_noise(before, after, changes))
    return Pair(id=name, before=before.outcome, after=after.outcome, said=said, failed=failed, changes=changes, notes=notes)


def _ends(before: Result, after: Result) -> tuple[str | None, bool]:
    """Say how the end of a case changed; what used to work and does not is a failure, whatever the thresholds."""
    if before.outcome is after.outcome:
        return _answers(before, after)
    if before.outcome is Outcome.OK:
        if after.outcome is Outcome.SKIPPED and after.verdict.value == "unavailable":
            return f"worked, and cannot be tried here now: {after.why}", False
        return f"worked, and now {_format_end(after)}", True
    if after.outcome is Outcome.OK:
        return f"works now; before: {_format_end(before)}", False
    return f"{_format_end(after)}; before: {_format_end(before)}", False


def _answers(before: Result, after: Result) -> tuple[str | None, bool]:
    """Say whether the answers broke: that is a failure even where every figure is within its threshold."""
    old, new = before.quality, after.quality
    if old is None or new is None or old.verdict == new.verdict:
        return None, False
    return f"answers were {old.verdict}, and now are {new.verdict}: {new.why}", new.verdict == "broken"


def _format_end(result: Result) -> str:
    return f"{result.outcome.value}: {result.why}" if result.why else result.outcome.value


def _differences(before: Result, after: Result) -> Iterable[str]:
    """Name what else differs between two results of one case, and may be why its figures do."""
    if _machine(before) != _machine(after):
        yield f"another machine: {before.machine.name}, now {after.machine.name}"
    if before.case.workload.repeats != after.case.workload.repeats:
        yield f"repeats {before.case.workload.repeats}, now {after.case.workload.repeats}"
    threads = [result.loaded and result.loaded.threads for result in (before, after)]
    if all(threads) and threads[0] != threads[1]:
        yield f"threads {threads[0]}, now {threads[1]}"
    for package in sorted(before.environment.keys() | after.environment.keys()):
        old, new = before.environment.get(package), after.environment.get(package)
        if old != new:
            yield f"{package} {old or 'absent'}, now {new or 'absent'}"


def _noise(before: Result, after: Result, changes: Iterable[Change]) -> Iterable[str]:
    """Say what disturbed the figures that changed; that others were noisy, which did not, changes nothing."""
    for key in (change.key for change in changes if change.call is not Call.SAME):
        for label, result in (("before", before), ("now", after)):
            if key in result.noisy:
                yield f"{METRICS[key].label} noisy {label}: {result.noisy[key]}"


def _machine(result: Result) -> object:
    machine = result.machine
    return machine.name, machine.cpu, machine.cores, tuple((tier.name, tier.model, tier.total_bytes) for tier in machine.gpus)


def _changes(before: Result, after: Result, limits: Mapping[str, float]) -> Iterable[Change]:
    same = _machine(before) == _machine(after)
    for group, rule in RULES.items():
        for key in rule.keys:
            if key in before.metrics and key in after.metrics and before.metrics[key]:
                yield _change(key, before, after, limits[group], gated=same or not rule.of_machine)


def _change(key: str, before: Result, after: Result, limit: float, *, gated: bool) -> Change:
    old, new = before.metrics[key], after.metrics[key]
    ratio = new / old
    interval = _interval(before.samples.get(key, ()), after.samples.get(key, ()))
    low, high = interval or (ratio, ratio)
    call = _call(ratio, low, high, limit, higher=METRICS[key].better == "higher")
    ends = (low - 1, high - 1) if interval else (None, None)
    why = "" if call is Call.SAME else _doubt(key, before, after)
    return Change(
        key=key,
        before=old,
        after=new,
        change=ratio - 1,
        low=ends[0],
        high=ends[1],
        call=Call.UNJUDGED if why else call,
        gated=gated,
        why=why,
    )


def _doubt(key: str, before: Result, after: Result) -> str:
    """Say why a change of a figure may be none of the case, first what no quiet machine helps; empty if nothing speaks for that."""
    of_files = _OF_FILES.get(read_alike(before, after), "") if key == "ready_s" else ""
    return of_files or ("other programs disturbed it" if key in before.noisy or key in after.noisy else "")


# What is said of the time until ready, by whether both runs had the same of the files in the page cache.
_OF_FILES = {
    False: "one run read more of the files from the disk than the other",
    None: "it is not known of both runs how much of the files came from the disk",
}


def _call(ratio: float, low: float, high: float, limit: float, *, higher: bool) -> Call:
    """Judge a ratio and its interval against a share that it may get worse by; speed lost counts as time gained."""
    if higher:
        ratio, low, high = _inverse(ratio), _inverse(high), _inverse(low)
    if low > 1 + limit:
        return Call.WORSE
    if ratio > 1 + limit:
        return Call.UNSURE
    return Call.BETTER if high < 1 / (1 + limit) else Call.SAME


def _inverse(ratio: float) -> float:
    return 1 / ratio if ratio else math.inf


def _interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """Return the bootstrap interval of median(after) / median(before), None for too few samples."""
    if min(len(before), len(after)) < _LEAST_SAMPLES or min(before) <= 0:
        return None
    chance = random.Random(_SEED)
    ratios = sorted(
        median(chance.choices(after, k=len(after))) / median(chance.choices(before, k=len(before))) for _ in range(RESAMPLES)
    )
    tail = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return ratios[tail], ratios[-tail - 1]


def sentence(change: Change) -> str:
    """Say a change: "decode 23.1 tokens/s, was 29.8 (-22 %, between -25 % and -19 %)"."""
    from harness.core.metrics import format_metric

    span = f", between {signed(change.low)} and {signed(change.high)}" if change.low is not None and change.high is not None else ""
    now, was = format_metric(change.key, change.after), format_metric(change.key, change.before)
    return f"{METRICS[change.key].label} {now}, was {was} ({signed(change.change)}{span})"


def signed(share: float) -> str:
    """Write a share with its sign."""
    return f"{'+' if share >= 0 else '-'}{format_share(abs(share))}"
