"""Figures of a result as the page shows them: the stored number beside its text, or the reason why there is none."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import msgspec
from markupsafe import Markup

from harness.core import units
from harness.core.metrics import METRICS, READY_NAMES, format_metric, formatter, phase_title, when_ready
from harness.core.records import Estimate, Outcome, Result, Span, Verdict
from harness.core.text import plural
from harness.report.html import as_html
from harness.report.page import charts
from harness.results import needed
from harness.results.selection import faults, is_broken, is_proposed, ran


class Status(msgspec.Struct, frozen=True, gc=False):
    """How a case stands, in a word; `look` names its color and its icon."""

    word: str
    look: str

    @property
    def measured(self) -> bool:
        """Whether the case came to its end, so that it has all its figures, sound or not."""
        return self in (_ENDED[Outcome.OK], _BROKEN, _FAULT)


_ENDED: Mapping[Outcome, Status] = {
    Outcome.OK: Status("works", "works"),
    Outcome.OOM: Status("out of memory", "oom"),
    Outcome.TIMEOUT: Status("timed out", "timeout"),
    Outcome.CRASH: Status("crashed", "crash"),
    Outcome.UNSUPPORTED: Status("not supported", "unsupported"),
}
_NOT_RUN: Mapping[Verdict, Status] = {
    Verdict.TOO_BIG: Status("too big", "too-big"),
    Verdict.INVALID: Status("unsupported combination", "invalid"),
    Verdict.UNAVAILABLE: Status("unavailable", "unavailable"),
}
_SKIPPED = Status("skipped", "skipped")
_PROPOSED = Status("predicted to fit", "proposed")
# What came to its end, and is not what was asked for.
_BROKEN, _FAULT = Status("answers broken", "broken"), Status("check failed", "fault")
STATUSES = (_ENDED[Outcome.OK], _BROKEN, _FAULT, *tuple(_ENDED.values())[1:], _PROPOSED, *_NOT_RUN.values(), _SKIPPED)

PLANNED: Mapping[Verdict, str] = {
    Verdict.FITS: "fits",
    Verdict.TIGHT: "tight",
    Verdict.TOO_BIG: "too big",
    Verdict.INVALID: "unsupported combination",
    Verdict.UNAVAILABLE: "unavailable",
    Verdict.UNKNOWN: "no estimate",
}


def status(result: Result) -> Status:
    """Say how a case ended, or why it was not run; "works" is what loaded as asked for and still answers."""
    if is_proposed(result):
        return _PROPOSED
    if not ran(result):
        return _NOT_RUN.get(result.verdict, _SKIPPED)
    if result.outcome is Outcome.OK and is_broken(result):
        return _BROKEN
    return _FAULT if result.outcome is Outcome.OK and faults(result) else _ENDED[result.outcome]


def surprise(result: Result) -> str:
    """Say how the plan was wrong about memory; empty when it was not."""
    if result.outcome is Outcome.OOM and result.verdict.is_good:
        return "false fit"
    if result.outcome is Outcome.OK and result.verdict is Verdict.TOO_BIG:
        return "false refusal"
    return ""


class Figure(msgspec.Struct, frozen=True, gc=False):
    """One figure, which a template writes by its name; `key` is that of its metric, if it is one.

    `value` is the stored number as text, empty when there is none; `why` then says why not, and `text` in two words.
    """

    key: str
    label: str
    text: str
    value: str = ""
    why: str = ""
    noisy: str = ""
    sampled: bool = False
    derived: str = ""  #: from what, where it was not measured as such
    when: str = ""  #: of a time until ready, which one (`metrics.when_ready`)

    @property
    def number(self) -> float:
        """The stored number; nan if there is none."""
        return float(self.value or "nan")

    @property
    def name(self) -> str:
        """The label, with what tells the figure from another of that label."""
        return READY_NAMES[self.when] if self.when else self.label

    def __html__(self) -> str:
        if not self.value:
            return f'<span class="none">{as_html(self.text)}</span>'
        doubts = f'<em class="doubt" title="{as_html(self.noisy)}">noisy</em> ' if self.noisy else ""
        if self.derived:
            doubts += f'<em class="doubt" title="{as_html(self.derived)}">derived</em> '
        if self.sampled:
            doubts += '<em class="doubt" title="sampled: the true peak may be higher">sampled</em> '
        key = f' data-key="{as_html(self.key)}"' if self.key else ""
        return f'{doubts}<data value="{self.value}"{key}>{self.text}</data>'


# What may be sampled instead of read from the kernel's own peak.
_SAMPLED = frozenset({"ram_needed_bytes", "ram_peak_bytes", "load_ram_peak_bytes"})


@functools.cache
def icon(look: str) -> Markup:
    """Return the icon of a status, or of what is best, by its look."""
    return Markup(f'<svg class="icon" aria-hidden="true"><use href="#i-{as_html(look)}"/></svg>')


def known(key: str, label: str, value: float, text: str) -> Figure:
    """Make a figure of a number that is there."""
    return Figure(key=key, label=label, text=text, value=stored(value))


def stored(value: float) -> str:
    """Write a number as it is stored, a whole one without decimals."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def metric(result: Result, key: str) -> Figure:
    """Look up a metric of a result by its key; keys of another version are shown as bare numbers."""
    label = METRICS[key].label if key in METRICS else key
    value = result.metrics.get(key)
    if value is None or not math.isfinite(value):
        return Figure(key=key, label=label, text="not measured", why=_absent(result, value))
    return Figure(
        key=key,
        label=label,
        text=format_metric(key, value),
        value=stored(value),
        noisy=result.noisy.get(key, ""),
        sampled=key in _SAMPLED and any(phase.sampled for phase in result.phases),
        when=when_ready(result) if key == "ready_s" else "",
    )


