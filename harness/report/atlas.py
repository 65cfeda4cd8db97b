"""What the pages of a site say, decided before they are laid out: models, cards, machines, what needs what, what changed when.

Everything rests on published results (`harness.published`). What is measured names its result; what is concluded from it is called
predicted, and says from what.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness import units
from harness.case import Outcome, Result, Workload
from harness.placement import PLACEMENTS
from harness.precision import PRECISIONS
from harness.profiles import reserve
from harness.published import VERSIONS, Entry, identity
from harness.report import view
from harness.report.figures import Figure, Memory, Status, known, memory, metric, needed, status
from harness.units import GIB

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

# What cards are sold with.
USUAL = tuple(size * GIB for size in (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192))
# Cards of one size as it is sold differ by so much: those of 80 GB have 79.1 to 80 GiB.
_ALIKE = 0.03
_SLUG = 60
# Names that Windows keeps for devices, whatever stands behind a dot.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_HASHED = re.compile(r".*-[0-9a-f]{8}")


def slug(name: str, key: str | None = None) -> str:
    """Return the name of a file for anything called `name`: a few lower-case letters, and a hash unless they are all of the name.

    The same name has the same file in every site, and no two have one on a file system that knows no case. A `key` tells
    things of one name apart.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9.]+|\.{2,}", "-", plain)[:_SLUG].strip("-.")
    if plain and key is None and plain == name and not _DEVICES.fullmatch(plain) and not _HASHED.fullmatch(plain):
        return plain
    told = hashlib.sha256((key if key is not None else name).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}-{told}" if plain and not _DEVICES.fullmatch(plain) else f"x-{plain}-{told}".replace("--", "-")


def gib(size: int) -> str:
    """Write the size of a card as it is sold or was given: "8 GiB", "7.5 GiB"."""
    exact = f"{size / GIB:.6g}"
    return f"{exact} GiB" if float(exact) * GIB == size else units.exact_size(size)


@dataclass(frozen=True)
class Link:
    """Something that has a page: its name and the page, seen from the root of the site."""

    name: str
    page: str
    about: str = ""


@dataclass(frozen=True)
class Card:
    """What memory a case had on which card: all of it, or as much as --vram allowed. `count` of them were there."""

    model: str
    size: int
    emulated: bool = False
    count: int = 1

    @property
    def name(self) -> str:
        if self.emulated:
            return f"{gib(self.size)}, emulated on {self.model}"
        return f"{f'{self.count} × ' if self.count > 1 else ''}{self.model}, {units.format_size(self.size)}"

    @property
    def link(self) -> Link:
        return Link(self.name, f"cards/{slug(self.name)}.html")


@dataclass(frozen=True)
class Row:
    """One result as a line of a table. `raw` is its own file, seen from the root of the site.

    `takes` is what its process took of a card or, without one, of the RAM, `kind` which of them; None where nothing was measured.
    """

    entry: Entry
    model: Link
    machine: Link
    card: Card | None
    status: Status
    memory: Memory | None
    takes: Figure | None
    kind: str
    ready: Figure
    speed: Figure
    quality: str
    raw: str

    @property
    def result(self) -> Result:
        return self.entry.result

    @property
    def works(self) -> bool:
        return self.result.outcome is Outcome.OK

    @property
    def way(self) -> str:
        """The precision and where the weights go, without an emulated card, which is named apart."""
        return f"{self.result.case.precision}, {self.result.case.placement}"


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


@dataclass(frozen=True)
class Tally:
    """Rows that belong together, the best of them, and how many work."""

    link: Link
    rows: tuple[Row, ...]
    best: Row | None
    works: int
    need: Need | None = None

    @property
    def newest(self) -> str:
        return max((row.result.at for row in self.rows), default="")[:10]


@dataclass(frozen=True)
class Version:
    """One environment of a trend: what changed on the way there, and the newest result in it."""

    changed: tuple[str, ...]
    row: Row


@dataclass(frozen=True)
class Trend:
    """One case on one machine over library versions, oldest first. `change` is that of its speed, from first to last."""

    row: Row
    versions: tuple[Version, ...]
    change: float | None

    @property
    def first(self) -> Row | None:
        """The oldest that has a speed."""
        return next((version.row for version in self.versions if version.row.speed.value), None)


