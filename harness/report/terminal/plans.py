"""Plans in the terminal: a table of precision x placement, the reasons, the recommendation; or every term of one case."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.catalog.resolve import history
from harness.core.placements import FILE, PLACEMENTS
from harness.core.records import Estimate, Machine, Plan, Span, Tier, TierEstimate, Verdict, Workload
from harness.core.units import format_bandwidth, format_count, format_gib, format_seconds, format_size, significant
from harness.planning import calibration
from harness.planning.recommend import Recommendation
from harness.report.terminal import tables

# Colour supports the word and never replaces it (Okabe and Ito).
COLOURS = {Verdict.FITS: "#009e73", Verdict.TIGHT: "#e69f00", Verdict.TOO_BIG: "#d55e00"}
_SHORT = 4

TERMS = (
    ("weights", "weights_bytes"),
    ("KV cache", "kv_bytes"),
    ("activations", "activation_bytes"),
    ("overhead", "overhead_bytes"),
    ("allocated by torch", "allocated_bytes"),
    ("peak", "peak_bytes"),
    ("  at least", "low_bytes"),
    ("  at most", "high_bytes"),
    ("peak while loading", "load_peak_bytes"),
    ("must fit", "needed_bytes"),
    ("  at most", "needed_high_bytes"),
    ("capacity", "capacity_bytes"),
)


def show_plans(recommendations: Sequence[Recommendation], machine: Machine, workload: Workload) -> None:
    """Print the machine, and for each model a table, the reasons of what does not fit, and the recommendation."""
    here = any(recommendation.planner.here for recommendation in recommendations)
    parts: list[RenderableType] = [tables.said(_machine_line(machine))]
    if machine.gpu_problem:
        parts.append(tables.said(f"{machine.gpu_problem}."))
    if here and (assumed := _assumed(machine)):
        parts.append(tables.said(assumed))
    if note := recommendations[0].planner.constants.note:
        parts.append(tables.said(f"{note}."))
    for recommendation in recommendations:
        table, left_out = _table(recommendation, machine)
        parts += [tables.title(_headline(recommendation)), table]
        reasons = "\n".join(_reasons(recommendation.plans))
        spec, conclusion = recommendation.spec, _conclusion(recommendation, workload)
        said = (
            left_out,
            history(spec.name) if recommendation.best else "",
            *recommendation.notes,
            reasons,
            _by_formulas(recommendation),
            conclusion,
        )
        parts += [tables.said(text) for text in said if text]
    tables.show(*parts)


def explain_plan(recommendation: Recommendation) -> None:
    """Print every term of the one case of `recommendation`, with its interval, and the constants that were used."""
    one = recommendation.plans[0]
    parts: list[RenderableType] = [tables.title(f"{one.case.id}: {_word(one)}"), *([tables.said(one.why)] if one.why else [])]
    parts += [tables.said(note) for note in recommendation.planner.notes(one)]
    if one.estimate is not None:
        parts += [_terms(one.estimate), *_largest(recommendation, one)]
        parts += [tables.facts(_seconds(one.estimate)), _constants(recommendation, one)]
    tables.show(*parts)


def _largest(recommendation: Recommendation, one: Plan) -> list[RenderableType]:
    """Name the largest tensors beside the weights at the peak on the GPU, as traced; say so if formulas stand in for a trace."""
    footprint = recommendation.planner.footprints.get(one.case.id)
    if footprint is None or not footprint.gpus:
        return []
    peak = footprint.on_gpu.traced_peak(one.case.workload)
    if peak is None:
        return [tables.said(f"Activations are computed by formulas: {footprint.on_gpu.why_formulas}.")]
    tensors = "; ".join(f"{name}, {format_size(size)}" for name, size in peak.worst.tensors)
    kv = f"KV cache, {format_size(peak.worst.kv_bytes)}"
    return [tables.said(f"Alive at the traced peak beside the weights: {kv}; {tensors}.")]


def _by_formulas(recommendation: Recommendation) -> str:
    """Say of a model that nobody has traced for these cards that its activations are by formulas, and how to have it traced."""
    footprints = recommendation.planner.footprints
    pairs = [(one.case, footprints[one.case.id]) for one in recommendation.plans if one.case.id in footprints]
    on_gpu = [(case, footprint.on_gpu) for case, footprint in pairs if footprint.gpus]
    lacking = [case for case, found in on_gpu if found.lacks_trace]
    if not lacking or any(found.precision and not found.lacks_trace for _, found in on_gpu):
        return ""
    case = f"{lacking[0].precision}/{lacking[0].placement}"
    return f"Activations on the GPU are computed by formulas; --explain {case} traces the model, once for each precision."


def _word(one: Plan) -> str:
    return one.verdict.value.replace("_", " ")


def _headline(recommendation: Recommendation) -> str:
    spec = recommendation.spec
    context = f", context {spec.context_length:,}" if spec.context_length else ""
    return f"{spec.name}: {format_count(spec.skeleton.parameters)} parameters, {len(spec.skeleton.layers)} blocks{context}"


def _machine_line(machine: Machine) -> str:
    return "   ".join(_tier_line(tier) for tier in machine.tiers if tier.kind in ("gpu", "cpu"))


def _tier_line(tier: Tier) -> str:
    name = "RAM" if tier.kind == "cpu" else tier.model or tier.name
    speed = f", {format_bandwidth(tier.bytes_per_s)}" if tier.bytes_per_s else ""
    free = f"{format_gib(tier.capacity_bytes)} GiB free" if tier.capacity_bytes is not None else "size unknown"
    return f"{name}: {free}{speed}"


def _assumed(machine: Machine) -> str:
    """Say which bandwidths the times assume until RAM and disk of this machine are measured; planning measures nothing."""
    unmeasured = {tier.kind for tier in machine.tiers if not tier.bytes_per_s}
    if "cpu" not in unmeasured:  # a disk alone may be one that cannot be measured
        return ""
    known = calibration.default()
    speeds = [
        f"{name} at {format_bandwidth(found.low)} to {format_bandwidth(found.high)}"
        for kind, name, found in (("cpu", "RAM", known["ram_bytes_per_s"]), ("disk", "disk", known["disk_bytes_per_s"]))
        if kind in unmeasured
    ]
    return f"Times assume {', '.join(speeds)}, not measured yet: fitmatrix hardware measures once (1 to 3 s)."


def _span_of(tier: TierEstimate | None) -> str:
    return f"{format_gib(tier.needed_bytes)}-{format_gib(tier.needed_high_bytes)}" if tier else ""


def _best_of(tier: TierEstimate | None) -> str:
    return format_gib(tier.needed_bytes) if tier else ""


class _Layout(NamedTuple):
    """What a table of plans shows beside verdict and tokens/s."""

    amount: Callable[[TierEstimate | None], str] | None  #: formats what must fit in a tier; None leaves the tiers out
    ready: bool  #: whether the time until ready is shown
    lacks: str = ""  #: what a wider table shows in addition


# The first that is not too wide is shown.
_LAYOUTS = (
    _Layout(_span_of, ready=True),
    _Layout(_best_of, ready=True, lacks="the upper bound of each tier"),
    _Layout(_best_of, ready=False, lacks="the upper bound of each tier and the time until ready"),
    _Layout(None, ready=True, lacks="the memory of each tier"),
)


def _table(recommendation: Recommendation, machine: Machine) -> tuple[Table, str]:
    """Draw a row for each case that can be loaded, as detailed as the screen is wide; and say what was left out."""
    for layout in _LAYOUTS:
        table = _drawn(recommendation, machine, layout)
        if tables.has_room_for(table):
            break
    return table, f"A wider terminal, --explain CASE and --json show {layout.lacks}." if layout.lacks else ""


def _drawn(recommendation: Recommendation, machine: Machine, layout: _Layout) -> Table:
    tiers = [tier for tier in machine.tiers if tier.kind in ("gpu", "cpu")] if layout.amount else []
    heads = [f"{'RAM' if tier.kind == 'cpu' else tier.name}\nof {_gib(tier.capacity_bytes)}" for tier in tiers]
    ready = ["ready"] if layout.ready else []
    table = tables.table("precision", "placement", "verdict", *heads, *ready, "tokens/s", "", left=3)
    for one in recommendation.plans:
        if one.estimate is not None:
            amounts = [layout.amount(one.estimate.tiers.get(tier.name)) for tier in tiers if layout.amount]
            mark = "<-" if one is recommendation.best else ""
            verdict = Text(_word(one), style=COLOURS.get(one.verdict, ""))
            seconds, speed = _speed(one, one.estimate)
            table.add_row(one.case.precision, one.case.placement, verdict, *amounts, *([seconds] * len(ready)), speed, mark)
    return table


def _speed(one: Plan, expected: Estimate) -> tuple[str, str]:
    if not one.verdict.is_good:
        return "", ""
    return format_seconds(expected.load_s.best + expected.first_token_s.best), _range(expected.decode_tok_s)


def _range(span: Span) -> str:
    return f"{significant(span.low, 2)}-{significant(span.high, 2)}"


def _reasons(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield each reason once, with the cases that it applies to."""
    reasons: dict[str, list[str]] = {}
    for one in plans:
        if one.verdict is not Verdict.FITS and one.why:
            reasons.setdefault(one.why, []).append(f"{one.case.precision}/{one.case.placement}")
    for why, cases in reasons.items():
        more = f" and {len(cases) - _SHORT} more" if len(cases) > _SHORT else ""
        yield f"{', '.join(cases[:_SHORT])}{more}: {why}"


