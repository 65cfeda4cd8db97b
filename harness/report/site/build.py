"""Results of many machines as a static site: pages by model, by card and by machine, their data as JSON, and every raw result.

::

    planner.html    plans any model of the catalog in the browser, beside what was measured; with a runtime for it alone
    planner/        the scripts that it loads
    index.html      models, cards, machines; a field to filter them
    models/         which card a model needs, what runs it where, what changed over library versions
    cards/          what runs on a card, or on the part of one that --vram allowed
    machines/       the page of `fitmatrix report` for one machine
    raw/            each result as a file of its own, which every figure leads to
    provenance.html the files that all of it comes from, and what was refused

Beside each page lies its data, with the ending .json: one object with `schema`, whose links (`page`, `raw`) are relative
to itself, as those of the page are. So a site works from any folder, path and server, and from disk.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from markupsafe import Markup

from harness.core.errors import StoreError
from harness.core.records import Result, encode_record, to_builtins
from harness.core.redact import cleaner
from harness.core.text import plural
from harness.report.page import render
from harness.report.planner import bundle, page
from harness.report.planner.bundle import Runtime
from harness.report.site import atlas
from harness.report.site.atlas import Atlas
from harness.report.site.needs import known_cards
from harness.report.site.rows import gib
from harness.report.site.sitedata import Data, of_sources
from harness.report.site.trends import spark
from harness.results import audit, collect
from harness.results.audit import Joined, PublishedResult, Refusal
from harness.results.collect import Artifact

SITE_SCHEMA = 1
MARKER = "fitmatrix-site"
# All that stands at the root of a site; what else lies there is its owner's.
NAMES = frozenset(
    {MARKER, ".nojekyll", "raw", "models", "cards", "machines", bundle.FOLDER}
    | {f"{page}.{form}" for page in ("index", "provenance", "planner") for form in ("html", "json")}
)
_STYLES = ("site.css",)
_PLANNER = "planner.html.j2"
# Fewer pieces of work than these are done before other processes have started.
_WORTH_SHARING = 32
# Points of a line in a chart: raw results have all of them.
_MOST_POINTS = 120
# Refused lines of a file that are told one by one.
_MOST_TOLD = 20
# Trends that a page shows; its JSON has all.
_MOST_TRENDS = 40

T = TypeVar("T")
R = TypeVar("R")


def gather(found: Sequence[Artifact], folder: Path, now: datetime) -> Joined:
    """Read files of results, check each result, keep what holds in `folder`/raw and join it.

    What one process holds is a result at a time, and of those that hold what the pages of many results show.
    """
    (folder / "raw").mkdir()
    entries: list[PublishedResult] = []
    refusals: list[Refusal] = []
    with _shared(functools.partial(_take, folder=folder / "raw", now=now), list(enumerate(found))) as taken:
        for lines, refused in taken:
            entries += (msgspec.json.decode(line, type=PublishedResult) for line in lines)
            refusals += refused
    joined = audit.join([artifact.name for artifact in found], entries, refusals)
    kept = {f"{entry.digest}.json" for entry in joined.entries}
    for file in (folder / "raw").iterdir():
        if file.name not in kept:
            file.unlink()
    return joined


def _take(numbered: tuple[int, Artifact], folder: Path, now: datetime) -> tuple[list[bytes], list[Refusal]]:
    """Write each sound result of a file into `folder`; return what is to know of each, encoded, and what was refused."""
    number, artifact = numbered
    entries: list[bytes] = []
    refused: list[Refusal] = []
    clean = cleaner()
    untold = 0
    try:
        for line, read in collect.read(artifact):
            result = audit.examine(read, now) if isinstance(read, Result) else read
            if isinstance(result, Result):
                known = PublishedResult(result=result, digest="", source=number, line=line, cleaned=result is not read)
                entries.append(_keep(known, folder))
            elif len(refused) < _MOST_TOLD:
                refused.append(Refusal(source=number, line=line, why=clean(result)))
            else:
                untold += 1
    except StoreError as error:
        why = str(error).removeprefix(f"{artifact.where}: ")
        refused.append(Refusal(source=number, line=None, why=clean(why)))
    if untold:
        refused.append(Refusal(source=number, line=None, why=f"refused as well: {plural(untold, 'more line')}", lines=untold))
    return entries, refused


def _keep(known: PublishedResult, folder: Path) -> bytes:
    """Write a sound result into `folder`; return what is to be known of it, encoded."""
    data = encode_record(known.result)
    digest = audit.digest(data)
    (folder / f"{digest}.json").write_bytes(data + b"\n")
    return encode_record(msgspec.structs.replace(known, result=audit.light(known.result), digest=digest))


def write_site(joined: Joined, folder: Path, now: datetime, runtime: Runtime | None = None) -> int:
    """Write all pages of a site into a folder that `gather` has begun; return how many there are.

    `runtime` is Python for browsers, by which the site has a planner.
    """
    drawn = atlas.draw(joined.entries)
    (folder / ".nojekyll").touch()  # GitHub's own generator would leave files out
    sizes = bundle.write_bundle(runtime, folder / bundle.FOLDER) if runtime else None
    pages = list(_pages(drawn, joined, now, has_planner=runtime is not None))
    if sizes is not None:
        pages.append(_planner_page(drawn, sizes))
    for name in ("models", "cards", "machines"):
        (folder / name).mkdir(exist_ok=True)
    digests = [[row.entry.digest for row in drawn.history[tally.link.page]] for tally in drawn.machines]
    with _shared(functools.partial(_machine_page, folder=folder, has_planner=runtime is not None), digests) as machines:
        for one in pages:
            _write(folder, one.link, one.html(), one.data)
        return len(pages) + sum(1 for _ in machines)


@dataclass(frozen=True)
class _Page:
    """A page to be written: where, from which template and what it says, to people and to programs."""

    link: str
    template: str
    says: Mapping[str, Any]
    data: Mapping[str, Any]

    def html(self) -> str:
        says = {"up": _up(self.link), "data": _data_beside(self.link), "gib": gib, **self.says}
        if self.template == _PLANNER:
            return render.template(_PLANNER, *page.STYLES, scripts=page.SCRIPTS, runs_python=True).render(says)
        return render.template(self.template, *_STYLES, scripts=("language.js", "site.js")).render(says)


def _planner_page(drawn: Atlas, sizes: Mapping[str, int]) -> _Page:
    rows = [row for model in drawn.models for row in model.rows]
    return _Page("planner.html", _PLANNER, page.page_says(rows, sizes), page.page_data(rows))


def _pages(drawn: Atlas, joined: Joined, now: datetime, *, has_planner: bool = False) -> Iterator[_Page]:
    also = {"planner": has_planner}
    newest = max(entry.result.at for entry in joined.entries)[:10]
    facts = {"results": len(joined.entries), "newest": newest, "refused": joined.refused, "sources": len(joined.sources)}
    data = Data(up="")
    index = {
        **facts,
        "models": [data.model_line(model) for model in drawn.models],
        "cards": [data.card_line(on) for on in drawn.cards],
        "machines": [data.machine_line(tally) for tally in drawn.machines],
    }
    yield _Page("index.html", "site_index.html.j2", {"atlas": drawn, "facts": facts, "known_cards": known_cards(), **also}, index)
    for model in drawn.models:
        says = {"model": model, "trends": [(trend, spark(trend)) for trend in model.trends[:_MOST_TRENDS]], **also}
        yield _Page(model.link.page, "site_model.html.j2", says, Data(_up(model.link.page)).model(model))
    for on in drawn.cards:
        yield _Page(on.link.page, "site_card.html.j2", {"on": on, "card": on.card, **also}, Data(_up(on.link.page)).card(on))
    says = {"joined": joined, "checked": audit.CHECKED, "facts": facts, "built": f"{now:%Y-%m-%d %H:%M} UTC", **also}
    sources = {"built": f"{now:%Y-%m-%dT%H:%M:%SZ}", **of_sources(joined)}
    yield _Page("provenance.html", "site_provenance.html.j2", says, sources)


def _up(link: str) -> str:
    """Return the way from a page to the root of its site."""
    return "../" * link.count("/")


def _data_beside(link: str) -> str:
    return Path(link).with_suffix(".json").name


def _machine_page(digests: Sequence[str], folder: Path, *, has_planner: bool) -> None:
    """Write the page of the machine that these are all results of, oldest first; all it needs are their files."""
    read = ((folder / "raw" / f"{digest}.json").read_bytes() for digest in digests)
    results = [msgspec.json.decode(data, type=Result) for data in read]
    entries = [
        PublishedResult(result=result, digest=digest, source=0, line=0) for digest, result in zip(digests, results, strict=True)
    ]
    tally, rows = atlas.of_machine(entries)
    link = tally.link.page
    parts: Any = render.template("site_machine.html.j2", *_STYLES).module
    above, below = Markup(parts.above(tally, has_planner)), Markup(parts.below(tally, _data_beside(link)))
    frame = render.Frame(above, below, _STYLES, _MOST_POINTS)
    html = render.render(results, title=tally.link.name, frame=frame)
    data = Data(_up(link))
    _write(folder, link, html, {"machine": to_builtins(results[-1].machine), "results": [data.result(row) for row in rows]})


def _write(folder: Path, link: str, html: str, data: Mapping[str, Any]) -> None:
    path = folder / link
    path.write_text(html, encoding="utf-8")
    path.with_suffix(".json").write_bytes(msgspec.json.encode({"schema": SITE_SCHEMA, **data}) + b"\n")


@contextmanager
def _shared(work: Callable[[T], R], pieces: Sequence[T]) -> Iterator[Iterator[R]]:
    """Do pieces of work, many of them in as many processes as there are cores; give what comes of each, in their order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(pieces) < _WORTH_SHARING or cores < 2:
        yield map(work, pieces)
        return
    pool = ProcessPoolExecutor(cores, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map(work, pieces, chunksize=max(len(pieces) // (cores * 8), 1))
    finally:
        pool.shutdown(cancel_futures=True)
