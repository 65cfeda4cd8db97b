"""Results of many machines as a static site: pages by model, by card and by machine, their data as JSON, and every raw result.

::

    planner.html    plans any model of the catalog in the browser, beside what was measured; with a runtime for it alone
    planner/        the scripts that it loads
    index.html      models, cards, machines; a field to filter them
    models/         which card a model needs, what runs it where, what changed over library versions
    cards/          what runs on a card, or on the part of one that --vram allowed
    machines/       the page of `fitmatrix report` for one machine
    raw/            of each machine a file of its results, one a line, to which every figure leads
    provenance.html the files that all of it comes from, and what was refused

Beside each page lies its data, with the ending .json: one object with `schema`, whose links (`page`, `raw`, `data`) are relative
to itself, as those of the page are, and `line` is that of `raw`. So a site works from any folder, path and server, and from disk.

A long list goes on on pages with a tilde in their names. What has not changed since the last build is taken from the old site,
by links of the file system: the page of a machine follows from its results, that of a model from what its machines say of it
(`site.state`). The new site is whole before it takes the place of the old one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from harness.core.records import Record
from harness.report.planner import bundle
from harness.report.planner.bundle import Runtime
from harness.report.site import pages
from harness.report.site.atlas import MachineLine, ModelLine, OnCard, draw_cards
from harness.report.site.old import Old
from harness.report.site.rows import grouped, raw_file
from harness.report.site.state import SiteState, keyed
from harness.report.tasks import shared
from harness.results.register import Entry, Joined

MARKER = "fitmatrix-site"
# All that stands at the root of a site; what else lies there is its owner's.
NAMES = frozenset(
    {MARKER, ".nojekyll", "raw", "models", "cards", "machines", "files", "refused", bundle.FOLDER}
    | {f"{page}.{form}" for page in ("index", "provenance", "planner") for form in ("html", "json")}
)
# Models whose pages are drawn before other processes have started.
_FEW_MODELS = 3


class _KeptMachine(Record, frozen=True, kw_only=True):
    """What is kept of a machine: its line, its files with their sizes, and a mark of what it says of each model."""

    line: MachineLine
    files: dict[str, int]
    marks: dict[str, str]


class _KeptModel(Record, frozen=True, kw_only=True):
    line: ModelLine
    files: dict[str, int]


@dataclass(frozen=True)
class _Site:
    """A site in the making: its new folder, the one that it takes the place of, and what is known of that."""

    folder: Path
    old: Old
    state: SiteState
    has_planner: bool

    @property
    def kind(self) -> str:
        """What pages follow from beside results."""
        return "with a planner" if self.has_planner else ""


def write_site(joined: Joined, folder: Path, now: datetime, state: SiteState, old: Old, runtime: Runtime | None = None) -> int:
    """Write all pages of a site into a folder that `intake.gather` has begun; return how many there are.

    `runtime` is Python for browsers, by which the site has a planner. The `old` site must be the one that `state` is of.
    """
    (folder / ".nojekyll").touch()  # GitHub's own generator would leave files out
    for name in ("models", "cards", "machines"):  # whose files an old site may have
        (folder / name).mkdir(exist_ok=True)
    site = _Site(folder, old, state, runtime is not None)
    machines = _machines(site, joined.entries)
    models = _models(site, machines)
    lines = sorted((one.line for one in machines.values()), key=lambda one: (one.link.name.casefold(), one.link.page))
    known = [one.line for one in models.values()]
    cards = draw_cards(known, lines)
    files = [one.files for one in machines.values()] + [one.files for one in models.values()] + _cards(site, cards)
    front = pages.front_pages(joined, now, known, cards, lines, has_planner=site.has_planner)
    files += [pages.write_page(folder, one) for one in front]
    if runtime:
        sizes = bundle.write_bundle(runtime, folder / bundle.FOLDER)
        files.append(pages.write_page(folder, pages.planner(known, sizes)))
    mark = keyed([site.kind], sorted(machines), sorted(models), sorted(entry.digest for entry in joined.entries))
    (folder / MARKER).write_text(mark, encoding="utf-8")
    return sum(name.endswith(".html") for found in files for name in found)


def old_site(place: Path, state: SiteState) -> Old:
    """Return the site in a directory if `state` is of it, else none: another one has other files of the same names."""
    try:
        mark = (place / MARKER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return Old()
    return Old(place.resolve() if mark and mark == state.site else None)


def saved(folder: Path, state: SiteState) -> None:
    """Save what is known of a site that has taken its place."""
    state.save((folder / MARKER).read_text(encoding="utf-8"))


def _machines(site: _Site, entries: Sequence[Entry]) -> dict[str, _KeptMachine]:
    """Write the pages of all machines; return what is kept of them by their keys."""
    results = {
        keyed([site.kind], [entry.digest for entry in ours]): (raw_file(machine), [entry.digest for entry in ours])
        for machine, ours in grouped(entries, lambda entry: entry.machine).items()
    }
    known = site.state.kept("machines", list(results), _KeptMachine)
    found = {key: kept for key, kept in known.items() if site.old.take(kept.files, site.folder)}
    fresh = [key for key in results if key not in found]
    work = functools.partial(_machine, folder=site.folder, has_planner=site.has_planner)
    with shared(work, [results[key] for key in fresh]) as made:
        for key, (line, files, shares) in zip(fresh, made, strict=True):
            for model, share in shares.items():
                site.state.keep_share(model, key, share)
            marks = {model: keyed([share.decode()]) for model, share in shares.items()}
            kept = _KeptMachine(line=msgspec.json.decode(line, type=MachineLine), files=files, marks=marks)
            site.state.keep("machines", key, msgspec.json.encode(kept))
            found[key] = kept
    return {key: found[key] for key in results}


def _machine(
    results: tuple[str, Sequence[str]], folder: Path, *, has_planner: bool
) -> tuple[bytes, dict[str, int], dict[str, bytes]]:
    """Write the page of a machine, of which a file, seen from the root of the site, has the results of these digests."""
    file, digests = results
    page, line, shares = pages.of_machine(digests, folder / file, has_planner=has_planner)
    encoded = {model: msgspec.json.encode(share) for model, share in shares.items()}
    return msgspec.json.encode(line), pages.write_page(folder, page), encoded


def _models(site: _Site, machines: Mapping[str, _KeptMachine]) -> dict[str, _KeptModel]:
    """Write the pages of all models; return what is kept of them by their keys, in the order of their names."""
    saying: dict[str, list[str]] = {}
    for key, machine in sorted(machines.items(), key=lambda item: item[1].line.link.page):
        for model in machine.marks:
            saying.setdefault(model, []).append(key)
    names = sorted(saying, key=lambda name: (name.casefold(), name))
    keys = {name: keyed([site.kind, name], [machines[key].marks[name] for key in saying[name]]) for name in names}
    known = site.state.kept("models", list(keys.values()), _KeptModel)
    found = {key: kept for key, kept in known.items() if site.old.take(kept.files, site.folder)}
    fresh = [name for name in names if keys[name] not in found]
    shares = ((all_shares[key] for key in saying[name]) for name in fresh for all_shares in [site.state.shares(name)])
    work = functools.partial(_model, folder=site.folder, has_planner=site.has_planner)
    with shared(work, [list(some) for some in shares], few=_FEW_MODELS) as made:
        for name, kept in zip(fresh, made, strict=True):
            site.state.keep("models", keys[name], kept)
            found[keys[name]] = msgspec.json.decode(kept, type=_KeptModel)
    return {keys[name]: found[keys[name]] for name in names}


def _model(shares: Sequence[bytes], folder: Path, *, has_planner: bool) -> bytes:
    """Write the page of the model that these are all shares of; return what is kept of it."""
    line, found = pages.draw_model(shares, has_planner=has_planner)
    files: dict[str, int] = {}
    for one in found:
        files |= pages.write_page(folder, one)
    return msgspec.json.encode(_KeptModel(line=line, files=files))


def _cards(site: _Site, cards: Sequence[OnCard]) -> list[dict[str, int]]:
    """Write the pages of all cards; return their files."""
    keys = [keyed([site.kind, msgspec.json.encode(on).decode()]) for on in cards]
    known = site.state.kept("cards", keys, dict[str, int])
    found = []
    for key, on in zip(keys, cards, strict=True):
        files = known.get(key)
        if files is None or not site.old.take(files, site.folder):
            files = {}
            for one in pages.of_card(on, has_planner=site.has_planner):
                files |= pages.write_page(site.folder, one)
            site.state.keep("cards", key, msgspec.json.encode(files))
        found.append(files)
    return found