@dataclass(frozen=True)
class Model:
    """The page of a model. Its answers are about one workload, that of most results."""

    link: Link
    workload: Workload
    others: int
    synthetic: bool
    rungs: tuple[Rung, ...]
    needs: tuple[Need, ...]
    machines: tuple[Tally, ...]
    trends: tuple[Trend, ...]
    rows: tuple[Row, ...]
    best: Row | None

    @property
    def works(self) -> int:
        return sum(row.works for row in self.rows)

    @property
    def smallest(self) -> Rung | None:
        """The smallest card that the model was seen to work on."""
        return next((rung for rung in self.rungs if rung.row and rung.row.works), None)

    @property
    def without(self) -> Row | None:
        """The best way without a card."""
        return best(row for row in self.rows if row.card is None)

    @property
    def least(self) -> Need | None:
        """The way that takes least of a card."""
        return min(self.needs, key=lambda need: need.bytes, default=None)


@dataclass(frozen=True)
class OnCard:
    """The page of a card: each model that was tried on it or should fit, and the machines that have it."""

    card: Card
    models: tuple[Tally, ...]
    machines: tuple[Link, ...]

    @property
    def link(self) -> Link:
        return self.card.link

    @property
    def tried(self) -> tuple[Tally, ...]:
        return tuple(tally for tally in self.models if tally.rows)

    @property
    def predicted(self) -> tuple[Tally, ...]:
        return tuple(tally for tally in self.models if not tally.rows)

    @property
    def works(self) -> int:
        return sum(tally.works > 0 for tally in self.models)


@dataclass(frozen=True)
class Atlas:
    """Everything that a site shows; `history` are all results of a machine by its page, also those that newer ones replaced."""

    models: tuple[Model, ...]
    cards: tuple[OnCard, ...]
    machines: tuple[Tally, ...]
    history: Mapping[str, tuple[Row, ...]]


def draw(entries: Sequence[Entry]) -> Atlas:
    """Arrange published results, oldest first, by model, by card and by machine."""
    machines = _machine_links(entries)
    rows = [_row(entry, machines) for entry in entries]
    current = _current(rows)
    by_model = _grouped(current, lambda row: row.result.case.model)
    history = _grouped(rows, lambda row: row.result.case.model)
    models = tuple(_model(by_model[name], history[name]) for name in sorted(by_model, key=str.casefold))
    return Atlas(
        models=models,
        cards=tuple(_cards(current, models)),
        machines=tuple(_tally(found[0].machine, found) for found in _by_name(current, lambda row: row.machine)),
        history={page: tuple(found) for page, found in _grouped(rows, lambda row: row.machine.page).items()},
    )


def of_machine(entries: Sequence[Entry]) -> tuple[Tally, list[Row]]:
    """Return the current results of one machine, and all of them."""
    machines = _machine_links(entries)
    rows = [_row(entry, machines) for entry in entries]
    return _tally(rows[0].machine, _current(rows)), rows


def _machine_links(entries: Iterable[Entry]) -> dict[str, Link]:
    found = {identity(entry.result.machine): entry.result.machine for entry in entries}
    return {
        key: Link(
            machine.name,
            f"machines/{slug(machine.name, key)}.html",
            ", ".join(filter(None, [machine.cpu, units.format_count(machine.cores) + " cores" if machine.cores else None])),
        )
        for key, machine in found.items()
    }


def _row(entry: Entry, machines: Mapping[str, Link]) -> Row:
    result, card = entry.result, card_of(entry.result)
    found = memory(result)
    vram = max(
        (metric(result, key) for key in ("vram_peak_bytes", "vram_process_peak_bytes")), key=lambda one: float(one.value or 0)
    )
    measured = found.peak if found and not found.predicted else None
    return Row(
        entry=entry,
        model=Link(result.case.model, f"models/{slug(result.case.model)}.html"),
        machine=machines[identity(result.machine)],
        card=card,
        status=status(result),
        memory=found,
        takes=vram if vram.value else measured,
        kind="VRAM" if vram.value else found.kind if found else "",
        ready=metric(result, "ready_s"),
        speed=metric(result, "decode_tok_s"),
        quality=result.quality.verdict.replace("_", " ") if result.quality else "",
        raw=f"raw/{entry.digest}.json",
    )