def _absent(result: Result, value: float | None) -> str:
    if value is not None:
        return f"not a finite number: {value}"
    if not ran(result):
        return f"not run: {status(result).word}"
    if result.outcome is not Outcome.OK:
        return f"not measured: {status(result).word} during {phase_title(result.stage)}"
    return "not recorded in this run"


def planned_speed(result: Result) -> Figure | None:
    """Return the speed that a case is predicted to have; None if that has no estimate."""
    if result.estimate is None:
        return None
    speed = result.estimate.decode_tok_s.best
    return known("", "predicted", speed, format_metric("decode_tok_s", speed))


class MemoryFigure(msgspec.Struct, frozen=True, gc=False):
    """What a case needs of the tier that decides (`harness.results.needed`), against what it may use there.

    `resident` is what was there at most beside it, of the RAM: the kernel may drop the difference.
    """

    tier: str
    kind: str
    need: Figure
    capacity: Figure | None
    resident: Figure | None = None
    predicted: bool = False

    @property
    def brief(self) -> Figure:
        """What is needed as it stands before "of" and the capacity: without its unit, if that is the same."""
        number, _, unit = self.need.text.partition(" ")
        same = self.capacity is not None and self.capacity.text.partition(" ")[2] == unit
        return msgspec.structs.replace(self.need, text=number) if same else self.need

    @property
    def share(self) -> float:
        """The part of the capacity that is needed; 0 if that is not known."""
        return self.need.number / self.capacity.number if self.capacity else 0.0

    @property
    def left(self) -> str:
        """What the capacity has beyond what is needed, in words; empty if it has none, or is not known."""
        left = self.capacity.number - self.need.number if self.capacity else 0.0
        return units.format_size(left) if left > 0 else ""

    @property
    def bar(self) -> Markup | None:
        """The bar of both sizes against the capacity."""
        if self.capacity is None:
            return None
        size, most = self.need.number, self.resident.number if self.resident else 0.0
        return charts.bar(max(size, most), self.capacity.number, firm=None if self.predicted else size, predicted=self.predicted)


