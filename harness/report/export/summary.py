"""Results as Markdown, for the summary of a job or a README: the answer, the matrix, what was not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from harness.core.records import Result
from harness.core.text import plural
from harness.report.export.answers import answers, every, held, sentences, speed
from harness.report.export.markdown import block as program
from harness.report.export.markdown import code, escaped, folded, table
from harness.report.page.view import Block, Cell, Matrix, blocks

# GitHub drops a step's summary of more than 1 MiB; the rest is for whatever else the step says.
MOST_SUMMARY_BYTES = 1_000_000
_NAME, _REASON, _FACTS = 120, 300, 1000
_MOST_REASONS = 30
# Beside the word, so that a wide table is read at a glance.
_ICONS: Mapping[str, str] = {
    "works": "✅",
    "broken": "⚠️",
    "fault": "⚠️",
    "oom": "❌",
    "timeout": "⏱️",
    "crash": "💥",
    "too-big": "❌",
}


def render_summary(results: Sequence[Result], problems: Sequence[str] = ()) -> str:
    """Write results as Markdown of less than MOST_SUMMARY_BYTES; the end says what was left out."""
    found = blocks(results)
    parts = ["No results yet. Run `pytest cases/ --model MODEL` to make some.\n"] if not found else []
    if len(found) > 1:
        parts += ["\n".join(_contents(found)) + "\n"]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        parts.append(f"Ignored of the results: {escaped(problems[0], _REASON)}{more}\n")
    return "\n".join(_bounded(parts, {block.anchor: list(_parts(block)) for block in found}))


def _bounded(parts: list[str], of_blocks: Mapping[str, list[str]]) -> list[str]:
    """Take parts as long as there is room for them and for the sentence that says what was left out."""
    left = MOST_SUMMARY_BYTES - 1000 - sum(len(part.encode()) + 1 for part in parts)
    for done, block in enumerate(of_blocks.values()):
        for part in block:
            left -= len(part.encode()) + 1
            if left < 0:
                rest = len(of_blocks) - done
                said = (
                    f"**Truncated here:** a job summary (1 MiB) does not hold all of {plural(rest, 'block')} of model and machine."
                )
                return [*parts, f"{said} `fitmatrix report DIR` shows everything on a page.\n"]
            parts.append(part)
    return parts


def _contents(found: Sequence[Block]) -> Iterator[str]:
    yield "### fitmatrix: what fits where"
    yield ""
    for block in found:
        yield f"- {_name(block)}: {escaped(next(sentences(block.matrices[0])), _REASON)}"


def _name(block: Block) -> str:
    synthetic = ", synthetic weights" if block.synthetic else ""
    return f"{code(block.model, _NAME)} on {escaped(block.machine.name, _NAME)}{synthetic}"


def _parts(block: Block) -> Iterator[str]:
    """Yield the pieces of a block, each of which stands by itself."""
    yield f"### {_name(block)}\n"
    for matrix in block.matrices:
        yield "\n".join([*_answer(block, matrix), ""])
        yield "\n".join([f"{escaped(matrix.caption)}:", "", *_matrix(matrix), ""])
        for lines in (_unmeasured(matrix), _failed(matrix), _code(matrix)):
            if lines:
                yield "\n".join([*lines, ""])
    newest = max(cell.result.at for matrix in block.matrices for cell in every(matrix))
    facts = ", ".join(f"{name} {value}" for name, value in block.facts)
    yield f"<sub>Newest result {escaped(newest)}. {escaped(facts, _FACTS)}".rstrip() + "</sub>\n"


def _answer(block: Block, matrix: Matrix) -> Iterator[str]:
    first, *more = sentences(matrix)
    yield f"**{escaped(first, _REASON)}**"
    yield from (escaped(sentence, _REASON) for sentence in more)
    by_limits = [answer for answer in answers(block) if answer.matrix is matrix]
    if len(by_limits) > 1:
        yield ""
        yield from (f"- {escaped(answer.limits) or 'no limit'}: {escaped(answer.sentence, _REASON)}" for answer in by_limits)
    if block.synthetic:
        yield "With synthetic weights, memory and speed are real, but the answers are meaningless."


def _matrix(matrix: Matrix) -> list[str]:
    if not matrix.rows:
        return ["None of these placements is available on this machine."]
    columns = ["precision", *(code(_column(cells), _NAME) for cells in zip(*(cells for _, cells in matrix.rows), strict=True))]
    rows = [[code(heading.name, _NAME), *map(_cell, cells)] for heading, cells in matrix.rows]
    return table(columns, rows)


def _column(cells: Iterable[Cell | None]) -> str:
    """Name a column as the ids of its cases do: the placement with its limits."""
    return next(cell.result.case.place for cell in cells if cell)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    icon = _ICONS.get(cell.status.look, "")
    word = f"**{cell.status.word}** ⭐" if cell.best else cell.status.word
    return "<br>".join(filter(None, [f"{icon} {word}".strip(), *map(escaped, _figures(cell))]))


def _figures(cell: Cell) -> Iterator[str]:
    if cell.memory and cell.memory.predicted and cell.memory.capacity:
        yield f"needs {cell.memory.need.text}, {cell.memory.capacity.text} {cell.memory.kind} free"
    elif cell.memory:
        yield held(cell)
    if not cell.status.measured:
        return
    yield speed(cell) if cell.speed.value else ""
    yield f"answers {cell.quality}" if cell.quality == "degraded" else ""
    yield f"{plural(len(cell.faults), 'check')} failed" if cell.faults else ""


def _unmeasured(matrix: Matrix) -> list[str]:
    """Fold what was not run into one line, with its reasons behind it."""
    cells = [cell for cell in every(matrix) if not cell.ran]
    words = Counter(cell.status.word for cell in matrix.cells if not cell.ran)
    ends = [*(escaped(fold.text) for fold in matrix.folds), *(f"{count:,} × {word}" for word, count in words.items())]
    summary = f"{len(cells):,} of {plural(len(every(matrix)), 'case')} not measured: {'; '.join(ends)}"
    return folded(summary, _reasons(cells)) if cells else []


def _failed(matrix: Matrix) -> list[str]:
    """Fold what ran and did not work, or not as it should."""
    cells = [cell for cell in every(matrix) if cell.ran and cell.status.look != "works"]
    return folded(f"{plural(len(cells), 'case')} ran but did not work, or failed a check", _reasons(cells)) if cells else []


def _reasons(cells: Iterable[Cell]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for cell in cells:
        said = "; ".join(filter(None, (cell.result.why, *cell.faults, _broken(cell)))) or cell.status.word
        by_reason.setdefault(said, []).append(cell.result.case.way)
    lines = [f"- {', '.join(code(name, _NAME) for name in names)}: {escaped(said, _REASON)}" for said, names in by_reason.items()]
    more = len(lines) - _MOST_REASONS
    return [*lines[:_MOST_REASONS], f"- and {plural(more, 'other reason')}"] if more > 0 else lines


def _broken(cell: Cell) -> str:
    return cell.result.quality.why if cell.result.quality and cell.status.look == "broken" else ""


def _code(matrix: Matrix) -> list[str]:
    text = matrix.best.result.code if matrix.best else None
    return folded("The code that was run", program(text.strip("\n"), "python")) if text else []