def card_of(result: Result) -> Card | None:
    """Return the card that a case had, None where it had none or was not to use it."""
    gpus, placement = result.machine.gpus, PLACEMENTS.get(result.case.placement)
    if not gpus or (placement and "gpu" not in placement.devices):
        return None
    first = gpus[0]
    model = first.model or "a card without a name"
    if result.case.vram_bytes is not None:
        return Card(model, result.case.vram_bytes, emulated=True, count=len(gpus))
    return Card(model, first.total_bytes or 0, count=sum(gpu.model == first.model for gpu in gpus))


def _current(rows: Sequence[Row]) -> list[Row]:
    """Keep the newest result of each case on each machine, as its page does."""
    kept: list[Row] = []
    for found in _grouped(rows, lambda row: row.machine.page).values():
        shown = {id(result) for result in view.newest(row.result for row in found)}
        kept += [row for row in found if id(row.result) in shown]
    return kept


def best(rows: Iterable[Row]) -> Row | None:
    """Pick the row that the page of a machine would recommend."""
    found = {id(row.result): row for row in rows}
    chosen = view.recommend(row.result for row in found.values())
    return found[id(chosen)] if chosen else None


def _grouped(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    found: dict[K, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def _by_name(rows: Iterable[Row], link: Callable[[Row], Link]) -> list[list[Row]]:
    found = _grouped(rows, link)
    return [found[key] for key in sorted(found, key=lambda key: (key.name.casefold(), key.page))]


def _tally(link: Link, rows: Sequence[Row], need: Need | None = None) -> Tally:
    return Tally(link, tuple(rows), best(rows), sum(row.works for row in rows), need)


def _model(rows: Sequence[Row], history: Sequence[Row]) -> Model:
    ours = _of_most(rows)
    needs = _needs(ours)
    return Model(
        link=rows[0].model,
        workload=ours[0].result.case.workload,
        others=len({row.result.case.workload for row in rows}) - 1,
        synthetic=any(row.result.weights == "synthetic" for row in ours),
        rungs=tuple(_rungs(ours, needs)),
        needs=needs,
        machines=tuple(_tally(found[0].machine, _of_most(found)) for found in _by_name(rows, lambda row: row.machine)),
        trends=_trends(history),
        rows=tuple(rows),
        best=best(ours),
    )


def _of_most(rows: Sequence[Row]) -> list[Row]:
    """Keep those of the workload that most have: figures of others do not compare."""
    ((workload, _),) = Counter(row.result.case.workload for row in rows).most_common(1)
    return [row for row in rows if row.result.case.workload == workload]


def _needs(rows: Iterable[Row]) -> tuple[Need, ...]:
    """Find what each precision takes of one card that holds all of it: the most that any worked with, else the newest plan's."""
    whole = [row for row in rows if row.card and row.card.count == 1 and _is_whole(row.result)]
    found = _grouped(whole, lambda row: row.result.case.precision)
    return tuple(
        need for name in view.ordered(set(found), PRECISIONS) if (need := _measured_need(found[name]) or _planned_need(found[name]))
    )


def _is_whole(result: Result) -> bool:
    """Tell whether all weights were to lie on the GPU, so that its peak is what they take and not what there was."""
    placement = PLACEMENTS.get(result.case.placement)
    return placement is not None and placement.devices == ("gpu",) and not placement.parallel


def _measured_need(rows: Iterable[Row]) -> Need | None:
    peaks = [(row, *_peak(row)) for row in rows if row.works and row.kind == "VRAM" and row.takes]
    if not peaks:
        return None
    row, size, basis = max(peaks, key=lambda peak: peak[1])
    return _need(row, size, planned=False, basis=basis)


def _peak(row: Row) -> tuple[float, str]:
    """Return what a process took of the card: as measured, or torch's figure and what the plan allows for the context."""
    size = float(row.takes.value) if row.takes else 0.0
    if "vram_process_peak_bytes" in row.result.metrics:
        return size, "measured"
    tiers = row.result.estimate.tiers if row.result.estimate else {}
    more = max((tier.overhead_bytes for name, tier in tiers.items() if name not in ("cpu", "disk")), default=0)
    return size + more, f"measured by torch, and {units.format_size(more)} for CUDA itself" if more else "measured by torch alone"


def _planned_need(rows: Sequence[Row]) -> Need | None:
    for row in reversed(rows):
        tiers = row.result.estimate.tiers if row.result.estimate else {}
        sizes = [needed(tier) for name, tier in tiers.items() if name not in ("cpu", "disk")]
        if most := max(sizes, default=0):
            return _need(row, most, planned=True, basis="predicted by the plan")
    return None


def _need(row: Row, size: float, *, planned: bool, basis: str) -> Need:
    case, figure = row.result.case, known("", "VRAM", int(size), units.format_size(size))
    holds = next((usual for usual in USUAL if usual - reserve(usual) >= size), None)
    return Need(case.precision, case.placement, figure, holds, row, planned, basis)


def _rungs(rows: Iterable[Row], needs: Sequence[Need]) -> Iterable[Rung]:
    """List sizes of cards, smallest first: those that something was measured on, and the usual ones that a way would first fit."""
    on_cards = [row for row in rows if row.card and row.card.count == 1 and row.card.size]
    measured = _grouped(on_cards, lambda row: round((row.card.size if row.card else 0) / GIB, 1))
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


def _cards(rows: Iterable[Row], models: Sequence[Model]) -> list[OnCard]:
    found = _grouped(((row.card, row) for row in rows if row.card), lambda pair: pair[0].link.page)
    cards = [_on_card(pairs[0][0], [row for _, row in pairs], models) for pairs in found.values()]
    return sorted(cards, key=lambda one: (one.card.size, one.card.name))


def _on_card(card: Card, rows: Sequence[Row], models: Sequence[Model]) -> OnCard:
    of_model = _grouped(rows, lambda row: row.model.page)
    tallies = [_tally(model.link, of_model.get(model.link.page, ()), _fitting(model, card)) for model in models]
    return OnCard(card, tuple(t for t in tallies if t.rows or t.need), tuple(dict.fromkeys(row.machine for row in rows)))


def _fitting(model: Model, card: Card) -> Need | None:
    """Find the way that takes most of a card and still fits: the least compromise, where nothing was measured on it."""
    room = card.size if card.emulated else card.size - reserve(card.size)
    return max((need for need in model.needs if need.bytes <= room), key=lambda need: need.bytes, default=None)


def _trends(rows: Iterable[Row]) -> tuple[Trend, ...]:
    by_case = _grouped(
        (row for row in rows if row.status.look in ("works", "oom", "timeout", "crash")),
        lambda row: (row.machine, row.result.case, row.result.weights),
    )
    found = [trend for group in by_case.values() if (trend := _trend(group))]
    return tuple(sorted(found, key=lambda trend: -abs(trend.change or 0)))


def _trend(rows: Sequence[Row]) -> Trend | None:
    """Follow one case over environments that differ in a package that matters; the newest result in each counts."""
    by_versions = {_versions(row.result): row for row in rows}
    if len(by_versions) < 2:
        return None
    ordered = sorted(by_versions.items(), key=lambda item: item[1].result.at)
    versions, before = [], dict[str, str]()
    for environment, row in ordered:
        after = dict(environment)
        changed = [f"{name} {after.get(name, 'gone')}" for name in {**before, **after} if before.get(name) != after.get(name)]
        versions.append(Version(tuple(changed), row))
        before = after
    speeds = [float(version.row.speed.value) for version in versions if version.row.speed.value]
    change = speeds[-1] / speeds[0] - 1 if len(speeds) > 1 and speeds[0] else None
    return Trend(versions[-1].row, tuple(versions), change)


def _versions(result: Result) -> tuple[tuple[str, str], ...]:
    return tuple((name, result.environment[name]) for name in VERSIONS if name in result.environment)
