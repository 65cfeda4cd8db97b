"""The pages of a site, each with what it says to people and, in the file beside it, to programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from markupsafe import Markup

from harness.core.records import Result, to_builtins
from harness.report.page import render
from harness.report.planner import page as planner_page
from harness.report.site import atlas
from harness.report.site.atlas import MachineLine, ModelLine, ModelPage, ModelShare, OnCard
from harness.report.site.choices import SITE_STYLES
from harness.report.site.needs import known_cards
from harness.report.site.parts import ListPart, parts
from harness.report.site.rows import current, gib, rows_of
from harness.report.site.sitedata import Data, Plain, of_refusals, of_sources
from harness.report.site.trends import spark
from harness.results import audit
from harness.results.register import Joined, PublishedResult

SITE_SCHEMA = 3
_PLANNER = "planner.html.j2"
# Points of a line in a chart: raw results have all of them.
_MOST_POINTS = 120
# Ways to run a model that stand on the front door as they are: the others are compressed.
MOST_WAYS = 300
# Lines of a list on one page, by what they take, so that no page is larger than a megabyte.
MOST_LISTED: Mapping[str, int] = {
    "models": 250,
    "cards": 250,
    "machines": 600,
    "runs": 300,
    "tried": 300,
    "having": 800,
    "files": 600,
    "refusals": 400,
}

T = TypeVar("T")


@dataclass(frozen=True)
class Page:
    """A page to be written: where, from which template and what it says, to people and to programs."""

    link: str
    template: str
    says: Mapping[str, Any]
    data: Mapping[str, Any]

    def html(self) -> str:
        says = {"up": up(self.link), "data": _data_beside(self.link), "gib": gib, **self.says}
        if self.template == _PLANNER:
            found = render.template(_PLANNER, *planner_page.STYLES, scripts=planner_page.SCRIPTS, runs_python=True)
            return found.render(says)
        return render.template(self.template, *SITE_STYLES, scripts=("language.js", "site.js")).render(says)


@dataclass(frozen=True)
class _Written(Page):
    """A page that is rendered already."""

    text: str = field(default="", kw_only=True)

    def html(self) -> str:
        return self.text


def write_page(folder: Path, page: Page) -> dict[str, int]:
    """Write a page and its data; return both files with their sizes."""
    data = str(Path(page.link).with_suffix(".json"))
    text, told = page.html().encode(), msgspec.json.encode({"schema": SITE_SCHEMA, **page.data}) + b"\n"
    (folder / page.link).parent.mkdir(exist_ok=True)
    (folder / page.link).write_bytes(text)
    (folder / data).write_bytes(told)
    return {page.link: len(text), data: len(told)}


def up(link: str) -> str:
    """Return the way from a page to the root of its site."""
    return "../" * link.count("/")


def _data_beside(link: str) -> str:
    return Path(link).with_suffix(".json").name


@dataclass(frozen=True)
class _List:
    """A list that may go on on pages of its own: what it lists, of what, and how one of it is told to programs."""

    kind: str
    title: str
    key: str
    tell: Callable[[Data, Any], Plain]
    says: Mapping[str, Any]

    def rest(self, found: Sequence[ListPart[Any]]) -> Iterator[Page]:
        """Yield the pages of all parts but the first."""
        for part in found[1:]:
            says = {"list": self.kind, "what": self.title, "title": self.title, "part": part, "of": None, **self.says}
            yield Page(part.link, "site_more.html.j2", says, self.told(part))

    def told(self, part: ListPart[Any]) -> Plain:
        """Return a part for programs, and where the next one is."""
        data = Data(up(part.link))
        following = [link for _, link in part.ways[part.at + 1 : part.at + 2]]
        more = {f"more_{self.key}": {"page": data.up + following[0]}} if following else {}
        return {self.key: [self.tell(data, thing) for thing in part.things], **more}


def of_machine(digests: Sequence[str], file: Path, *, has_planner: bool) -> tuple[Page, MachineLine, dict[str, ModelShare]]:
    """Make the page of the machine that these are all results of, oldest first, from the file that has them in this order."""
    with file.open("rb") as lines:
        results = [msgspec.json.decode(line, type=Result) for line in lines]
    found = enumerate(zip(digests, results, strict=True), 1)
    rows = rows_of([PublishedResult(result=result, digest=digest, line=line) for line, (digest, result) in found])
    line, shares = atlas.shares_of(rows)
    shown, link = current(rows), line.link.page
    parts_of: Any = render.template("site_machine.html.j2", *SITE_STYLES).module
    above, below = Markup(parts_of.above(has_planner)), Markup(parts_of.below(shown, _data_beside(link)))
    html = render.render(results, title=line.link.name, frame=render.Frame(above, below, SITE_STYLES, _MOST_POINTS))
    data = Data(up(link))
    told = {"machine": to_builtins(results[-1].machine), "results": [data.result(row) for row in rows]}
    return _Written(link, "", {}, told, text=html), line, shares


def draw_model(shares: Sequence[bytes], *, has_planner: bool) -> tuple[ModelLine, list[Page]]:
    """Make the pages of the model that these are all shares of, encoded; return its line for other pages, too."""
    model = atlas.model_page([msgspec.json.decode(share, type=ModelShare) for share in shares])
    return atlas.line_of(model), model_pages(model, has_planner=has_planner)


def model_pages(model: ModelPage, *, has_planner: bool) -> list[Page]:
    """Make the page of a model, and those that its list of machines goes on on."""
    link, also = model.link.page, {"planner": has_planner}
    runs = parts(model.machines, MOST_LISTED["runs"], link, lambda tally: tally.link.name)
    more = _List("runs", "Which machines run it", "machines", Data.run, {"workload": model.workload, **also, "of": model.link})
    says = {"model": model, "machines": runs[0], "trends": [(trend, spark(trend)) for trend in model.trends], **also}
    first = Page(link, "site_model.html.j2", says, {**Data(up(link)).model(model), **more.told(runs[0])})
    return [first, *more.rest(runs)]


def of_card(on: OnCard, *, has_planner: bool) -> list[Page]:
    """Make the page of a card, and those that its lists go on on."""
    link, says = on.link.page, {"planner": has_planner, "of": on.link}
    tried = parts(on.models, MOST_LISTED["tried"], link, lambda tally: tally.link.name)
    having = parts(on.machines, MOST_LISTED["having"], link, lambda machine: machine.name, link.replace(".html", "~on"))
    models = _List("tried", "What runs on it?", "models", Data.on_card, says)
    machines = _List("having", "Machines with it", "machines", Data.link, says)
    shown = {"on": on, "card": on.card, "models": tried[0], "machines": having[0], "planner": has_planner}
    told = {**Data(up(link)).card_line(on), **machines.told(having[0]), **models.told(tried[0])}
    return [Page(link, "site_card.html.j2", shown, told), *models.rest(tried), *machines.rest(having)]


def front_pages(
    joined: Joined,
    now: datetime,
    models: Sequence[ModelLine],
    cards: Sequence[OnCard],
    machines: Sequence[MachineLine],
    *,
    has_planner: bool,
) -> Iterator[Page]:
    """Make the front door and the provenance, with the pages that their lists go on on."""
    newest = max(entry.at for entry in joined.entries)[:10]
    facts = {"results": len(joined.entries), "newest": newest, "refused": joined.refused, "sources": len(joined.sources)}
    yield from _index(facts, models, cards, machines, {"planner": has_planner})
    yield from _provenance(facts, joined, now, {"planner": has_planner})


def _index(
    facts: Plain, models: Sequence[ModelLine], cards: Sequence[OnCard], machines: Sequence[MachineLine], also: Plain
) -> Iterator[Page]:
    lists = {
        "models": _List("models", "Models", "models", Data.model_line, also),
        "cards": _List("cards", "Cards", "cards", Data.card_line, also),
        "machines": _List("machines", "Machines", "machines", Data.machine_line, also),
    }
    listed: dict[str, Sequence[ModelLine | OnCard | MachineLine]] = {"models": models, "cards": cards, "machines": machines}
    found = {
        name: parts(things, MOST_LISTED[name], "index.html", lambda one: one.link.name, f"{name}/")
        for name, things in listed.items()
    }
    links = [one.link for things in (models, cards, machines) for one in things]
    is_cut = any(len(cut) > 1 for cut in found.values())
    choices = [row for model in models for row in model.choices]
    says = {
        **{name: cut[0] for name, cut in found.items()},
        "facts": facts,
        "known_cards": known_cards(),
        "choices": Markup("".join(choices[:MOST_WAYS])),
        "more_choices": choices[MOST_WAYS:],
        "names": "\n".join(f"{_one_line(link.name)}\t{link.page}" for link in links) if is_cut else "",
        **also,
    }
    told = {key: value for name, one in lists.items() for key, value in one.told(found[name][0]).items()}
    yield Page("index.html", "site_index.html.j2", says, {**facts, **told})
    for name, one in lists.items():
        yield from one.rest(found[name])


def _one_line(name: str) -> str:
    return " ".join(name.split())


def _provenance(facts: Plain, joined: Joined, now: datetime, also: Plain) -> Iterator[Page]:
    files = parts(joined.sources, MOST_LISTED["files"], "provenance.html", lambda source: source.name, "files/")
    refusals = parts(joined.refusals, MOST_LISTED["refusals"], "provenance.html", joined.where, "refused/")
    shown = _List("files", "Files", "sources", lambda _, source: of_sources([source])[0], also)
    refused = _List("refusals", "Refused", "refused", lambda _, one: of_refusals(joined, [one])[0], {"joined": joined, **also})
    built = {"built": f"{now:%Y-%m-%d %H:%M} UTC", "checked": audit.CHECKED, "facts": facts, "joined": joined, **also}
    told = {"built": f"{now:%Y-%m-%dT%H:%M:%SZ}", **shown.told(files[0]), **refused.told(refusals[0])}
    yield Page("provenance.html", "site_provenance.html.j2", {**built, "files": files[0], "refusals": refusals[0]}, told)
    yield from shown.rest(files)
    yield from refused.rest(refusals)


def planner(models: Sequence[ModelLine], sizes: Mapping[str, int]) -> Page:
    """Make the page that plans; `sizes` are those of the scripts that it loads."""
    rows = [row for model in models for row in model.receipts]
    return Page("planner.html", _PLANNER, planner_page.page_says(rows, sizes), planner_page.page_data(rows))
