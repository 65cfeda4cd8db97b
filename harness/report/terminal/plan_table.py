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
from harness.planning.quality import quality_kept
from harness.report.terminal import tables
from harness.report.terminal.subject import word
from harness.report.terminal.ways import Way, ways

# Colour supports the word and never replaces it (Okabe and Ito).
COLOURS = {Verdict.FITS: "#009e73", Verdict.TIGHT: "#e69f00", Verdict.TOO_BIG: "#d55e00"}
_WRAPPING = (1, 0)  # the columns of names
_MARK = "<-"


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
    ready: bool = False  #: whether the time until ready is shown
    rate: Callable[[Span], str] = _range_of
    marked: bool = True  #: whether the best way has a mark; the answer above names it
    fullest: bool = False  #: one column for all GPUs, of the one with least to spare
    compared: Container[str] = ("quality", "context")  #: what is shown of what ways are compared by
    longest_name: int = 0  #: columns; else it goes on in another line, at each @ and at hyphens; 0 for any
    contexts: Mapping[str, int] = {}  #: the most tokens of each way, by case, where that is compared
    quality: bool = False  #: whether what each keeps of the answers is compared

    @property
    def compares(self) -> tuple[str, ...]:
        """Return the headings of what ways are compared by."""
        asked = {"quality": self.quality, "context": bool(self.contexts)}
        return tuple(name for name, is_asked in asked.items() if is_asked and name in self.compared)

    def lacks(self, gpus: int) -> str:
        """Say what a wider table shows in addition."""
        parts = {
            "each GPU": self.fullest and gpus > 1,
            "the upper bound of each tier": self.amount is _best_of and self.rate is _range_of,
            "the time until ready": not self.ready,
            "every interval": self.rate is _middle_of,
            "the quality": self.quality and "quality" not in self.compared,
            "the longest context": bool(self.contexts) and "context" not in self.compared,
        }
        *most, last = [part for part, is_lacking in parts.items() if is_lacking] or [""]
        return f"{', '.join(most)} and {last}" if most else last


# The first that is not too wide is shown, the last in any case.
_LAYOUTS = (
    _Layout(_span_of, ready=True),
    _Layout(ready=True),
    _Layout(),
    _Layout(fullest=True),
    *(
        _Layout(fullest=True, rate=_middle_of, marked=False, compared=compared, longest_name=longest)
        for compared in (("quality", "context"), ("quality",), ())
        for longest in (0, 18, 12)
    ),
)


def of_cases(recommendation: Recommendation, machine: Machine) -> tuple[Table, str]:
    """Return a table of each case that has figures, and what a wider one would show in addition."""
    plans = [one for one in recommendation.plans if one.estimate is not None]
    rows = [Way((one.case.precision,), (one.case.place,), one) for one in plans]
    return _fitting(lambda _: rows, recommendation, machine)


def of_ways(recommendation: Recommendation, machine: Machine) -> tuple[Table, str]:
    """Return a table of the ways that differ, and what a wider one would show in addition."""

    def rows(layout: _Layout) -> Sequence[Way]:
        best, reason = recommendation.best, f"{recommendation.reason} "
        return ways(recommendation.plans, best, reason, lambda one: tuple(_cells(one, machine, layout)))

    return _fitting(rows, recommendation, machine)


def of_front(recommendation: Recommendation, machine: Machine) -> tuple[Table, str]:
    """Return a table of the ways that a search has found, with what each keeps of quality and how long a context fits."""
    found = [one for one in recommendation.plans if one.case.id in recommendation.contexts]
    rows = [Way((one.case.precision,), (one.case.place,), one) for one in found]
    return _fitting(lambda _: rows, recommendation, machine)


def _fitting(rows: Callable[[_Layout], Sequence[Way]], recommendation: Recommendation, machine: Machine) -> tuple[Table, str]:
    longest, is_search = recommendation.longest, bool(recommendation.contexts)
    for layout in (row._replace(contexts=longest, quality=is_search) for row in _LAYOUTS):
        table = _drawn(rows(layout), recommendation.best, machine, layout)
        if tables.has_room_for(table, wrapping=_WRAPPING, folding=layout.longest_name > 0):
            break
    return table, layout.lacks(len(machine.gpus))


def _drawn(rows: Sequence[Way], best: Plan | None, machine: Machine, layout: _Layout) -> Table:
    ready = ["ready"] if layout.ready else []
    words = [f"\n{name}" for name in ("precision", "placement", "verdict")]
    rate = "tokens/s" if layout.marked else "tok/s"
    figures = [f"\n{name}" for name in (*ready, rate, *layout.compares, *[""] * layout.marked)]
    table = tables.table(*words, *_heads(machine, layout), *figures, left=3)
    for way in rows:
        verdict, *cells = _cells(way.one, machine, layout)
        shown = Text(verdict, style=COLOURS.get(way.one.verdict, ""))
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
    """Return the verdict of a plan and its figures; speeds of what works alone."""
    assert one.estimate is not None
    shown = [tier for tier in machine.tiers if tier.kind in ("gpu", "cpu")]
    if layout.fullest and (fullest := fullest_gpu(one.estimate, machine)) is not None:
        shown = [tier for tier in shown if tier.kind == "cpu" or tier is fullest]
    amounts = [layout.amount(one.estimate.tiers.get(tier.name)) for tier in shown]
    if layout.fullest and machine.gpus and fullest is None:
        amounts = ["", *amounts[-1:]]
    works = one.verdict.is_good
    ready = [format_seconds(one.estimate.load_s.best + one.estimate.first_token_s.best) if works else ""] * layout.ready
    longest = layout.contexts.get(one.case.id)
    compared = {"quality": f"{quality_kept(one):.1%}", "context": f"{longest:,}" if longest is not None else ""}
    figures = [*amounts, *ready, layout.rate(one.estimate.decode_tok_s) if works else ""]
    return [word(one), *figures, *(compared[name] for name in layout.compares)]


def fullest_gpu(expected: Estimate, machine: Machine) -> Tier | None:
    """Return the GPU with least to spare among those that are used; None if none is."""
    used = [gpu for gpu in machine.gpus if gpu.name in expected.tiers]
    return max(used, key=lambda gpu: expected.tiers[gpu.name].needed_bytes / (gpu.capacity_bytes or 1), default=None)
