"""The answers of a block in words, whole and for each size of card: what Markdown, JSON and badges say first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.core.units import exact_size
from harness.report.page.view import Block, Cell, Matrix
from harness.results.selection import best_result


@dataclass(frozen=True)
class PublishedAnswer:
    """What may be used of one model, on one machine, under one pair of limits.

    `best` is None if nothing works; `proposed` is what a search found best beyond the cases that ran, None if that is one of them.
    """

    block: Block
    matrix: Matrix
    cells: tuple[Cell, ...]
    best: Cell | None
    proposed: Cell | None

    @property
    def vram_bytes(self) -> int | None:
        return self.cells[0].result.case.vram_bytes

    @property
    def ram_bytes(self) -> int | None:
        return self.cells[0].result.case.ram_bytes

    @property
    def limits(self) -> str:
        """The limits as the name of a case tells them, `vram8GiB`; empty if there are none."""
        sizes = (("vram", self.vram_bytes), ("ram", self.ram_bytes))
        return ", ".join(f"{kind}{exact_size(size)}" for kind, size in sizes if size is not None)

    @property
    def sentence(self) -> str:
        """Say what to use, or that nothing works."""
        if self.best:
            return _use(self.best)
        return _expect(self.proposed) if self.proposed else _nothing(self.cells)


def answers(block: Block) -> Iterator[PublishedAnswer]:
    """Answer for each workload and each pair of limits, in the order of the columns."""
    for matrix in block.matrices:
        by_limits: dict[tuple[int | None, int | None], list[Cell]] = {}
        for cell in every(matrix):
            by_limits.setdefault((cell.result.case.vram_bytes, cell.result.case.ram_bytes), []).append(cell)
        for cells in by_limits.values():
            found = next((cell for cell in cells if cell.proposed), None)
            yield PublishedAnswer(block, matrix, tuple(cells), best_of(cells), found)


def every(matrix: Matrix) -> tuple[Cell, ...]:
    """Return all cells of a matrix, those of folded placements too."""
    return (*matrix.cells, *(cell for fold in matrix.folds for cell in fold.cells))


def best_of(cells: Sequence[Cell]) -> Cell | None:
    """Return the cell that `recommend` picks."""
    best = best_result(cell.result for cell in cells)
    return next((cell for cell in cells if cell.result is best), None) if best else None


def sentences(matrix: Matrix) -> Iterator[str]:
    """Say the answer of a whole matrix, and what takes less memory or comes nearest to fitting."""
    if matrix.best:
        yield _use(matrix.best)
    if matrix.proposed:
        yield _expect(matrix.proposed)
    if not matrix.best:
        yield matrix.sentence
    if matrix.least:
        yield f"Uses the least memory: {named(matrix.least)}, {held(matrix.least)}, {matrix.least.speed.text}."
    if matrix.nearest and not (matrix.best or matrix.proposed):
        yield f"Closest to fitting: {named(matrix.nearest)}, predicted to need {held(matrix.nearest)}."


def named(cell: Cell) -> str:
    """Name a case as a reader would type it."""
    return f"{cell.result.case.precision} with placement {cell.result.case.place}"


def held(cell: Cell) -> str:
    """Say the memory that decides: "8.20 GiB of 11.0 GiB VRAM"; empty if none is known."""
    if not cell.memory:
        return ""
    capacity = f" of {cell.memory.capacity.text}" if cell.memory.capacity else ""
    return f"{cell.memory.need.text}{capacity} {cell.memory.kind}"


def speed(cell: Cell) -> str:
    """Say tokens/s, and whether others disturbed the measurement."""
    return f"{cell.speed.text} (noisy)" if cell.speed.noisy else cell.speed.text


def _use(best: Cell) -> str:
    figures = [
        held(best),
        f"{best.ready.name} in {best.ready.text}" if best.ready.value else "",
        speed(best) if best.speed.value else "",
    ]
    said = ", ".join(figure for figure in (*figures, f"answers {best.quality or 'not checked'}") if figure)
    return f"Use {named(best)}: {said}."


def _expect(cell: Cell) -> str:
    """Name what a search found best, with what it is predicted to take."""
    assert cell.proposed is not None
    memory = f"{held(cell)}, " if cell.memory else ""
    return f"Predicted to be best, not measured yet: {named(cell)}, {memory}{cell.proposed.text}."


def _nothing(cells: Sequence[Cell]) -> str:
    broken = any(cell.status.look == "broken" for cell in cells)
    words = Counter(cell.status.word for cell in cells)
    ends = ", ".join(f"{count:,} × {word}" for word, count in words.items())
    return f"{'Nothing gives sound answers' if broken else 'Nothing works'}: {ends}."
