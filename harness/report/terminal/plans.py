"""Plans in the terminal: the answer first, then the ways that differ, or with `--all` every case and every reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from harness.catalog.resolve import history
from harness.core.records import Plan, Verdict
from harness.planning.choice.recommend import Recommendation
from harness.planning.images import of_images
from harness.report.terminal import plan_table, tables
from harness.report.terminal.answer import answer, code_or_command, main_reason
from harness.report.terminal.next_steps import Asked, code_command, plan_command, proof_command
from harness.report.terminal.subject import assumed, by_formulas, machine_line, model_line, taken_for_granted

_SHORT = 4


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
    code = code_or_command(recommendation, best, asked) if best else ""
    yield answer(recommendation, asked, code)
    yield tables.said(f"{model_line(spec)}\n{machine_line(asked.machine)}\n{_tokens(recommendation)}")
    drawn = plan_table.of_front if recommendation.contexts else plan_table.of_cases if asked.all else plan_table.of_ways
    table = drawn(recommendation, asked.machine)
    if table.drawn.row_count:
        yield table.drawn
    said = (
        table.notes if table.drawn.row_count else "",
        "\n".join(_reasons(recommendation, recommendation.plans if asked.all else _unshown(recommendation))),
        best.why if best else None,
        f"{best.case.way}: {best.estimate.bound_by}." if best and best.estimate else "",
        "" if "quality" in table.columns else _weighed(recommendation),
        history(spec.name) if best else "",
        *recommendation.notes,
        by_formulas(recommendation),
        _left_out(recommendation, asked, table.lacks, table.drawn.row_count),
    )
    yield from (tables.said(text) for text in said if text)
    if best:
        yield tables.commands(_steps(recommendation, best, asked, code))


def _weighed(recommendation: Recommendation) -> str:
    """Say what is known of the quality that the choice weighs; empty where that is the rule of thumb."""
    sources = plan_table.quality_sources(recommendation)
    return f"The choice weighs the share of the next tokens that stay as in 16 bits: {sources}." if sources else ""


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


def _steps(recommendation: Recommendation, best: Plan, asked: Asked, shown: str) -> str:
    """Name the next commands; what the answer has `shown` already is not said again."""
    script = code_command(recommendation, best, asked)
    return ("" if shown == script else f"To load it:   {script}\n") + f"To prove it:  {proof_command(recommendation, best, asked)}"
