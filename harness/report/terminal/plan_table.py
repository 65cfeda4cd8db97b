"""Tables of plans: every case, or the ways that differ; as detailed as the screen is wide, with nothing cut."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from harness.core.records import Estimate, Machine, Plan, Span, Tier, TierEstimate, Verdict
from harness.core.units import format_gib, format_seconds, significant
from harness.planning.choice.recommend import Recommendation
from harness.planning.cost.speed import IN_CACHE, ON_DISK
from harness.planning.loading.seconds import ready_means, ready_times
from harness.planning.quality import AS_STORED, ON_MODEL, ON_SIMILAR, quality_kept
from harness.report.terminal import tables
from harness.report.terminal.subject import word
from harness.report.terminal.ways import Way, ways, would_work

# Color supports the word and never replaces it (Okabe and Ito).
COLORS = {Verdict.FITS: "#009e73", Verdict.TIGHT: "#e69f00", Verdict.TOO_BIG: "#d55e00"}
_WRAPPING = (1, 0)  # the columns of names
_MARK = "<-"
_READY = (ON_DISK, IN_CACHE)
_OTHER_FORM = "What needs a checkpoint of another form has the figures of such a checkpoint."
_MEASURED = {ON_MODEL: "measured on this model", ON_SIMILAR: "measured on similar models", AS_STORED: "keeps what is stored"}


def _span_of(tier: TierEstimate | None) -> str:
    return f"{format_gib(tier.needed_bytes)}-{format_gib(tier.needed_high_bytes)}" if tier else ""


def _best_of(tier: TierEstimate | None) -> str:
    return format_gib(tier.needed_bytes) if tier else ""


def _range_of(speed: Span) -> str:
    return f"{significant(speed.low, 2)}-{significant(speed.high, 2)}"


def _middle_of(speed: Span) -> str:
    return significant(speed.best, 2)


class _Layout(NamedTuple):
    """What a table of plans shows beside the verdict. Memory is in all of them."""

    amount: Callable[[TierEstimate | None], str] = _best_of  #: formats what must fit in a tier
    ready: tuple[str, ...] = ()  #: which times until ready are shown
    known: Container[str] = _READY  #: which of these any way has
    rate: Callable[[Span], str] = _range_of
    marked: bool = True  #: whether the best way has a mark; the answer above names it
    fullest: bool = False  #: one column for all GPUs, of the one with least to spare
    compared: Container[str] = ("quality", "context")  #: what is shown of what ways are compared by
    longest_name: int = 0  #: columns; else it goes on in another line, at each @ and at hyphens; 0 for any
    contexts: Mapping[str, int] = {}  #: the most tokens of each way, by case, where that is compared
    quality: bool = False  #: whether what each keeps of the answers is compared

    @property
    def figures(self) -> tuple[str, ...]:
        """Return the columns of figures on the right of the memory, by their names in `_FIGURES`."""
        asked = {"quality": self.quality, "context": bool(self.contexts)}
        compares = (name for name, is_asked in asked.items() if is_asked and name in self.compared)
        return *(name for name in self.ready if name in self.known), "rate", *compares

    def lacks(self, gpus: int) -> str:
        """Say what a wider table shows in addition."""
        parts = {
            "each GPU": self.fullest and gpus > 1,
            "the upper bound of each tier": self.amount is _best_of and self.rate is _range_of,
            "the time until ready": bool(self.known) and not self.ready,
            "the time until ready again": IN_CACHE in self.known and self.ready == _READY[:1],
            "every interval": self.rate is _middle_of,
            "the quality": self.quality and "quality" not in self.compared,
            "the longest context": bool(self.contexts) and "context" not in self.compared,
        }
        *most, last = [part for part, is_lacking in parts.items() if is_lacking] or [""]
        return f"{', '.join(most)} and {last}" if most else last


def quality_sources(recommendation: Recommendation) -> str:
    """Say of the ways that work where their quality comes from; empty if all of it is by rule of thumb, or that of the files."""
    known, found = recommendation.planner.known_quality, dict[str, dict[str, None]]()
    for one in recommendation.plans:
        if one.verdict.is_good and (kept := known.of(one.case)) is not None:
            found.setdefault(kept[1], {})[one.case.precision] = None
    if not found.keys() - {AS_STORED}:
        return ""
    said = "; ".join(f"{', '.join(names)} {_MEASURED[where]}" for where, names in found.items())
    return f"{said}, others by rule of thumb"


def of_quality(recommendation: Recommendation) -> str:
    """Say what the quality of the ways is."""
    sources = quality_sources(recommendation)
    if not sources:
        return "Quality is the share of the answers that stay right, by rule of thumb."
    return f"Quality is the share of the next tokens that stay as in 16 bits: {sources}."


class _Figure(NamedTuple):
    """A column on the right of the memory: its heading, its cells, and what explains it, which is said where it is shown alone."""

    heading: Callable[[_Layout], str]
    cell: Callable[[Plan, _Layout], str]
    note: Callable[[Recommendation], str] = lambda _: ""


def _ready(one: Plan, files: str) -> str:
    spent = one.estimate.ready_s.get(files) if one.estimate and would_work(one) else None
    return format_seconds(spent.best) if spent else ""


def _ready_first(layout: _Layout) -> str:
    return "ready\nfirst" if IN_CACHE in layout.known else "\nready"


def _of_ready(recommendation: Recommendation) -> str:
    return ready_means(filter(would_work, recommendation.plans))


def _rate(one: Plan, layout: _Layout) -> str:
    return layout.rate(one.estimate.decode_tok_s) if one.estimate and would_work(one) else ""


def _context(one: Plan, layout: _Layout) -> str:
    longest = layout.contexts.get(one.case.id)
    return f"{longest:,}" if longest is not None else ""


_FIGURES: Mapping[str, _Figure] = {
    ON_DISK: _Figure(_ready_first, lambda one, _: _ready(one, ON_DISK), _of_ready),
    IN_CACHE: _Figure(lambda _: "ready\nagain", lambda one, _: _ready(one, IN_CACHE), _of_ready),
    "rate": _Figure(lambda layout: "\ntokens/s" if layout.marked else "\ntok/s", _rate),
    "quality": _Figure(lambda _: "\nquality", lambda one, _: f"{quality_kept(one):.1%}", of_quality),
    "context": _Figure(lambda _: "\ncontext", _context, lambda _: "Context is the most tokens that fit."),
}
# The first that is not too wide is shown, the last in any case.
_LAYOUTS = (
    _Layout(_span_of, ready=_READY),
    _Layout(ready=_READY),
    _Layout(ready=_READY[:1]),
    _Layout(),
    _Layout(fullest=True),
    *(
        _Layout(fullest=True, rate=_middle_of, marked=False, compared=compared, longest_name=longest)
        for compared in (("quality", "context"), ("quality",), ())
        for longest in (0, 18, 12)
    ),
)


class PlanTable(NamedTuple):
    """A table as wide as the screen allows, what explains its columns, and what a wider one would show in addition."""

    drawn: Table
    notes: str
    columns: tuple[str, ...]  #: those of figures, by name
    lacks: str


def of_cases(recommendation: Recommendation, machine: Machine) -> PlanTable:
    """Return a table of each case that has figures."""
    plans = [one for one in recommendation.plans if one.estimate is not None]
    rows = [Way((one.case.precision,), (one.case.place,), one) for one in plans]
    return _fitting(lambda _: rows, recommendation, machine)


def of_ways(recommendation: Recommendation, machine: Machine) -> PlanTable:
    """Return a table of the ways that differ."""

    def rows(layout: _Layout) -> Sequence[Way]:
        best, reason = recommendation.best, f"{recommendation.reason} "
        return ways(recommendation.plans, best, reason, lambda one: tuple(_cells(one, machine, layout)))

    return _fitting(rows, recommendation, machine)


def of_front(recommendation: Recommendation, machine: Machine) -> PlanTable:
    """Return a table of the ways that a search has found, with what each keeps of quality and how long a context fits."""
    found = [one for one in recommendation.plans if one.case.id in recommendation.contexts]
    rows = [Way((one.case.precision,), (one.case.place,), one) for one in found]
    return _fitting(lambda _: rows, recommendation, machine)


def _fitting(rows: Callable[[_Layout], Sequence[Way]], recommendation: Recommendation, machine: Machine) -> PlanTable:
    longest, is_search = recommendation.longest, bool(recommendation.contexts)
    known = ready_times(filter(would_work, recommendation.plans))
    for layout in (row._replace(contexts=longest, quality=is_search, known=known) for row in _LAYOUTS):
        shown = rows(layout)
        table = _drawn(shown, recommendation.best, machine, layout)
        if tables.has_room_for(table, wrapping=_WRAPPING, folding=layout.longest_name > 0):
            break
    answered = (ON_DISK,) if recommendation.best else ()  # what the answer says as well
    other = _OTHER_FORM if any(way.one.needs_checkpoint for way in shown) else ""
    notes = dict.fromkeys([*(_FIGURES[name].note(recommendation) for name in (*answered, *layout.figures)), other])
    return PlanTable(table, " ".join(filter(None, notes)), layout.figures, layout.lacks(len(machine.gpus)))


def _drawn(rows: Sequence[Way], best: Plan | None, machine: Machine, layout: _Layout) -> Table:
    words = [f"\n{name}" for name in ("precision", "placement", "verdict")]
    figures = [_FIGURES[name].heading(layout) for name in layout.figures]
    table = tables.table(*words, *_heads(machine, layout), *figures, *["\n"] * layout.marked, left=3)
    for way in rows:
        verdict, *cells = _cells(way.one, machine, layout)
        shown = Text(verdict, style=COLORS.get(way.one.verdict, ""))
        mark = [_MARK if way.one is best else ""] * layout.marked
        names = [", ".join(way.precisions), way.where]
        broken = [_broken(name, layout.longest_name) for name in names] if layout.longest_name else names
        table.add_row(*broken, shown, *cells, *mark)
    return table


def _broken(names: str, width: int) -> str:
    parts = names.replace("@", "@\n").split("\n")
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width, break_long_words=False))


def _heads(machine: Machine, layout: _Layout) -> list[str]:
    gpus = machine.gpus
    heads = ["fullest\nGPU"] if layout.fullest and len(gpus) > 1 else [_head(gpu.name, gpu) for gpu in gpus]
    return [*heads, *(_head("RAM", tier) for tier in machine.tiers if tier.kind == "cpu")]


def _head(name: str, tier: Tier) -> str:
    return f"{name}\nof {format_gib(tier.capacity_bytes)}" if tier.capacity_bytes is not None else f"{name}\nsize unknown"


def _cells(one: Plan, machine: Machine, layout: _Layout) -> list[str]:
    """Return the verdict of a plan and its figures; times and speeds of what would work alone."""
    assert one.estimate is not None
    shown = [tier for tier in machine.tiers if tier.kind in ("gpu", "cpu")]
    if layout.fullest and (fullest := fullest_gpu(one.estimate, machine)) is not None:
        shown = [tier for tier in shown if tier.kind == "cpu" or tier is fullest]
    amounts = [layout.amount(one.estimate.tiers.get(tier.name)) for tier in shown]
    if layout.fullest and machine.gpus and fullest is None:
        amounts = ["", *amounts[-1:]]
    return [word(one), *amounts, *(_FIGURES[name].cell(one, layout) for name in layout.figures)]


def fullest_gpu(expected: Estimate, machine: Machine) -> Tier | None:
    """Return the GPU with least to spare among those that are used; None if none is."""
    used = [gpu for gpu in machine.gpus if gpu.name in expected.tiers]
    return max(used, key=lambda gpu: expected.tiers[gpu.name].needed_bytes / (gpu.capacity_bytes or 1), default=None)
