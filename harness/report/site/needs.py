"""Which card a model needs: what its weights were seen to take of one, and what that says of cards that were not tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from harness.core import units
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Result
from harness.core.units import GIB
from harness.machine.gpus import find_gpu, reserve
from harness.report.page import view
from harness.report.page.figures import Figure, known
from harness.report.site.rows import Card, Row, best, grouped
from harness.results.needed import predicted_need

# What cards are sold with.
DEFAULTS = tuple(size * GIB for size in (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192))
_POPULAR = (
    "RTX 3050 8GB", "RTX 4060", "RTX 3060 12GB", "RTX 4070", "RTX 4060 Ti 16GB", "RTX 4080", "RTX 3090", "RTX 4090", "RTX 5090",
    "T4", "L4", "L40S", "A100 80GB", "H100 PCIe 80GB", "H200 SXM",
)  # fmt: skip
# Cards of one size as it is sold differ by so much: those of 80 GB have 79.1 to 80 GiB.
_ALIKE = 0.03


@dataclass(frozen=True)
class Need:
    """What one way of holding a whole model on one card takes of it; `card` is the smallest usual one that has as much.

    `row` is the result it rests on: measured there, or `planned` where none worked. `basis` says how it is known.
    """

    precision: str
    placement: str
    figure: Figure
    card: int | None
    row: Row
    planned: bool
    basis: str

    @property
    def bytes(self) -> float:
        return float(self.figure.value)


@dataclass(frozen=True)
class Rung:
    """A size of card and the best way that it runs a model, measured there (`row`) or predicted from another card (`need`)."""

    size: int
    label: str
    row: Row | None = None
    need: Need | None = None
    tried: int = 0


def needs_of(rows: Iterable[Row]) -> tuple[Need, ...]:
    """Find what each precision takes of one card that holds all of it: the most that any worked with, else the newest plan's."""
    whole = [row for row in rows if row.card and row.card.count == 1 and _is_whole(row.result)]
    found = grouped(whole, lambda row: row.result.case.precision)
    return tuple(
        need for name in view.ordered(set(found), PRECISIONS) if (need := _measured_need(found[name]) or _planned_need(found[name]))
    )


def _is_whole(result: Result) -> bool:
    """Tell whether all weights were to lie on the GPU, so that its peak is what they take and not what there was."""
    placement = PLACEMENTS.get(result.case.placement)
    return placement is not None and placement.devices == ("gpu",) and not placement.parallel


def _measured_need(rows: Iterable[Row]) -> Need | None:
    taken = [(row, row.measured.need) for row in rows if row.works and row.measured and row.measured.kind == "VRAM"]
    if not taken:
        return None
    row, need = max(taken, key=lambda pair: pair[1].number)
    return _need(row, need.number, planned=False, basis=need.derived or need.noisy or "measured")


def _planned_need(rows: Sequence[Row]) -> Need | None:
    for row in reversed(rows):
        tiers = row.result.estimate.tiers if row.result.estimate else {}
        sizes = [predicted_need(tier).best for name, tier in tiers.items() if name not in ("cpu", "disk")]
        if most := max(sizes, default=0):
            return _need(row, most, planned=True, basis="predicted by the plan")
    return None


def _need(row: Row, size: float, *, planned: bool, basis: str) -> Need:
    case, figure = row.result.case, known("", "VRAM", int(size), units.format_size(size))
    holds = next((usual for usual in DEFAULTS if usual - reserve(usual) >= size), None)
    return Need(case.precision, case.placement, figure, holds, row, planned, basis)


def ways_of(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the ways that work and are worth choosing: none needs less of the same memory, is as fast and answers as well."""
    found = [row for row in rows if row.works and row.measured and row.speed.value]
    kept: set[int] = set()
    for same in grouped(found, lambda row: row.measured.kind if row.measured else "").values():
        kept |= _worth_choosing(same)
    return tuple(row for row in found if id(row) in kept)


def _worth_choosing(rows: Iterable[Row]) -> set[int]:
    """Find rows than which none is better, in one walk from the least memory: what is better than a row stands before it."""
    kept: set[int] = set()
    fastest = fastest_sound = -math.inf
    for (_, slowness, unsound), alike in groupby(sorted(rows, key=_weighed), key=_weighed):
        if max(fastest_sound, fastest if unsound else -math.inf) < -slowness:
            kept |= {id(row) for row in alike}
        fastest = max(fastest, -slowness)
        fastest_sound = fastest_sound if unsound else max(fastest_sound, -slowness)
    return kept


def _weighed(row: Row) -> tuple[float, float, bool]:
    """Return what is weighed of a way, less being better: its memory, its speed, and whether its answers are not sound."""
    return row.measured.need.number if row.measured else 0.0, -row.speed.number, not row.answers_well


def known_cards() -> tuple[tuple[str, int], ...]:
    """Return cards that people have, with their memory in bytes, smallest first."""
    cards = [(card.name, card.total_bytes or card.vram_bytes) for card in map(find_gpu, _POPULAR)]
    return tuple(sorted(cards, key=lambda pair: pair[1]))


def rungs_of(rows: Iterable[Row], needs: Sequence[Need]) -> Iterable[Rung]:
    """List sizes of cards, smallest first: those that something was measured on, and the usual ones that a way would first fit."""
    on_cards = [row for row in rows if row.card and row.card.count == 1 and row.card.size]
    measured = grouped(on_cards, lambda row: round((row.card.size if row.card else 0) / GIB, 1))
    sizes = {size: int(size * GIB) for size in measured}
    usual = {need.card for need in needs if need.card and not any(abs(need.card / GIB - size) < _ALIKE * size for size in measured)}
    sizes |= {size / GIB: size for size in usual}
    for size in sorted(sizes):
        if size in measured:
            found = measured[size]
            yield Rung(sizes[size], f"{size:g} GiB", row=best(found) or found[-1], tried=len(found))
        else:
            fitting = [need for need in needs if need.card and need.card <= sizes[size]]
            yield Rung(sizes[size], f"{size:g} GiB", need=max(fitting, key=lambda need: need.bytes))


def fitting(needs: Iterable[Need], card: Card) -> Need | None:
    """Find the way that takes most of a card and still fits: the least compromise, if nothing was measured on it."""
    room = card.size if card.emulated else card.size - reserve(card.size)
    return max((need for need in needs if need.bytes <= room), key=lambda need: need.bytes, default=None)
