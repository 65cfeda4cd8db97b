"""The report of a first contact: every estimate beside what was measured, and the constants that follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harness.core.records import Outcome, Result
from harness.core.units import format_size, significant
from harness.planning.calibrating import evidence, fit
from harness.planning.calibration import default
from harness.report.export.markdown import code, escaped, table
from harness.results import store

NAME = "report.md"
# torch's own figure is counted to the byte, but for what lies in whole blocks of the allocator.
ALLOCATED_SHARE = 0.02
SEND = "Send report.md and results.jsonl of this directory with an issue: they name the machine by its parts alone."


class Estimated(NamedTuple):
    """A figure of a case: what was measured, what the plan said, and whether that held."""

    case: str
    figure: str
    measured: str
    planned: str
    holds: bool


def compared(result: Result) -> Iterator[Estimated]:
    """Yield the figures of a case that ran on GPUs and has an estimate."""
    if result.outcome is not Outcome.OK or result.estimate is None:
        return
    case = f"{result.case.precision}/{result.case.place}"
    gpus = [tier for name, tier in result.estimate.tiers.items() if name.startswith("gpu") and tier.weights_bytes]
    peak, process = result.metrics.get("vram_peak_bytes"), result.metrics.get("vram_process_peak_bytes")
    if gpus and peak:
        most = max(gpus, key=lambda tier: tier.allocated_bytes)
        workspace = default()["gpu_workspace_bytes"].high  # of cuBLAS, which torch allocates and the plan has in the overhead
        low, high = most.allocated_bytes * (1 - ALLOCATED_SHARE), (most.allocated_bytes + workspace) * (1 + ALLOCATED_SHARE)
        planned = f"{format_size(most.allocated_bytes)}, workspace up to {format_size(workspace)}"
        yield Estimated(case, "allocated", format_size(peak), planned, low <= peak <= high)
        if process and len(gpus) == 1:
            wanted = f"at most {format_size(most.needed_high_bytes)}"
            yield Estimated(case, "process", format_size(process), wanted, process <= most.needed_high_bytes)
    speed, span = result.metrics.get("decode_tok_s"), result.estimate.decode_tok_s
    if speed and "decode_tok_s" not in result.noisy:
        planned = f"{significant(span.low, 2)} to {significant(span.high, 2)} tokens/s"
        yield Estimated(case, "decode", f"{significant(speed)} tokens/s", planned, span.low <= speed <= span.high)


def render(results: Iterable[Result], seconds: float) -> str:
    """Write the report in Markdown."""
    results = list(results)
    rows = [row for result in results for row in compared(result)]
    held = sum(row.holds for row in rows)
    parts = [
        f"# First contact: {escaped(results[-1].machine.name)}",
        f"{len(results)} cases in {seconds:.0f} s. {held} of {len(rows)} estimates held.",
    ]
    cells = [[code(row.case), row.figure, row.measured, row.planned, "yes" if row.holds else "**no**"] for row in rows]
    parts += ["\n".join(table(["case", "figure", "measured", "planned", "held"], cells))] if cells else []
    ends = [
        [code(result.id), result.outcome.value, result.stage, escaped(str(result.why), 200)]
        for result in results
        if result.outcome is not Outcome.OK
    ]
    parts += ["## Did not run to its end", "\n".join(table(["case", "outcome", "while", "why"], ends))] if ends else []
    return "\n\n".join([*parts, "## Constants that follow", *_constants(results), SEND]) + "\n"


def _constants(results: Iterable[Result]) -> Iterator[str]:
    base = default()
    found = fit.fit_constants(base, evidence.observations(results, base.digest))
    if not found.calibration.fitted:
        yield "None: no case says enough."
        return
    rows = [
        [
            code(name),
            f"{base[name].best:.4g}",
            f"{now.best:.4g}",
            f"{now.low:.4g} to {now.high:.4g}",
            str(one.results),
            str(one.cases),
        ]
        for name, one in found.calibration.fitted.items()
        for now in [found.calibration[name]]
    ]
    yield "\n".join(table(["constant", "of the package", "here", "interval", "results", "cases"], rows))
    yield "`fitmatrix calibrate first-contact` keeps them for this machine."
    if found.contradicting:
        yield "Far from what the others say: " + "; ".join(f"{one.case} {one.figure}" for one in found.contradicting) + "."


def write(directory: Path, seconds: float) -> str:
    """Write the report of a directory beside its results, and return it; empty without results."""
    if not (directory / store.NAME).exists():
        return ""
    results, _ = store.Store(directory).read()
    if not results:
        return ""
    text = render(results, seconds)
    (directory / NAME).write_text(text, encoding="utf-8")
    return text
