"""The answer of `fitmatrix plan` in six lines: the best way, with its memory, speed and code; else why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType

from harness.core.records import Estimate, Machine, Plan, Verdict
from harness.core.units import format_gib, significant
from harness.planning.choice.recommend import Recommendation
from harness.planning.code import code_head, is_numbered, loading_program, one_call
from harness.planning.loading.seconds import ready_in
from harness.report.terminal import tables
from harness.report.terminal.next_steps import Asked, code_command
from harness.report.terminal.plan_table import fullest_gpu

_LINES = 6


def answer(recommendation: Recommendation, asked: Asked, code: str) -> RenderableType:
    """Return the first lines of what a plan says; `code` is what they have room for (`code_or_command`)."""
    best, verdict = recommendation.best, tables.title(_verdict(recommendation))
    return Group(verdict, tables.facts([*_figures(best, asked), ("code", code)])) if best else verdict


def code_or_command(recommendation: Recommendation, best: Plan, asked: Asked) -> str:
    """Return what the answer has room for: the call that loads the model, if nothing else belongs to it, or the command for it."""
    taken = tables.height(tables.title(_verdict(recommendation)))
    case = best.case.way
    for text in (_call(recommendation, best, asked), code_command(recommendation, best, asked)):
        if text and taken + tables.height(tables.facts([*_figures(best, asked), ("code", text)])) <= _LINES:
            return text
    return f"add --code {case}"


def _figures(best: Plan, asked: Asked) -> list[tuple[str, str]]:
    assert best.estimate is not None
    return [("memory", ", ".join(_memory(best.estimate, asked.machine))), ("speed", _speed(best.estimate))]


def _verdict(recommendation: Recommendation) -> str:
    """Say in a sentence what is best, or what comes nearest."""
    name, best = recommendation.spec.name, recommendation.best
    if best is not None:
        merit = recommendation.reason.partition(f". {best.why}")[0] if best.why else recommendation.reason
        return f"Best for {name}: {best.case.way}, {merit}."
    nearest = f" Nearest: {recommendation.nearest}." if recommendation.nearest else ""
    reason = main_reason(recommendation)
    return f"Nothing fits: {reason.removesuffix('.')}.{nearest}" if reason else f"Nothing fits for {name}.{nearest}"


def main_reason(recommendation: Recommendation) -> str | None:
    """Return why nothing works where it is no matter of memory: what is said of most cases."""
    plans = recommendation.plans
    if recommendation.best is not None or any(one.verdict is Verdict.TOO_BIG for one in plans):
        whys = {one.why for one in plans}
        return whys.pop() if len(whys) == 1 and recommendation.best is None else None
    return Counter(one.why for one in plans).most_common(1)[0][0] if plans else None


def _memory(expected: Estimate, machine: Machine) -> Iterator[str]:
    """Yield what must fit where; of several GPUs that are used only the one with least to spare."""
    fullest, used = fullest_gpu(expected, machine), sum(gpu.name in expected.tiers for gpu in machine.gpus)
    for tier in machine.tiers:
        need = expected.tiers.get(tier.name)
        if need is None or not need.needed_bytes or (tier.kind == "gpu" and tier is not fullest):
            continue
        where = {"cpu": "RAM", "disk": "disk"}.get(tier.kind, tier.name if used < 2 else f"{tier.name}, the fullest of {used}")
        most = f"-{format_gib(need.needed_high_bytes)}" if need.needed_high_bytes > need.needed_bytes else ""
        free = f" of {format_gib(tier.capacity_bytes)}" if tier.capacity_bytes is not None else ""
        yield f"{where} {format_gib(need.needed_bytes)}{most}{free} GiB"


def _speed(expected: Estimate) -> str:
    speed = expected.decode_tok_s
    spread = f"{significant(speed.low, 2)} to {significant(speed.high, 2)}"
    return f"{significant(speed.best, 2)} tokens/s ({spread}), {ready_in(expected)}"


def _call(recommendation: Recommendation, best: Plan, asked: Asked) -> str | None:
    """Return the call that loads the model, where nothing but the import of its class belongs to it."""
    source = recommendation.source
    if source.kind == "directory":  # the code names no directory
        return None
    in_order = is_numbered(best, asked.machine.gpus_differ)
    return one_call(loading_program(code_head(source, best.case.placement), best, in_order=in_order))