def _conclusion(recommendation: Recommendation, workload: Workload) -> str:
    planned = f"Estimates for {workload.prompt_tokens} + {workload.new_tokens} tokens, batch {workload.batch}."
    best = recommendation.best
    if best is None:
        nearest = f" Nearest: {recommendation.nearest}." if recommendation.nearest else ""
        return f"Nothing fits.{nearest} {planned}"
    name, case = _sayable(recommendation), f"{best.case.precision}/{best.case.placement}"
    context = recommendation.planner.max_context(best)
    room = f" The longest context that fits is {context:,} tokens." if context else ""
    given = " --device-map FILE" if best.case.placement == FILE else ""
    return (
        f"Best: {case}: {recommendation.reason.removesuffix('.')}.{room} {planned}\n"
        f"To load it:   fitmatrix plan {name} --code {case}{given}\n{_proof(best, name, given)}"
    )


def _proof(best: Plan, name: str, given: str) -> str:
    named = f" --placement {best.case.placement}" if PLACEMENTS[best.case.placement].parallel else ""
    return f"To prove it:  pytest cases/ --model {name}{named}{given}"


def _sayable(recommendation: Recommendation) -> str:
    """Write the model as an argument of a command: a directory by its path from here."""
    source = recommendation.source
    if source.kind != "directory":
        return f"{source.location} --file {shlex.quote(source.file)}" if source.file else source.name
    place = Path(source.location) / (source.file or "")
    if not place.is_relative_to(Path.cwd()):
        return shlex.quote(source.location)
    inside = place.relative_to(Path.cwd())
    return shlex.quote(f"./{inside}") if inside.parts else "."


def _terms(expected: Estimate) -> Table:
    table = tables.table("GiB", *expected.tiers)
    for label, key in TERMS:
        table.add_row(label, *(_gib(getattr(tier, key)) for tier in expected.tiers.values()))
    return table


def _seconds(expected: Estimate) -> Iterator[tuple[str, str]]:
    spans = {"load": expected.load_s, "first token": expected.first_token_s, "decode": expected.decode_tok_s}
    for label, span in spans.items():
        unit = "tokens/s" if label == "decode" else "s"
        yield label, f"{significant(span.best)} {unit}, {significant(span.low)} to {significant(span.high)}"
    if expected.corrections:
        yield "corrected", f"{', '.join(expected.corrections)}: measured on this machine, see below"


def _constants(recommendation: Recommendation, one: Plan) -> Table:
    used = recommendation.planner.used(one)
    return tables.facts((name, f"{found.best:g}, {found.low:g} to {found.high:g}. {found.origin}") for name, found in used.items())


def _gib(size: int | None) -> str:
    return "unknown" if size is None else format_gib(size)
