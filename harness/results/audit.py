"""What may be published of a result: nothing that is private, and nothing that cannot be.

A result is evidence only if it can be: `doubt` refuses what no run of ours can have written. It holds a result against itself and
its machine, and so finds damage and careless forgery; whoever invents all of a result without a contradiction is not found.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from statistics import median

from harness.checkpoint.formats.files import quote
from harness.core import redact
from harness.core.metrics import METRICS, format_metric
from harness.core.records import Machine, Result
from harness.core.units import format_size
from harness.measure import aggregate

# A clock may be wrong by a time zone, and a date is no evidence of more.
_CLOCK = timedelta(days=1)
_CLOSE = 1e-6  # two figures of one measurement differ by rounding alone
_S = 0.01  # phases and requests are timed by two clocks of one machine
_RUN = re.compile(r"(\d{8}T\d{6})Z-[0-9a-f]+")
_FINGERPRINT, _DIGEST = re.compile(r"([0-9a-f]{32})?"), re.compile(r"([0-9a-f]{8})?")
# The metrics that are the median of samples by these names.
_MEDIANS: Mapping[str, str] = {
    "warm_first_token_s": "warm_first_token_s",
    "prefill_tok_s": "prefill_tok_s",
    "decode_tok_s": "decode_tok_s",
    "token_p50_s": "token_s",
}
# The least and the most that a metric can be, where it is not just any number from 0.
_RANGES: Mapping[str, tuple[float, float]] = {
    "perplexity": (1 - _CLOSE, math.inf),
    "top1_agreement": (0, 1 + _CLOSE),
    "kl": (-0.01, math.inf),  # what was measured before the divergence of a rounded reference was never negative
}
# Texts of the longest are the log's tail, loading code and maps of modules.
_MOST_TEXT = 4_000_000
_RAM = ("ram_needed_bytes", "ram_peak_bytes", "ram_anon_peak_bytes", "load_ram_peak_bytes")
_VRAM = ("vram_peak_bytes", "vram_process_peak_bytes", "load_vram_peak_bytes")


def identity(machine: Machine) -> str:
    """Tell a machine from others of its name by its hardware; not by what was free, limited or installed that day."""
    cards = [f"{card.name} {card.model} {_size(card.total_bytes)}" for card in machine.gpus]
    ram = machine.tier("cpu")
    return "\n".join([machine.name, str(machine.cpu), str(machine.cores), _size(ram.total_bytes if ram else None), *cards])


def _size(size: int | None) -> str:
    return "?" if size is None else format_size(size)


def examine(result: Result, now: datetime, here: redact.Private | None = None) -> Result | str:
    """Return a result as it may be published, without what is private (`here`, if it is known), or say why it may not be."""
    return doubt(result, now) or cleaned(result, here)


def cleaned(result: Result, here: redact.Private | None = None) -> Result | str:
    """Return a result without what is private, or say what of it is private and cannot be taken out."""
    texts = redact.texts_of(result)
    if (length := sum(sum(map(len, said)) for said in texts.values())) > _MOST_TEXT:
        return f"holds {length:,} letters, and no result has more than {_MOST_TEXT:,}"
    is_clean = redact.is_clean(result, texts, here)
    clean = result if is_clean else redact.clean(result)
    told = {name: said for name, said in texts.items() if name in redact.KEPT} if is_clean else redact.texts_of(clean)
    if "environment" in told:  # packages have versions of four numbers, which are nobody's address
        told["environment"] = [f"{package}=={version}" for package, version in clean.environment.items()]
    if redact.private_in(text for said in told.values() for text in said):
        for name, said in told.items():
            if what := redact.private_in(said):
                return f"tells {what} in its {name}, which cannot be taken out: measure again without it"
    return clean


def digest(line: bytes) -> str:
    """Return what tells the contents of a result, as `encode` writes it, from any other's; as a name of a file it is plain."""
    return hashlib.sha256(line).hexdigest()[:32]


def doubt(result: Result, now: datetime) -> str | None:
    """Say why no run of ours can have written this result; None if nothing contradicts it."""
    return next((said for check in CHECKS for said in check(result, now)), None)


