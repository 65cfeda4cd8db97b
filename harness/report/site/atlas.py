"""What the pages of a site say, decided before they are laid out: models, cards, machines.

Everything rests on published results (`results.audit`). What is measured names its result; what is concluded from it is called
predicted, and says from what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.core.records import Workload
from harness.report.site.needs import Need, Rung, fitting, needs_of, rungs_of, ways_of
from harness.report.site.rows import Card, Row, RowLink, best, current, grouped, rows_of
from harness.report.site.trends import Trend, trends_of
from harness.results.audit import PublishedResult


@dataclass(frozen=True)
class Tally:
    """Rows that belong together, the best of them, and how many work."""

    link: RowLink
    rows: tuple[Row, ...]
    best: Row | None
    works: int
    need: Need | None = None

    @property
    def newest(self) -> str:
        return max((row.result.at for row in self.rows), default="")[:10]


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

    models: tuple[ModelPage, ...]
    cards: tuple[OnCard, ...]
    machines: tuple[Tally, ...]
    history: Mapping[str, tuple[Row, ...]]


def draw(entries: Sequence[PublishedResult]) -> Atlas:
    """Arrange published results, oldest first, by model, by card and by machine."""
    rows = rows_of(entries)
    shown = current(rows)
    by_model = grouped(shown, lambda row: row.result.case.model)
    history = grouped(rows, lambda row: row.result.case.model)
    models = tuple(_model(by_model[name], history[name]) for name in sorted(by_model, key=str.casefold))
    return Atlas(
        models=models,
        cards=tuple(_cards(shown, models)),
        machines=tuple(_tally(found[0].machine, found) for found in _by_name(shown, lambda row: row.machine)),
        history={page: tuple(found) for page, found in grouped(rows, lambda row: row.machine.page).items()},
    )


def of_machine(entries: Sequence[PublishedResult]) -> tuple[Tally, list[Row]]:
    """Return the current results of one machine, and all of them."""
    rows = rows_of(entries)
    return _tally(rows[0].machine, current(rows)), rows


def _by_name(rows: Iterable[Row], link: Callable[[Row], RowLink]) -> list[list[Row]]:
    found = grouped(rows, link)
    return [found[key] for key in sorted(found, key=lambda key: (key.name.casefold(), key.page))]


def _tally(link: RowLink, rows: Sequence[Row], need: Need | None = None) -> Tally:
    return Tally(link, tuple(rows), best(rows), sum(row.works for row in rows), need)


def _model(rows: Sequence[Row], history: Sequence[Row]) -> ModelPage:
    ours = _of_most(rows)
    needs = needs_of(ours)
    return ModelPage(
        link=rows[0].model,
        workload=ours[0].result.case.workload,
        others=len({row.result.case.workload.asked for row in rows}) - 1,
        synthetic=any(row.result.weights == "synthetic" for row in ours),
        rungs=tuple(rungs_of(ours, needs)),
        needs=needs,
        machines=tuple(_tally(found[0].machine, _of_most(found)) for found in _by_name(rows, lambda row: row.machine)),
        trends=trends_of(history),
        rows=tuple(rows),
        best=best(ours),
        ways=ways_of(ours),
    )


def _of_most(rows: Sequence[Row]) -> list[Row]:
    """Keep those of the workload that most have: figures of others do not compare."""
    ((workload, _),) = Counter(row.result.case.workload.asked for row in rows).most_common(1)
    return [row for row in rows if row.result.case.workload.asked == workload]


def _cards(rows: Iterable[Row], models: Sequence[ModelPage]) -> list[OnCard]:
    found = grouped(((row.card, row) for row in rows if row.card), lambda pair: pair[0].link.page)
    cards = [_on_card(pairs[0][0], [row for _, row in pairs], models) for pairs in found.values()]
    return sorted(cards, key=lambda one: (one.card.size, one.card.name))


def _on_card(card: Card, rows: Sequence[Row], models: Sequence[ModelPage]) -> OnCard:
    of_model = grouped(rows, lambda row: row.model.page)
    tallies = [_tally(model.link, of_model.get(model.link.page, ()), fitting(model.needs, card)) for model in models]
    return OnCard(card, tuple(t for t in tallies if t.rows or t.need), tuple(dict.fromkeys(row.machine for row in rows)))
