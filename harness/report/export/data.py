"""Results as data for programs: one JSON object, or a CSV table with a row for each case.

Both hold the newest result of each case, under the names and in the units of the records (`harness.core.records`): bytes, seconds,
tokens/s. Long series (timelines, samples, phases) stay in `results.jsonl`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import harness
from harness.core.metrics import METRICS
from harness.core.records import Result, Workload
from harness.core.text import line
from harness.report.export.answers import PublishedAnswer, answers
from harness.report.page.figures import predictions, status
from harness.report.page.view import Cell, blocks
from harness.report.terminal import output
from harness.results import selection

EXPORT_SCHEMA = 1

_CASE = ("model", "precision", "placement", "vram_bytes", "ram_bytes", "workload")
_RESULT = (
    "weights",
    "verdict",
    "outcome",
    "stage",
    "why",
    "metrics",
    "noisy",
    "checks",
    "estimate",
    "environment",
    "failed",
    "device_map",
)


def render_json(results: Sequence[Result], problems: Sequence[str] = ()) -> str:
    """Write one object: schema, fitmatrix, answers, cases, machines, problems.

    An answer is of one model, machine, kind of weights, workload and pair of limits; its `case` is null if nothing works, its
    `predicted` is what a search found best and nothing measured.
    What is not a finite number is null.
    """
    arranged = blocks(results)
    found = {
        "schema": EXPORT_SCHEMA,
        "fitmatrix": harness.__version__,
        "answers": [_answer(answer) for block in arranged for answer in answers(block)],
        "cases": [_case(result) for result in selection.newest(results)],
        "machines": list({block.machine.name: block.machine for block in arranged}.values()),
        "problems": list(problems),
    }
    return output.json_text(found) + "\n"


def _answer(answer: PublishedAnswer) -> dict[str, Any]:
    last = answer.cells[-1].result
    best = answer.best
    memory = best.memory if best else None
    return {
        "model": answer.block.model,
        "machine": answer.block.machine.name,
        "weights": last.weights,
        "workload": last.case.workload,
        "vram_bytes": answer.vram_bytes,
        "ram_bytes": answer.ram_bytes,
        "said": answer.sentence,
        "case": best.result.id if best else None,
        "tier": memory.tier if memory else None,
        "needed_bytes": int(memory.need.number) if memory else None,
        "peak_bytes": int((memory.resident or memory.need).number) if memory else None,
        "capacity_bytes": int(memory.capacity.value) if memory and memory.capacity else None,
        "ready_s": best.result.metrics.get("ready_s") if best else None,
        "decode_tok_s": best.result.metrics.get("decode_tok_s") if best else None,
        "quality": best.result.quality.verdict if best and best.result.quality else None,
        "code": best.result.code if best else None,
        "predicted": _proposed(answer.proposed),
    }


def _proposed(cell: Cell | None) -> dict[str, Any] | None:
    """Return what a search found best, with what its plan says; null where that is among what was measured."""
    if cell is None or cell.proposed is None:
        return None
    return {
        "case": cell.result.id,
        "verdict": cell.result.verdict,
        "tier": cell.memory.tier if cell.memory else None,
        "needed_bytes": int(cell.memory.need.number) if cell.memory else None,
        "capacity_bytes": int(cell.memory.capacity.value) if cell.memory and cell.memory.capacity else None,
        "decode_tok_s": cell.proposed.number,
        "code": cell.result.code,
        "command": cell.result.command,
    }


def _case(result: Result) -> dict[str, Any]:
    quality = result.quality
    return {
        "id": result.id,
        "run": result.run,
        "at": result.at,
        **{name: getattr(result.case, name) for name in _CASE},
        "machine": result.machine.name,
        **{name: getattr(result, name) for name in _RESULT},
        "status": status(result).word,
        "quality": quality.verdict if quality else None,
        "quality_why": quality.why if quality else None,
    }


_WORKLOAD = Workload.__struct_fields__
_PREDICTED = (
    "load_s",
    "first_token_s",
    "decode_tok_s",
    "ram_needed_bytes",
    "ram_peak_bytes",
    "load_ram_peak_bytes",
    "vram_peak_bytes",
    "vram_process_peak_bytes",
    "load_vram_peak_bytes",
    "disk_bytes",
)
_VERSIONS = ("python", "fitmatrix", "torch", "transformers", "accelerate", "bitsandbytes")
# The columns of the table, in their order. New ones come at the end.
COLUMNS = (
    *("id", "run", "at", "model", "precision", "placement", "vram_bytes", "ram_bytes"),
    *_WORKLOAD,
    *("weights", "machine", "gpu", "cpu", "verdict", "outcome", "stage", "recommended", "quality", "noisy", "why"),
    *METRICS,
    *(f"predicted_{key}" for key in _PREDICTED),
    *_VERSIONS,
    "status",
)


def render_csv(results: Sequence[Result]) -> str:
    """Write a row for each case under COLUMNS, by RFC 4180; all digits of numbers, and no text that a spreadsheet would run."""
    chosen = {id(answer.best.result) for block in blocks(results) for answer in answers(block) if answer.best}
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # commas, quotes where they are needed, CRLF
    writer.writerow(COLUMNS)
    for result in selection.newest(results):
        found = dict(_row(result)) | {"recommended": "yes" if id(result) in chosen else "no"}
        writer.writerow([_written(found.get(name)) for name in COLUMNS])
    return text.getvalue()


def _row(result: Result) -> Iterator[tuple[str, object]]:
    case, machine = result.case, result.machine
    yield from (("id", result.id), ("run", result.run), ("at", result.at))
    yield from ((name, getattr(case, name)) for name in _CASE if name != "workload")
    yield from ((name, getattr(case.workload, name)) for name in _WORKLOAD)
    yield from (("weights", result.weights), ("machine", machine.name), ("cpu", machine.cpu))
    yield "gpu", " + ".join(gpu.model or gpu.name for gpu in machine.gpus)
    yield from (("verdict", result.verdict.value), ("outcome", result.outcome.value), ("stage", result.stage), ("why", result.why))
    yield "quality", result.quality.verdict if result.quality else None
    yield "noisy", " ".join(result.noisy)
    yield from ((key, value) for key, value in result.metrics.items() if key in METRICS)
    expected = predictions(result.estimate) if result.estimate else {}
    yield from ((f"predicted_{key}", span.best) for key, span in expected.items())
    yield from ((name, result.environment.get(name)) for name in _VERSIONS)
    yield "status", status(result).word


# What a spreadsheet takes for a formula when it begins a cell, in both widths (OWASP, CSV injection).
_FORMULAS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def _written(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return _number(value)
    text = line(str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULAS) else text


def _number(value: float) -> str:
    """Write all digits of a number, whole ones without a point; what is none is left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return str(int(value)) if float(value).is_integer() else repr(value)