def _names(result: Result, _: datetime) -> Iterator[str]:
    if result.id != result.case.id:
        yield f"is called {quote(result.id)}, and its case is {quote(result.case.id)}"
    if result.estimate and not _DIGEST.fullmatch(result.estimate.constants):
        yield f"was estimated by constants {quote(result.estimate.constants)}, which is no digest of any"
    if not _FINGERPRINT.fullmatch(result.fingerprint):
        yield f"has fingerprint {quote(result.fingerprint)}, which is none of the files of a model"
    asked = result.case.workload
    if min(asked.prompt_tokens, asked.new_tokens, asked.batch, asked.repeats) < 1:
        tokens = f"{asked.prompt_tokens} + {asked.new_tokens} tokens"
        yield f"asks for {tokens}, batch {asked.batch}, {asked.repeats} rounds: 1 is the least"


def _dates(result: Result, now: datetime) -> Iterator[str]:
    at = moment(result.at)
    if at is None:
        yield f"has no date: {quote(result.at)}"
        return
    if at > now + _CLOCK:
        yield f"is dated {result.at}, and now is {now:%Y-%m-%dT%H:%M:%SZ}"
    run = _RUN.fullmatch(result.run)
    begun = moment(f"{run[1]}Z", "%Y%m%dT%H%M%SZ") if run else None
    if begun is not None and at < begun - _CLOCK:
        yield f"is dated {result.at}, before its run began: {quote(result.run)}"


@functools.lru_cache(4096)  # results of a run say one moment, when it began
def moment(text: str, form: str = "%Y-%m-%dT%H:%M:%SZ") -> datetime | None:
    """Read a date as results write it; None if it is none."""
    try:
        return datetime.strptime(text, form).replace(tzinfo=timezone.utc)
    except ValueError:
        return None


def _numbers(result: Result, _: datetime) -> Iterator[str]:
    for key, value in result.metrics.items():
        low, high = _RANGES.get(key, (0.0, math.inf))
        if not math.isfinite(value) or not low <= value <= high:
            yield f"has {quote(key)} {value}, which cannot be"
    for key, values in result.samples.items():
        wrong = [value for value in values if not (math.isfinite(value) and value >= 0)]
        if wrong:
            yield f"has {wrong[0]} among its samples of {quote(key)}"
    if result.stage == "plan" and result.metrics:
        yield f"was not run, and has {quote(min(result.metrics))}"


def _medians(result: Result, _: datetime) -> Iterator[str]:
    """Where some rounds were disturbed the median is of the others, so it then only has to be one of some of the samples."""
    disturbed = any(window.phase == "warm" and window.why for window in result.interference)
    for key, of in _MEDIANS.items():
        value, values = result.metrics.get(key), result.samples.get(of)
        if value is None or not values or _close(value, median(values)):
            continue
        if not disturbed:
            yield f"says {_figure(key, value)}, and the median of its {len(values)} samples is {_figure(key, median(values))}"
        elif not _is_median_of_some(value, sorted(values)):
            yield f"says {_figure(key, value)}, which is the median of none of its {len(values)} samples"


def _is_median_of_some(value: float, values: Sequence[float]) -> bool:
    """Tell whether a value is one of the sorted values or lies in the middle of two of them, in one walk from both ends."""
    low, high = 0, len(values) - 1
    while low <= high:
        middle = (values[low] + values[high]) / 2
        if _close(middle, value):
            return True
        low, high = (low + 1, high) if middle < value else (low, high - 1)
    return False


def _sums(result: Result, _: datetime) -> Iterator[str]:
    metrics, samples = result.metrics, result.samples
    if metrics.keys() >= {"ready_s", "load_s", "first_token_s"}:
        ready = metrics["load_s"] + metrics["first_token_s"]
        if not _close(metrics["ready_s"], ready):
            yield f"says {_figure('ready_s', metrics['ready_s'])}, and load and first token take {_figure('ready_s', ready)}"
    speeds, tokens = samples.get("decode_tok_s", []), samples.get("token_s", [])
    workload = result.case.workload
    if speeds and min(speeds) > 0 and len(tokens) == len(speeds) * (workload.new_tokens - 1):
        took = sum((workload.new_tokens - 1) * workload.batch / speed for speed in speeds)
        if not _close(took, sum(tokens) * workload.batch):
            yield f"has rounds that took {took:.6g} s by their speed and {sum(tokens):.6g} s by their tokens"
    if result.quality and "answers_correct" in metrics:
        right = sum(answer.correct for answer in result.quality.answers)
        if metrics["answers_correct"] != right:
            yield f"says {metrics['answers_correct']:g} answers correct, and {right} are"


