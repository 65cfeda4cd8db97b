"""Plans in the terminal: the answer first, then the ways that differ, or with `--all` every case and every reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from harness.catalog.resolve import history
from harness.core.records import Plan, Verdict
from harness.planning.choice.recommend import Recommendation
from harness.planning.images import of_images
from harness.planning.quality import AS_STORED, ON_MODEL, ON_SIMILAR
from harness.report.terminal import plan_table, tables
from harness.report.terminal.answer import answer, code_or_command, main_reason
from harness.report.terminal.next_steps import Asked, code_command, plan_command, proof_command
from harness.report.terminal.subject import assumed, by_formulas, machine_line, model_line, taken_for_granted

_SHORT = 4
_BY_RULE = "Quality is the share of the answers that stay right, by rule of thumb; context is the most tokens that fit."
_WHERE = {ON_MODEL: "measured on this model", ON_SIMILAR: "measured on similar models", AS_STORED: "keeps what is stored"}


def show_plans(recommendations: Sequence[Recommendation], asked: Asked) -> None:
    """Print for each model the answer, a table of what differs and what else must be known; then what holds for all of them."""
    here = any(recommendation.planner.here for recommendation in recommendations)
    parts = [part for recommendation in recommendations for part in _parts(recommendation, asked)]
    machine = asked.machine
    said = (
        f"{machine.gpu_problem}." if machine.gpu_problem else "",
        assumed(machine) if here else taken_for_granted(machine),
        f"{note}." if (note := recommendations[0].planner.constants.note) else "",
    )
    tables.show(*parts, *(tables.said(text) for text in said if text))


def _parts(recommendation: Recommendation, asked: Asked) -> Iterator[RenderableType]:
    best, spec = recommendation.best, recommendation.spec
    yield answer(recommendation, asked)
    yield tables.said(f"{model_line(spec)}\n{machine_line(asked.machine)}\n{_tokens(recommendation)}")
    drawn = plan_table.of_front if recommendation.contexts else plan_table.of_cases if asked.all else plan_table.of_ways
    table, lacks = drawn(recommendation, asked.machine)
    if table.row_count:
        yield table
    said = (
        "\n".join(_reasons(recommendation, recommendation.plans if asked.all else _unshown(recommendation))),
        best.why if best else None,
        f"{best.case.way}: {best.estimate.bound_by}." if best and best.estimate else "",
        _quality(recommendation),
        history(spec.name) if best else "",
        *recommendation.notes,
        by_formulas(recommendation),
        _left_out(recommendation, asked, lacks, table.row_count),
    )
    yield from (tables.said(text) for text in said if text)
    if best:
        yield tables.commands(_steps(recommendation, best, asked))


def _quality(recommendation: Recommendation) -> str:
    """Say where the quality of the ways comes from: of a search always, else where some was measured."""
    known, ways = recommendation.planner.known_quality, dict[str, dict[str, None]]()
    for one in recommendation.plans:
        found = known.of(one.case) if one.verdict.is_good else None
        if found is not None:
            ways.setdefault(found[1], {})[one.case.precision] = None
    if not (recommendation.contexts or ways.keys() - {AS_STORED}):
        return ""
    if not ways:
        return _BY_RULE
    said = "; ".join(f"{', '.join(names)} {_WHERE[where]}" for where, names in ways.items())
    context = "; context is the most tokens that fit" if recommendation.contexts else ""
    return f"Quality is the share of the next tokens that stay as in 16 bits: {said}, others by rule of thumb{context}."


def _tokens(recommendation: Recommendation) -> str:
    """Say for how many tokens the estimates are, and how many would fit."""
    workload, best, image = recommendation.workload, recommendation.best, recommendation.spec.image
    most = recommendation.planner.max_context(best) if best else None
    batch = f" in a batch of {workload.batch}" if workload.batch > 1 else ""
    room = f"; up to {most:,} fit" if most else ""
    seen = f", {of_images(image, workload)}" if image is not None else ""
    return f"Estimates for {workload.prompt_tokens:,} + {workload.new_tokens:,} tokens{seen}{batch}{room}"


def _unshown(recommendation: Recommendation) -> list[Plan]:
    """Return the plans whose reason no row of the short table tells: what is too big if nothing fits, and whole precisions."""
    good = {one.case.precision for one in recommendation.plans if one.verdict.is_good}
    too_big = {one.case.precision for one in recommendation.plans if one.verdict is Verdict.TOO_BIG}
    if recommendation.contexts:
        return [one for one in recommendation.plans if one.case.id not in recommendation.contexts]
    if recommendation.best is None:
        return [one for one in recommendation.plans if one.verdict is Verdict.TOO_BIG or one.case.precision not in too_big]
    return [one for one in recommendation.plans if one.case.precision not in good | too_big]


def _reasons(recommendation: Recommendation, plans: Sequence[Plan]) -> Iterator[str]:
    """Yield each reason once, with the cases that it applies to; the main one is in the answer."""
    reasons: dict[str, list[str]] = {}
    for one in plans:
        if one.verdict is not Verdict.FITS and one.why and one.why != main_reason(recommendation):
            reasons.setdefault(one.why, []).append(one.case.way)
    for why, cases in reasons.items():
        more = f" and {len(cases) - _SHORT} more" if len(cases) > _SHORT else ""
        yield f"{', '.join(cases[:_SHORT])}{more}: {why}"


def _left_out(recommendation: Recommendation, asked: Asked, lacks: str, rows: int) -> str:
    """Say what is not shown, and how it is."""
    wider = f"A wider terminal, --explain CASE and --json show {lacks}." if lacks and rows else ""
    planned = len(recommendation.plans)
    if asked.all or rows in (0, planned) or recommendation.contexts:
        return wider
    command = plan_command(recommendation, asked, more="--all")
    return f"{wider} All {planned} cases, and why some cannot work: {command}".strip()


def _steps(recommendation: Recommendation, best: Plan, asked: Asked) -> str:
    """Name the next commands; what the answer shows already is not said again."""
    script = code_command(recommendation, best, asked)
    shown = code_or_command(recommendation, best, asked) == script
    return ("" if shown else f"To load it:   {script}\n") + f"To prove it:  {proof_command(recommendation, best, asked)}"
