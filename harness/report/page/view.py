"""What the page says, decided before it is laid out: blocks, matrices, cells, the recommendation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec

from harness.catalog.resolve import history
from harness.core import units
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import USUAL_KV, Case, Machine, Result, Tier, Workload
from harness.core.text import plural
from harness.report.page.figures import (
    PLANNED,
    STATUSES,
    Figure,
    MemoryFigure,
    Status,
    known,
    memory,
    metric,
    planned_speed,
    status,
    surprise,
)
from harness.results.selection import best_result, faults, is_proposed, is_sound, newest, proposed, ran


class Cell(msgspec.Struct, frozen=True, gc=False):
    """One case in the matrix. `anchor` leads to its details; `proposed` is the planned speed of what a search found best."""

    result: Result
    anchor: str
    status: Status
    memory: MemoryFigure | None
    ready: Figure
    speed: Figure
    quality: str
    planned: str
    surprise: str
    faults: tuple[str, ...]
    ran: bool
    proposed: Figure | None = None
    best: bool = False


class Heading(msgspec.Struct, frozen=True, gc=False):
    """The head of a row or a column: the name to type and what it means, and of a column its limits."""

    name: str
    title: str
    limits: str = ""


@dataclass(frozen=True)
class Fold:
    """Placements that nothing here can use, in one line."""

    text: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Matrix:
    """Precision by placement for one workload; a cell is None if there is no result.

    `groups` are the placements, each with the number of its columns: more than one if it ran under several limits. `proposed` is
    what a search found best and did not run.
    """

    caption: str
    columns: tuple[Heading, ...]
    groups: tuple[tuple[Heading, int], ...]
    rows: tuple[tuple[Heading, tuple[Cell | None, ...]], ...]
    folds: tuple[Fold, ...]
    counts: tuple[tuple[Status, int], ...]
    best: Cell | None
    best_title: str
    least: Cell | None
    nearest: Cell | None
    proposed: Cell | None
    too_big: int
    sentence: str

    @property
    def limited(self) -> bool:
        """Whether a column has limits."""
        return any(column.limits for column in self.columns)

    @property
    def drops_pages(self) -> bool:
        """Whether a bar shows pages of files beside what is needed."""
        memories = [cell.memory for cell in self.cells if cell.memory]
        return any(one.resident is not None and one.resident.number > one.need.number for one in memories)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells that are shown, row by row."""
        return tuple(cell for _, row in self.rows for cell in row if cell)


@dataclass(frozen=True)
class PageTier:
    """A tier of a machine as the page shows it."""

    name: str
    model: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Block:
    """One model on one machine, with its own weights or synthetic ones; the first matrix is of the workload with the most cases.

    `history` is what became of the model since 2023, empty for most. `doubts` says what is worth a look, in a few words each: what
    failed, was noisy or surprised; a page of many blocks folds those without any.
    """

    anchor: str
    model: str
    machine: Machine
    matrices: tuple[Matrix, ...]
    tier_heads: tuple[str, ...]
    tiers: tuple[PageTier, ...]
    facts: tuple[tuple[str, str], ...]
    synthetic: bool
    history: str
    doubts: tuple[str, ...]


def blocks(results: Sequence[Result]) -> list[Block]:
    """Arrange results as one block per machine, model and kind of weights, in the order of their first appearance in the file."""
    by_place: dict[tuple[str, str, str], list[Result]] = {_place_of(result): [] for result in results}
    for result in newest(results):
        by_place[_place_of(result)].append(result)
    anchors = Anchors()
    return [_block(found, anchors) for found in by_place.values()]


def _place_of(result: Result) -> tuple[str, str, str]:
    return result.machine.name, result.case.model, result.weights


class Choices(msgspec.Struct, frozen=True, gc=False):
    """What the cases of a page can be filtered by, in the order of the tables; `outcomes` are all that occur."""

    models: tuple[str, ...]
    precisions: tuple[str, ...]
    placements: tuple[str, ...]
    outcomes: tuple[Status, ...]