def _peaks(result: Result, _: datetime) -> Iterator[str]:
    ram, cards = result.machine.tier("cpu"), [card.total_bytes for card in result.machine.gpus]
    most = {
        "RAM": (_RAM, ram.total_bytes if ram else None),
        "VRAM": (_VRAM, 0 if not cards else None if None in cards else max(size for size in cards if size is not None)),
    }
    for kind, (keys, size) in most.items():
        for key in keys:
            if size is not None and key in result.metrics and result.metrics[key] > size:
                has = f"has {format_size(size)} of {kind}" if size else "has no GPU"
                yield f"says {_figure(key, result.metrics[key])}, and its machine {has}"
    highest = aggregate.of_phases(result.phases)
    for key in ("ram_peak_bytes", "vram_peak_bytes"):
        if key in highest and key in result.metrics and not _close(highest[key], result.metrics[key]):
            yield f"says {_figure(key, result.metrics[key])}, and the highest of its phases is {_figure(key, highest[key])}"
    needed, anonymous = result.metrics.get("ram_needed_bytes"), result.metrics.get("ram_anon_peak_bytes", 0.0)
    if needed is not None and not anonymous <= needed <= result.metrics.get("ram_peak_bytes", math.inf):
        yield f"says {_figure('ram_needed_bytes', needed)}, which is not between its anonymous and its resident peak"
    for tier in result.machine.tiers:
        sizes = (tier.total_bytes, tier.free_bytes, tier.limit_bytes)
        if any(size is not None and size < 0 for size in sizes):
            yield f"has fewer than 0 bytes in {quote(tier.name)}"
        if tier.total_bytes is not None and (tier.free_bytes or 0) > tier.total_bytes:
            yield f"has {format_size(tier.free_bytes or 0)} free of {format_size(tier.total_bytes)} in {quote(tier.name)}"


def _times(result: Result, _: datetime) -> Iterator[str]:
    phases = [(phase.name, phase.start_s, phase.end_s) for phase in result.phases]
    requests = [(window.phase, window.start_s, window.end_s) for window in result.interference]
    for what, spans in (("phase", phases), ("request", requests)):
        for name, start, end in spans:
            if not -_S <= start <= end < math.inf:
                yield f"has a {what} {quote(name)} from {start} s to {end} s"
        for (_name, _start, end), (_name, start, _end) in pairwise(spans):
            if start < end - _S:
                yield f"has a {what} that begins at {start} s, before the one ahead of it ended, at {end} s"
    loads = [phase.end_s - phase.start_s for phase in result.phases if phase.name == "load"]
    if loads and "load_s" in result.metrics and result.metrics["load_s"] > sum(loads) + _S:
        yield f"says {_figure('load_s', result.metrics['load_s'])}, and its phase took {sum(loads):.6g} s"
    timeline = result.timeline
    if timeline is not None:
        columns = [timeline.ram_bytes, timeline.ram_anon_bytes, *timeline.vram_bytes.values()]
        if any(column and len(column) != len(timeline.t_s) for column in columns):
            yield "has a timeline whose columns differ in length"
        if timeline.t_s != sorted(timeline.t_s):
            yield "has a timeline that goes back in time"


Check = Callable[[Result, datetime], Iterator[str]]
CHECKS: tuple[Check, ...] = (_names, _dates, _numbers, _medians, _sums, _peaks, _times)
# What these look at, for people.
CHECKED = (
    "names: id, case and fingerprint agree, and the workload asks for something",
    "dates: in the past, and not before the run began",
    "numbers: finite, none below what it can be, none of a case that was not run",
    "medians: a speed is the median of its own samples, the undisturbed ones where others disturbed some",
    "sums: ready is load and first token, rounds take as long as their tokens, answers are counted right",
    "peaks: within the machine's memory, and the highest of their phases",
    "times: phases, requests and timelines go forward",
)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=1e-12)


def _figure(key: str, value: float) -> str:
    return f"{METRICS[key].label} {format_metric(key, value) if math.isfinite(value) else value}"
