"""How `fitmatrix plan` shows its plans in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.case import Machine, Plan, Span, Tier, TierEstimate, Verdict, Workload
from harness.units import format_gib, format_seconds, format_size, significant

if TYPE_CHECKING:
    from harness.commands.plan import Answer

# Colour supports the word and never stands for it (Okabe-Ito).
_COLOURS = {
    Verdict.FITS: "#009E73",
    Verdict.TIGHT: "#E69F00",
    Verdict.TOO_BIG: "#D55E00",
    Verdict.INVALID: "dim",
    Verdict.UNAVAILABLE: "dim",
}


def show(answers: Sequence[Answer], machine: Machine, load: Workload, *, explain: bool = False) -> None:
    """Print a table for each model, or every term of its one case."""
    console = Console(highlight=False, soft_wrap=False)
    for number, answer in enumerate(answers):
        if number:
            console.print()
        console.print(Text.assemble((_headline(answer), "bold"), "   ", _machine_line(machine)))
        if answer.blueprint.note:
            console.print(Text(f"  {answer.blueprint.note}", style="#E69F00"))
        console.print()
        if explain:
            _explain(console, answer.plans[0], answer)
        else:
            _table(console, answer, machine)
            _footer(console, answer, load)


def _headline(answer: Answer) -> str:
    drawn = answer.blueprint
    context = f", context {drawn.context_length:,}" if drawn.context_length else ""
    billions = significant(drawn.skeleton.parameters / 1e9)
    return f"{drawn.name}   {billions} B parameters, {len(drawn.skeleton.layers)} blocks{context}"


def _machine_line(machine: Machine) -> str:
    return "   ".join(_tier_line(tier) for tier in machine.tiers if tier.kind in ("gpu", "cpu"))


def _tier_line(tier: Tier) -> str:
    name = "RAM" if tier.kind == "cpu" else tier.model or tier.name
    speed = f", {tier.bytes_per_s / 1e9:,.0f} GB/s" if tier.bytes_per_s else ""
    size = f"{format_size(tier.total_bytes)}" if tier.total_bytes else "unknown"
    free = tier.capacity_bytes
    left = f" ({format_gib(free)} free)" if free is not None and free != tier.total_bytes else ""
    return f"{name}: {size}{left}{speed}"


def _table(console: Console, answer: Answer, machine: Machine) -> None:
    gpus = [gpu.name for gpu in machine.gpus]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("precision", "placement", "verdict"):
        table.add_column(heading, no_wrap=True)
    for heading in (*gpus, "RAM", "ready", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for one in answer.plans:
        if one.estimate is not None:
            table.add_row(*_row(one, gpus), "<- recommended" if one is answer.best else "")
    console.print(table)
    for line in _refusals(answer.plans):
        console.print(Text(line, style="dim"))


def _row(one: Plan, gpus: Sequence[str]) -> list[Text | str]:
    assert one.estimate is not None
    tiers, expected = one.estimate.tiers, one.estimate
    verdict = Text(one.verdict.value.replace("_", " "), style=_COLOURS.get(one.verdict, ""))
    cells: list[Text | str] = [one.case.precision, one.case.placement, verdict]
    cells += [_amount(tiers[gpu]) if gpu in tiers else "" for gpu in gpus]
    cells.append(_amount(tiers["cpu"]))
    if one.verdict in (Verdict.TOO_BIG, Verdict.UNAVAILABLE):
        return [*cells, "", ""]
    ready = expected.load_s.best + expected.first_token_s.best
    return [*cells, format_seconds(ready), _range(expected.decode_tok_s)]


def _amount(tier: TierEstimate) -> str:
    """Write what must fit, at worst, and what there is: "8.1 (-8.6)/12.0"."""
    most, capacity = format_gib(tier.needed_high_bytes), tier.capacity_bytes
    return f"{format_gib(tier.needed_bytes)} (-{most})" + (f"/{format_gib(capacity)}" if capacity else "")


def _range(span: Span) -> str:
    return f"{significant(span.low, 2)}-{significant(span.high, 2)}"


def _refusals(plans: Sequence[Plan]) -> Iterator[str]:
    """Say once for each reason which cases cannot be, and for each that is too big why."""
    reasons: dict[str, list[str]] = {}
    for one in plans:
        if one.verdict not in (Verdict.FITS, Verdict.UNKNOWN):
            reasons.setdefault(one.why or one.verdict.value, []).append(f"{one.case.precision}/{one.case.placement}")
    for why, cases in reasons.items():
        names = ", ".join(cases) if len(cases) < 5 else f"{', '.join(cases[:3])} and {len(cases) - 3} more"
        yield f"{names}: {why}"


def _footer(console: Console, answer: Answer, load: Workload) -> None:
    console.print()
    best, name = answer.best, answer.blueprint.name
    if best is None:
        console.print("Nothing fits.")
        return
    context = answer.planner.max_context(best)
    room = f" It holds a context of up to {context:,} tokens." if context else ""
    console.print(f"Recommended: {best.case.precision}/{best.case.placement}: {answer.reason}.{room}", soft_wrap=True)
    console.print(
        f"Planned for {load.prompt_tokens} + {load.new_tokens} tokens, batch {load.batch}; all figures are estimates.", style="dim"
    )
    short = f"{best.case.precision}/{best.case.placement}"
    console.print(
        f"To load it:  fitmatrix plan {name} --code {short}      To prove it:  pytest cases/ --model {name}", soft_wrap=True
    )


def _explain(console: Console, one: Plan, answer: Answer) -> None:
    """Show every term of a case, with its interval and where its constants come from."""
    console.print(f"{one.case.id}: {one.verdict.value.replace('_', ' ')}" + (f": {one.why}" if one.why else ""), soft_wrap=True)
    if one.estimate is None:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("GiB", *one.estimate.tiers):
        table.add_column(heading, justify="right" if heading != "GiB" else "left", no_wrap=True)
    for label, key in _TERMS:
        table.add_row(label, *(_gib(getattr(tier, key)) for tier in one.estimate.tiers.values()))
    console.print(table)
    seconds = one.estimate
    for label, span, unit in (
        ("load", seconds.load_s, "s"),
        ("first token", seconds.first_token_s, "s"),
        ("decode", seconds.decode_tok_s, "tokens/s"),
    ):
        console.print(f"{label:12} {significant(span.best)} {unit} ({significant(span.low)} to {significant(span.high)})")
    for figure, factor in seconds.corrections.items():
        console.print(f"{figure} is corrected by {significant(factor)} from results of this machine")
    console.print("\nConstants and their origin:", style="bold")
    for name, constant in answer.planner.used(one).items():
        console.print(
            Text(f"  {name} = {constant.best:g} ({constant.low:g} to {constant.high:g}): {constant.origin}"), soft_wrap=True
        )


_TERMS = (
    ("weights", "weights_bytes"),
    ("KV cache", "kv_bytes"),
    ("activations", "activation_bytes"),
    ("overhead", "overhead_bytes"),
    ("allocated, as torch says", "allocated_bytes"),
    ("peak", "peak_bytes"),
    ("  at least", "low_bytes"),
    ("  at most", "high_bytes"),
    ("peak while loading", "load_peak_bytes"),
    ("must fit", "needed_bytes"),
    ("  at most", "needed_high_bytes"),
    ("capacity", "capacity_bytes"),
)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else format_gib(size)