def choices(found: Sequence[Block]) -> Choices:
    """List what occurs in blocks."""
    matrices = [matrix for block in found for matrix in block.matrices]
    cells = [cell for matrix in matrices for cell in (*matrix.cells, *(c for fold in matrix.folds for c in fold.cells))]
    looks = {cell.status.look for cell in cells}
    return Choices(
        models=tuple(dict.fromkeys(block.model for block in found)),
        precisions=tuple(ordered({cell.result.case.precision for cell in cells}, PRECISIONS)),
        placements=tuple(ordered({cell.result.case.placement for cell in cells}, PLACEMENTS)),
        outcomes=tuple(entry for entry in STATUSES if entry.look in looks),
    )


class Anchors:
    """Hands out fragment names: plain letters only, and never the same twice."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def give(self, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)[:120]
        self._given[plain] = count = self._given.get(plain, 0) + 1
        return plain if count == 1 else f"{plain}~{count}"


def _block(results: Sequence[Result], anchors: Anchors) -> Block:
    last = results[-1]
    anchor = anchors.give(f"block-{last.case.model}-{last.machine.name}")
    cells = [_cell(result, anchors.give(f"case-{result.case.id}")) for result in results]
    by_workload: dict[Workload, list[Cell]] = {}
    for cell in cells:
        by_workload.setdefault(cell.result.case.workload.asked, []).append(cell)
    largest_first = sorted(by_workload.items(), key=lambda item: -len(item[1]))
    matrices = tuple(_matrix(found) for _, found in largest_first)
    heads, tiers = _page_tiers(last.machine.tiers)
    return Block(
        anchor=anchor,
        model=last.case.model,
        machine=last.machine,
        matrices=matrices,
        tier_heads=heads,
        tiers=tiers,
        facts=(*_facts(last.machine), *_versions(results)),
        synthetic=last.weights == "synthetic",
        history=history(last.case.model),
        doubts=tuple(_doubts(cells)),
    )


def _doubts(cells: Sequence[Cell]) -> Iterator[str]:
    """Say what of these cases is not as the plan said, or cannot be relied on."""
    works = [cell for cell in cells if cell.status.look == "works"]
    failed = _counts([cell for cell in cells if cell.ran and cell not in works])
    yield from (f"{count:,} × {entry.word}" for entry, count in failed)
    if not works and not failed:
        yield "nothing works"
    kinds = [cell.surprise for cell in cells if cell.surprise]
    yield from (plural(kinds.count(kind), kind) for kind in dict.fromkeys(kinds))
    if degraded := sum(cell.quality == "degraded" for cell in works):
        yield f"{degraded:,} × answers degraded"
    shown = [figure for cell in cells for figure in (cell.ready, cell.speed, cell.memory and cell.memory.need)]
    if noisy := sum(bool(figure and figure.noisy) for figure in shown):
        yield plural(noisy, "noisy figure")


def _cell(result: Result, anchor: str) -> Cell:
    return Cell(
        result=result,
        anchor=anchor,
        status=status(result),
        memory=memory(result),
        ready=metric(result, "ready_s"),
        speed=metric(result, "decode_tok_s"),
        quality=_quality(result).replace("_", " "),
        planned=PLANNED[result.verdict],
        surprise=surprise(result),
        faults=tuple(faults(result)),
        ran=ran(result),
    )


def _quality(result: Result) -> str:
    return result.quality.verdict if result.quality else ""


def _matrix(cells: Sequence[Cell]) -> Matrix:
    best, found = best_result(cell.result for cell in cells), proposed(cell.result for cell in cells)
    places = [cell.result.case.place for cell in cells]
    cases = {place: cell.result.case for place, cell in zip(places, cells, strict=True)}
    placed = {(cell.result.case.precision, place): _marked(cell, best, found) for place, cell in zip(places, cells, strict=True)}
    columns = _columns(cases)
    folded = [name for name in columns if _all_unavailable(cell for (_, at), cell in placed.items() if at == name)]
    shown = [name for name in columns if name not in folded]
    heads = [Heading(columns[name], _placement_title(columns[name]), _limits(cases[name])) for name in shown]
    used = [row for row in ordered({row for row, _ in placed}, PRECISIONS) if any((row, name) in placed for name in shown)]
    marked = list(placed.values())
    chosen = next((cell for cell in marked if cell.best), None)
    return Matrix(
        caption=_caption([cell.result.case.workload for cell in cells]),
        columns=tuple(heads),
        groups=tuple((next(same), 1 + sum(1 for _ in same)) for _, same in groupby(heads, key=lambda head: head.name)),
        rows=tuple((_row_heading(row), tuple(placed.get((row, name)) for name in shown)) for row in used),
        folds=tuple(_folds({name: columns[name] for name in folded}, placed)),
        counts=_counts(marked),
        best=chosen,
        best_title=_placement_title(chosen.result.case.placement) if chosen else "",
        least=_least(marked, chosen),
        nearest=_nearest(marked),
        proposed=max(marked, key=_proposed_speed) if found else None,
        too_big=sum(cell.status.look in ("too-big", "oom") for cell in marked),
        sentence=_sentence([cell for cell in marked if not is_proposed(cell.result)]),
    )


def _marked(cell: Cell, best: Result | None, found: Sequence[Result]) -> Cell:
    speed = planned_speed(cell.result) if any(cell.result is one for one in found) else None
    return msgspec.structs.replace(cell, best=cell.result is best, proposed=speed)


def _proposed_speed(cell: Cell) -> float:
    return cell.proposed.number if cell.proposed else 0.0


def _columns(cases: Mapping[str, Case]) -> dict[str, str]:
    """Return the columns, each a placement under its limits, and their placements: in the table's order, smaller limits first."""
    by_size = sorted(cases, key=lambda place: (cases[place].vram_bytes or math.inf, cases[place].ram_bytes or math.inf))
    order = ordered({case.placement for case in cases.values()}, PLACEMENTS)
    return {place: placement for placement in order for place in by_size if cases[place].placement == placement}