def memory(result: Result) -> MemoryFigure | None:
    """Return what is needed of the memory that decides, as it was measured; as it was predicted if nothing ran."""
    found = needed.need_of(result)
    if found is None:
        return None if ran(result) else _expected(result)
    place = result.machine.tier(found.tier)
    key = "" if found.how else found.key  # what was derived is no metric of the result
    shown = known(key, METRICS[found.key].label, found.bytes, format_metric(found.key, found.bytes))
    need = metric(result, key) if key in result.metrics else msgspec.structs.replace(shown, derived=found.how)
    resident = metric(result, "ram_peak_bytes") if found.tier == "cpu" else None
    return _memory(found.tier, need, place.capacity_bytes if place else None, resident=resident)


def _expected(result: Result) -> MemoryFigure | None:
    scarcest = needed.scarcest(result.estimate)
    if scarcest is None:
        return None
    name, tier = scarcest
    size = needed.predicted_need(tier).best
    return _memory(name, known("needed_bytes", "needs", size, units.format_size(size)), tier.capacity_bytes, predicted=True)


def _memory(
    tier: str, need: Figure, capacity: int | None, *, resident: Figure | None = None, predicted: bool = False
) -> MemoryFigure:
    kind = {"cpu": "RAM", "disk": "disk"}.get(tier, "VRAM")
    limit = known("capacity_bytes", "capacity", capacity, units.format_size(capacity)) if capacity else None
    return MemoryFigure(tier, kind, need, limit, resident if resident and resident.value else None, predicted)


class Compared(msgspec.Struct, frozen=True, gc=False):
    """One row of a case's figures: measured, the spread of its samples, and predicted."""

    figure: Figure
    spread: str = ""
    best: Figure | None = None
    interval: str = ""


def compared(result: Result) -> list[Compared]:
    """List the figures of a case in the order of METRICS, each beside what was predicted of it, if there is either."""
    predicted = predictions(result.estimate) if result.estimate else {}
    keys = [key for key in METRICS if key in result.metrics or key in predicted]
    keys += sorted(key for key in result.metrics if key not in METRICS)
    return [_compared(result, key, predicted.get(key)) for key in keys]


def _compared(result: Result, key: str, span: Span | None) -> Compared:
    show = formatter(key)
    samples, spread = [value for value in result.samples.get(key, ()) if math.isfinite(value)], ""
    if len(samples) > 1:
        spread = f"{show(min(samples))} to {show(max(samples))} in {plural(len(samples), 'sample')}"
    elif key == "answers_correct" and result.quality and result.quality.answers:
        spread = f"of {plural(len(result.quality.answers), 'question')}"
    if span is None:
        return Compared(figure=metric(result, key), spread=spread)
    best = known("", "predicted", span.best, show(span.best))
    interval = f"{show(span.low)} to {show(span.high)}" if span.low < span.high else ""
    return Compared(figure=metric(result, key), spread=spread, best=best, interval=interval)


def predictions(estimate: Estimate) -> dict[str, Span]:
    """Lay what the plan expects beside the metrics that measure the same thing."""
    found = {"load_s": estimate.load_s, "first_token_s": estimate.first_token_s, "decode_tok_s": estimate.decode_tok_s}
    gpus = [tier for name, tier in estimate.tiers.items() if name not in ("cpu", "disk")]
    if gpus:
        fullest = max(gpus, key=lambda tier: tier.peak_bytes)  # not what is needed: a card may be full of what torch caches
        found["vram_peak_bytes"] = _exactly(fullest.allocated_bytes)
        found["vram_process_peak_bytes"] = Span(low=fullest.low_bytes, best=fullest.peak_bytes, high=fullest.high_bytes)
        found["load_vram_peak_bytes"] = _exactly(fullest.load_peak_bytes)
    if ram := estimate.tiers.get("cpu"):
        found["ram_needed_bytes"] = needed.predicted_need(ram)
        found["ram_peak_bytes"] = Span(low=ram.low_bytes, best=ram.peak_bytes, high=ram.high_bytes)
        found["load_ram_peak_bytes"] = _exactly(ram.load_peak_bytes)
    if (disk := estimate.tiers.get("disk")) and disk.weights_bytes:
        found["disk_bytes"] = _exactly(disk.weights_bytes)
    return {key: span for key, span in found.items() if math.isfinite(span.best)}


def _exactly(size: int) -> Span:
    return Span(low=size, best=size, high=size)
