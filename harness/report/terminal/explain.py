"""One case explained: every term of its estimate, and the constants that decide it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from harness.core.records import Estimate, Plan, Span
from harness.core.units import format_gib, format_share, format_size, significant
from harness.planning.choice.recommend import Recommendation
from harness.planning.cost.speed import LoadTime
from harness.planning.images import explained
from harness.planning.loading import seconds
from harness.report.terminal import tables
from harness.report.terminal.subject import word

_TERMS = (
    ("weights", "weights_bytes"),
    ("KV cache", "kv_bytes"),
    ("activations", "activation_bytes"),
    ("overhead", "overhead_bytes"),
    ("peak while loading", "load_peak_bytes"),
    ("must fit", "needed_bytes"),
    ("  at most", "needed_high_bytes"),
    ("capacity", "capacity_bytes"),
)
_MORE_TERMS = (
    ("allocated by torch", "allocated_bytes"),
    ("peak", "peak_bytes"),
    ("  at least", "low_bytes"),
    ("  at most", "high_bytes"),
)
_CONSTANTS = 2  # that decide most; all of them take `--all`


def explain_plan(recommendation: Recommendation, *, whole: bool = False) -> None:
    """Print the terms of the one case of `recommendation`, with its interval, and the constants that have a part in it.

    Without `whole` it is no more than a screen: the terms that decide, and the constants that decide most.
    """
    one = recommendation.plans[0]
    verdict = tables.title(f"{one.case.id}: {word(one)}" + ("" if one.why is None else f": {one.why}"))
    notes = [tables.said(note) for note in (*_of_images(recommendation, one), *recommendation.planner.notes(one))]
    if one.estimate is None:
        tables.show(verdict, *notes)
        return
    alive = _largest(recommendation, one, None if whole else 1)
    load = seconds.timed(recommendation.planner, one)
    figures = Group(verdict, _terms(one.estimate, whole), tables.facts(_seconds(one.estimate, load, whole)), *alive)
    if whole and (slow := seconds.speed_up(recommendation.planner, one)) is not None:
        notes.append(tables.said(f"{slow}."))
    rest = [] if whole else [tables.said("All terms and constants, and where each comes from: add --all.")]
    tables.show(figures, *notes, Group(_constants(recommendation, one, whole), *rest))


def _of_images(recommendation: Recommendation, one: Plan) -> Iterator[str]:
    """Yield what the images of the prompt take."""
    image, footprint = recommendation.spec.image, recommendation.planner.footprints.get(one.case.id)
    if image is not None and footprint is not None:
        yield explained(image, one.case.workload, footprint.fmt.element_bytes)


def _terms(expected: Estimate, whole: bool) -> Table:
    table = tables.table("GiB", *expected.tiers)
    for label, key in (*_TERMS[:4], *_MORE_TERMS * whole, *_TERMS[4:]):
        sizes = [getattr(tier, key) for tier in expected.tiers.values()]
        if whole or any(sizes):
            table.add_row(label, *("unknown" if size is None else format_gib(size) for size in sizes))
    return table


def _seconds(expected: Estimate, load: LoadTime | None, whole: bool) -> Iterator[tuple[str, str]]:
    if load is None:
        yield "load", _interval(expected.load_s, "s")
    else:
        yield from _loading(load, whole)
    yield "first token", _interval(expected.first_token_s, "s")
    yield "decode", _interval(expected.decode_tok_s, "tokens/s") + (f"; {expected.bound_by}" if expected.bound_by else "")
    if expected.corrections:
        yield "corrected", f"{', '.join(expected.corrections)}: measured on this machine, see below"


def _loading(load: LoadTime, whole: bool) -> Iterator[tuple[str, str]]:
    """Yield what loading takes with the files in RAM and not, and if asked for all what it does meanwhile."""
    first, again = _interval(load.cold_s, "s"), _interval(load.warm_s, "s") if load.warm_s is not None else ""
    if not whole:
        yield "load", f"{first}; from the page cache {again}" if again and load.read_s.high else first
        return
    done = ", ".join(f"{name} {significant(spent)}" for name, spent in load.by_phase.items())
    yield "load", f"{first}: read from the disk {significant(load.read_s.best)}, {done}"
    if again:
        yield "load again", f"{again}, from the page cache"


def _interval(span: Span, unit: str) -> str:
    return f"{significant(span.best)} {unit}, {significant(span.low)} to {significant(span.high)}"


def _constants(recommendation: Recommendation, one: Plan, whole: bool) -> RenderableType:
    """List the constants that have a part in a figure, the one with the largest part first."""
    shares = _shares(recommendation.planner.made_up(one))
    known, order = recommendation.planner.constants, sorted(shares, key=lambda name: -shares[name])
    spans = {name: f"{known[name].best:.3g}, {known[name].low:.3g} to {known[name].high:.3g}" for name in order}
    if whole:
        share = {name: f"up to {format_share(shares[name])} of a figure" for name in order}
        return tables.facts((name, [f"{spans[name]}; {share[name]}", known[name].origin]) for name in order)
    table = tables.table("decided most by", "", "", left=3)
    for name in order[:_CONSTANTS]:
        table.add_row(name, spans[name], known[name].origin.partition(":")[0])
    return table


def _shares(one: Plan) -> dict[str, float]:
    """Return by constant the largest part that it has in any figure."""
    shares: dict[str, float] = {}
    for figure in one.estimate.makeup.values() if one.estimate else ():
        for name, part in figure.parts.items():
            shares[name] = max(shares.get(name, 0.0), abs(part) / figure.whole)
    return shares


def _largest(recommendation: Recommendation, one: Plan, most: int | None) -> list[RenderableType]:
    """Name the largest tensors beside the weights at the peak on the GPU, as traced; say so if formulas stand in for a trace."""
    footprint = recommendation.planner.footprints.get(one.case.id)
    if footprint is None or not footprint.gpus:
        return []
    peak = footprint.on_gpu.traced_peak(one.case.workload)
    if peak is None:
        return [tables.said(f"Activations are computed by formulas: {footprint.on_gpu.why_formulas}.")]
    tensors = "; ".join(f"{name}, {format_size(size)}" for name, size in peak.worst.tensors[:most])
    kv = f"KV cache, {format_size(peak.worst.kv_bytes)}"
    return [tables.said(f"Alive at the traced peak beside the weights: {kv}; {tensors}.")]