def _limits(case: Case) -> str:
    asked = [f"KV {case.kv}"] * (case.kv != USUAL_KV) + ([case.attention] if case.attention else [])
    sizes = ((case.vram_bytes, "VRAM"), (case.ram_bytes, "RAM"))
    return ", ".join([*asked, *(f"{_spaced(units.exact_size(size))} {kind}" for size, kind in sizes if size is not None)])


def _spaced(size: str) -> str:
    """Write "8GiB" as "8 GiB"."""
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", size)


def ordered(names: set[str], table: Mapping[str, object]) -> list[str]:
    """Put names in the order of their table, unknown ones last."""
    return [name for name in table if name in names] + sorted(names - table.keys())


def _placement_title(name: str) -> str:
    return PLACEMENTS[name].title if name in PLACEMENTS else ""


def _row_heading(name: str) -> Heading:
    return Heading(name, PRECISIONS[name].title if name in PRECISIONS else "")


def _caption(workloads: Sequence[Workload]) -> str:
    one, rounds = workloads[0], sorted({workload.repeats for workload in workloads})
    asked = f"{plural(one.prompt_tokens, 'token')} in, {one.new_tokens:,} out, batch {one.batch}"
    return (
        f"{asked}, {plural(rounds[0], 'warm round')}" if len(rounds) == 1 else f"{asked}, {rounds[0]} to {rounds[-1]} warm rounds"
    )


def _all_unavailable(cells: Iterable[Cell]) -> bool:
    """Tell whether nothing of a column can be had here; what could not work anywhere does not keep it open."""
    looks = {cell.status.look for cell in cells}
    return "unavailable" in looks and looks <= {"unavailable", "invalid"}


