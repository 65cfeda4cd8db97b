"""What the pages of a site say, decided before they are laid out: models, cards, machines.

Everything rests on published results (`results.audit`). What is measured names its result; what is concluded from it is called
predicted, and says from what. A machine says once what it has to say of each model (`ModelShare`); the pages of models are drawn
from shares, and the front door and the pages of cards from the lines of models and machines, so that one machine more is little
work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.core.records import Workload
from harness.report.site.choices import write_choice
from harness.report.site.needs import Need, Rung, fitting, needs_of, rungs_of, ways_of
from harness.report.site.rows import Card, Row, RowLink, best, current, grouped, slim
from harness.report.site.trends import Trend, brief, sorted_by_change, trends_of

# Trends that are kept of a model, and versions of each: the files of its machines have all results.
MOST_TRENDS, _MOST_VERSIONS = 40, 8
# Receipts of one way to run a model that stand beside plans.
_MOST_RECEIPTS = 8


@dataclass(frozen=True)
class Tally:
    """Cases that belong together: how many there are and work, the best of them, the last, and the date of the newest."""

    link: RowLink
    cases: int
    works: int
    best: Row | None
    last: Row | None
    newest: str
    need: Need | None = None


@dataclass(frozen=True)
class ModelShare:
    """What one machine has to say of one model: the newest result of each case, and how cases changed over versions."""

    rows: tuple[Row, ...]
    trends: tuple[Trend, ...]
    more_trends: int = 0


@dataclass(frozen=True)
class MachineLine:
    """What lists say of a machine: its cases, and the cards that it has."""

    tally: Tally
    cards: tuple[Card, ...]

    @property
    def link(self) -> RowLink:
        return self.tally.link


@dataclass(frozen=True)
class ModelPage:
    """The page of a model. Its answers are about one workload, that of most results."""

    link: RowLink
    workload: Workload
    others: int
    synthetic: bool
    rungs: tuple[Rung, ...]
    needs: tuple[Need, ...]
    machines: tuple[Tally, ...]
    trends: tuple[Trend, ...]
    more_trends: int
    rows: tuple[Row, ...]
    best: Row | None
    ways: tuple[Row, ...]

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
    def shown(self) -> Row | None:
        """The case that a line about the model is of: the best way on its smallest card, else the best without one."""
        return self.smallest.row if self.smallest else self.without

    @property
    def least(self) -> Need | None:
        """The way that takes least of a card, if it should fit one that is smaller than any that the model was seen to work on."""
        need = min((need for need in self.needs if need.card), key=lambda need: need.bytes, default=None)
        return need if need and need.card and (self.smallest is None or need.card < self.smallest.size) else None


@dataclass(frozen=True)
class ModelLine:
    """What the front door and the pages of cards say of a model, which is all that is kept of its page."""

    link: RowLink
    synthetic: bool
    smallest: Rung | None
    least: Need | None
    shown: Row | None
    machines: int
    cases: int
    works: int
    choices: tuple[str, ...]  #: its rows on the front door, as HTML
    needs: tuple[Need, ...]
    on_cards: tuple[tuple[Card, Tally], ...]
    receipts: tuple[Row, ...]


@dataclass(frozen=True)
class OnCard:
    """The page of a card: each model that was tried on it or should fit, and the machines that have it."""

    card: Card
    models: tuple[Tally, ...]
    machines: tuple[RowLink, ...]

    @property
    def link(self) -> RowLink:
        return self.card.link

    @property
    def tried(self) -> tuple[Tally, ...]:
        return tuple(tally for tally in self.models if tally.cases)

    @property
    def predicted(self) -> tuple[Tally, ...]:
        return tuple(tally for tally in self.models if not tally.cases)

    @property
    def works(self) -> int:
        return sum(tally.works > 0 for tally in self.models)


def shares_of(rows: Sequence[Row]) -> tuple[MachineLine, dict[str, ModelShare]]:
    """Return what one machine, whose results these all are, oldest first, says of itself and of each model."""
    shown = current(rows)
    by_model, history = (grouped(found, lambda row: row.result.case.model) for found in (shown, rows))
    cards = {row.card.link.page: row.card for row in shown if row.card}
    line = MachineLine(_slim_tally(rows[0].machine, shown), tuple(cards.values()))
    return line, {model: _share(found, history[model]) for model, found in by_model.items()}


def _share(rows: Iterable[Row], history: Iterable[Row]) -> ModelShare:
    found = trends_of(history)
    kept = tuple(brief(trend, _MOST_VERSIONS) for trend in found[:MOST_TRENDS])
    return ModelShare(tuple(map(slim, rows)), kept, len(found) - len(kept))


def model_page(shares: Sequence[ModelShare]) -> ModelPage:
    """Draw the page of the model that all these shares are of."""
    rows = sorted((row for share in shares for row in share.rows), key=lambda row: (row.result.at, row.result.id, row.entry.digest))
    ours = _of_most(rows)
    needs = needs_of(ours)
    trends = sorted_by_change(trend for share in shares for trend in share.trends)
    return ModelPage(
        link=rows[0].model,
        workload=ours[0].result.case.workload,
        others=len({row.result.case.workload.asked for row in rows}) - 1,
        synthetic=any(row.result.weights == "synthetic" for row in ours),
        rungs=tuple(rungs_of(ours, needs)),
        needs=needs,
        machines=tuple(tally_of(found[0].machine, _of_most(found)) for found in _by_name(rows, lambda row: row.machine)),
        trends=tuple(trends[:MOST_TRENDS]),
        more_trends=len(trends[MOST_TRENDS:]) + sum(share.more_trends for share in shares),
        rows=tuple(rows),
        best=best(ours),
        ways=ways_of(ours),
    )


def line_of(page: ModelPage) -> ModelLine:
    """Return what is kept of the page of a model for others."""
    on_cards = grouped((row for row in page.rows if row.card), lambda row: row.card.link.page if row.card else "")
    return ModelLine(
        link=page.link,
        synthetic=page.synthetic,
        smallest=page.smallest,
        least=page.least,
        shown=page.shown,
        machines=len(page.machines),
        cases=len(page.rows),
        works=page.works,
        choices=tuple(map(write_choice, page.ways)),
        needs=page.needs,
        on_cards=tuple((found[0].card, tally_of(page.link, found)) for found in on_cards.values() if found[0].card),
        receipts=tuple(_receipts(page.rows)),
    )


def _receipts(rows: Iterable[Row]) -> Iterable[Row]:
    """Pick what stands beside plans: of each way the fastest on each card or machine, on a few of these."""
    sound = [row for row in rows if row.works and row.measured and row.answers_well]
    for found in grouped(sound, lambda row: row.way).values():
        places = grouped(found, lambda row: row.card.name if row.card else row.machine.name)
        fastest = (max(at, key=lambda row: float(row.speed.value or 0)) for at in places.values())
        yield from sorted(fastest, key=lambda row: -float(row.speed.value or 0))[:_MOST_RECEIPTS]


def draw_cards(models: Sequence[ModelLine], machines: Iterable[MachineLine]) -> list[OnCard]:
    """Draw the page of each card, smallest first: what was tried on it, and what should fit by what other cards showed."""
    having: dict[str, list[RowLink]] = {}
    for machine in machines:
        for card in machine.cards:
            having.setdefault(card.link.page, []).append(machine.link)
    tried: dict[str, dict[str, Tally]] = {}
    cards: dict[str, Card] = {}
    for model in models:
        for card, tally in model.on_cards:
            cards.setdefault(card.link.page, card)
            tried.setdefault(card.link.page, {})[model.link.page] = tally
    found = [_on_card(card, tried[page], models, having[page]) for page, card in cards.items()]
    return sorted(found, key=lambda on: (on.card.size, on.card.name))


def _on_card(card: Card, tried: Mapping[str, Tally], models: Iterable[ModelLine], machines: Iterable[RowLink]) -> OnCard:
    rows = ((tried.get(model.link.page) or tally_of(model.link, ()), fitting(model.needs, card), model.link) for model in models)
    tallies = (Tally(link, one.cases, one.works, one.best, one.last, one.newest, need) for one, need, link in rows)
    return OnCard(card, tuple(tally for tally in tallies if tally.cases or tally.need), tuple(machines))


def tally_of(link: RowLink, rows: Sequence[Row]) -> Tally:
    """Count rows that belong together."""
    newest = max((row.result.at for row in rows), default="")[:10]
    return Tally(link, len(rows), sum(row.works for row in rows), best(rows), rows[-1] if rows else None, newest)


def _slim_tally(link: RowLink, rows: Sequence[Row]) -> Tally:
    tally = tally_of(link, rows)
    return replace(tally, best=tally.best and slim(tally.best), last=tally.last and slim(tally.last))


def _by_name(rows: Iterable[Row], link: Callable[[Row], RowLink]) -> list[list[Row]]:
    found = grouped(rows, link)
    return [found[key] for key in sorted(found, key=lambda key: (key.name.casefold(), key.page))]


def _of_most(rows: Sequence[Row]) -> list[Row]:
    """Keep those of the workload that most have: figures of others do not compare."""
    ((workload, _),) = Counter(row.result.case.workload.asked for row in rows).most_common(1)
    return [row for row in rows if row.result.case.workload.asked == workload]
