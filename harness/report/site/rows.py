"""Results as lines of the tables of a site, with the pages that their model, machine and card have."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from harness.core import units
from harness.core.placements import PLACEMENTS
from harness.core.records import Machine, Result
from harness.core.units import GIB
from harness.report.page.figures import Figure, MemoryFigure, Status, memory, metric, status
from harness.results import selection
from harness.results.audit import identity
from harness.results.register import PublishedResult, machine_key

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_SLUG = 60
# Names that Windows keeps for devices, whatever stands behind a dot.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_HASHED = re.compile(r".*-[0-9a-f]{8}")


@functools.lru_cache(4096)  # each result names its model
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
class RowLink:
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
    def link(self) -> RowLink:
        return RowLink(self.name, f"cards/{slug(self.name)}.html")


@dataclass(frozen=True)
class Row:
    """One result as a line of a table. `raw` is the file that has it on line `entry.line`, seen from the root of the site."""

    entry: PublishedResult
    model: RowLink
    machine: RowLink
    card: Card | None
    status: Status
    memory: MemoryFigure | None
    ready: Figure
    speed: Figure
    quality: str
    raw: str

    @property
    def result(self) -> Result:
        return self.entry.result

    @property
    def mark(self) -> str:
        """The anchor of its line on the page of its machine, which has one for each case that is not replaced by a newer result."""
        return f"raw-{self.entry.digest[:12]}"

    @property
    def page(self) -> str:
        """Where it stands on the page of its machine, seen from the root of the site."""
        return f"{self.machine.page}#{self.mark}"

    @property
    def works(self) -> bool:
        return self.status.look == "works"

    @property
    def answers_well(self) -> bool:
        """Whether nothing was found to be wrong with its answers."""
        return self.quality not in ("broken", "degraded")

    @property
    def measured(self) -> MemoryFigure | None:
        """What it was measured to need; None if nothing was."""
        return self.memory if self.memory and not self.memory.predicted else None

    @property
    def way(self) -> str:
        """The precision and where the weights go, without an emulated card, which is named apart."""
        return f"{self.result.case.precision}, {self.result.case.placement}"


def rows_of(entries: Sequence[PublishedResult]) -> list[Row]:
    """Return a line for each result, in their order."""
    keys = [identity(entry.result.machine) for entry in entries]
    links = {key: _machine_link(entry.result.machine, key) for key, entry in zip(keys, entries, strict=True)}
    files = {key: raw_file(machine_key(key)) for key in links}
    return [_row(entry, links[key], files[key]) for key, entry in zip(keys, entries, strict=True)]


def raw_file(machine: str) -> str:
    """Return the file of all results of a machine, one a line, seen from the root of the site; `machine` is its key."""
    return f"raw/{machine}.jsonl"


def _machine_link(machine: Machine, key: str) -> RowLink:
    about = ", ".join(filter(None, [machine.cpu, units.format_count(machine.cores) + " cores" if machine.cores else None]))
    return RowLink(machine.name, f"machines/{slug(machine.name, key)}.html", about)


def _row(entry: PublishedResult, machine: RowLink, raw: str) -> Row:
    result, card = entry.result, card_of(entry.result)
    return Row(
        entry=entry,
        model=RowLink(result.case.model, f"models/{slug(result.case.model)}.html"),
        machine=machine,
        card=card,
        status=status(result),
        memory=memory(result),
        ready=metric(result, "ready_s"),
        speed=metric(result, "decode_tok_s"),
        quality=result.quality.verdict.replace("_", " ") if result.quality else "",
        raw=raw,
    )


def slim(row: Row) -> Row:
    """Return a row whose result holds what pages of many results say, and no more: a site has a hundred thousand of them."""
    result = row.result
    kept = msgspec.structs.replace(
        result,
        machine=Machine(name=result.machine.name, tiers=()),
        samples={},
        interference=[],
        phases=[],
        timeline=None,
        estimate=None if row.works else result.estimate,  # what it should need counts where it did not work
        loaded=None,
        device_map=None,
        quality=msgspec.structs.replace(result.quality, answers=[], why="") if result.quality else None,
        code=None,
        command=None,
        environment={},
        remote_code=[],
        log_tail="",
        allowed_s={},
        failed=[],
    )
    return replace(row, entry=msgspec.structs.replace(row.entry, result=kept))


def card_of(result: Result) -> Card | None:
    """Return the card that a case had, None if it had none or was not to use it."""
    gpus, placement = result.machine.gpus, PLACEMENTS.get(result.case.placement)
    if not gpus or (placement and "gpu" not in placement.devices):
        return None
    first = gpus[0]
    model = first.model or "a card without a name"
    if result.case.vram_bytes is not None:
        return Card(model, result.case.vram_bytes, emulated=True, count=len(gpus))
    return Card(model, first.total_bytes or 0, count=sum(gpu.model == first.model for gpu in gpus))


def current(rows: Sequence[Row]) -> list[Row]:
    """Keep the newest result of each case on each machine, as its page does."""
    kept: list[Row] = []
    for found in grouped(rows, lambda row: row.machine.page).values():
        shown = {id(result) for result in selection.newest(row.result for row in found)}
        kept += [row for row in found if id(row.result) in shown]
    return kept


def best(rows: Iterable[Row]) -> Row | None:
    """Pick the row that the page of a machine would recommend."""
    found = {id(row.result): row for row in rows}
    chosen = selection.best_result(row.result for row in found.values())
    return found[id(chosen)] if chosen else None


def grouped(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Gather things by a key, in the order of their first appearance."""
    found: dict[K, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found