def _folds(names: Mapping[str, str], placed: Mapping[tuple[str, str], Cell]) -> Iterable[Fold]:
    by_reason: dict[str, list[str]] = {}
    for name, placement in names.items():
        no_gpu = placement in PLACEMENTS and PLACEMENTS[placement].needs_gpu
        no_gpu = no_gpu and not any(cell.result.machine.gpus for (_, at), cell in placed.items() if at == name)
        by_reason.setdefault("a GPU" if no_gpu else "", []).append(name)
    for reason, group in by_reason.items():
        verb = ("needs a GPU" if len(group) == 1 else "need a GPU") if reason else "unavailable"
        cells = [placed[row, at] for at in group for row in ordered({r for r, c in placed if c == at}, PRECISIONS)]
        yield Fold(f"{plural(len(group), 'placement')} {verb}: {', '.join(group)}", tuple(cells))


def _counts(cells: Sequence[Cell]) -> tuple[tuple[Status, int], ...]:
    found = [(entry, sum(cell.status == entry for cell in cells)) for entry in STATUSES]
    return tuple((entry, count) for entry, count in found if count)


def _least(cells: Sequence[Cell], best: Cell | None) -> Cell | None:
    """Find the sound case that takes clearly less of the same memory than the best one."""
    if not best or not best.memory:
        return None
    limit, kind = float(best.memory.need.value) * 0.9, best.memory.kind
    sound = [cell for cell in cells if is_sound(cell.result)]
    smaller = [(float(c.memory.need.value), c) for c in sound if c.memory and c.memory.kind == kind]
    return min((pair for pair in smaller if pair[0] < limit), key=lambda pair: pair[0], default=(0.0, None))[1]


def _nearest(cells: Sequence[Cell]) -> Cell | None:
    short = [cell for cell in cells if cell.status.look == "too-big" and cell.memory and cell.memory.capacity]
    return min(short, key=lambda cell: cell.memory.share if cell.memory else 0.0, default=None)


def _sentence(cells: Sequence[Cell]) -> str:
    """Say in words that nothing can be recommended, and how the cases ended."""
    if broken := sum(cell.status.look == "broken" for cell in cells):
        return f"{plural(broken, 'case')} can be loaded here, but the answers are broken."
    if not cells:
        return "No case was measured."
    if len(cells) == 1:
        return f"The only case does not work here: {cells[0].status.word}."
    ends = [f"{count:,} × {entry.word}" for entry, count in _counts(cells)]
    return f"None of the {plural(len(cells), 'case')} works here: {', '.join(ends)}."


def _page_tiers(tiers: Sequence[Tier]) -> tuple[tuple[str, ...], tuple[PageTier, ...]]:
    """Return the heads of the columns of which a tier has a figure, and the tiers with these figures."""
    columns = {
        "total": [_known(tier.total_bytes, units.format_size, "unknown") for tier in tiers],
        "free at start": [_known(tier.free_bytes, units.format_size, "unknown") for tier in tiers],
        "limit": [_known(tier.limit_bytes, units.format_size, "no limit") for tier in tiers],
        "speed": [_known(tier.bytes_per_s, units.format_bandwidth, "unknown") for tier in tiers],
    }
    shown = {head: column for head, column in columns.items() if any(figure.value for figure in column)}
    rows = zip(*shown.values(), strict=True) if shown else ((),) * len(tiers)
    return tuple(shown), tuple(PageTier(tier.name, tier.model or "", row) for tier, row in zip(tiers, rows, strict=True))


def _known(value: float | None, written: Callable[[float], str], why: str) -> Figure:
    return Figure(key="", label="", text=why) if value is None else known("", "", value, written(value))


def _facts(machine: Machine) -> tuple[tuple[str, str], ...]:
    cores = None if machine.cores is None else str(machine.cores)
    facts = {"CPU": machine.cpu, "cores": cores, "system": machine.system, "driver": machine.driver}
    return tuple((name, value) for name, value in facts.items() if value)


def _versions(results: Sequence[Result]) -> tuple[tuple[str, str], ...]:
    """List the environment of a block, newest value first where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for result in reversed(results):
        for name, value in result.environment.items():
            found.setdefault(name, {})[value] = None
    return tuple((name, ", ".join(values)) for name, values in found.items())
