"""What a site tells programs: the plain forms of its pages, which lie beside them as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.core.records import to_builtins
from harness.report.site.atlas import MachineLine, ModelLine, ModelPage, OnCard, Tally
from harness.report.site.needs import Need, Rung
from harness.report.site.rows import Row, RowLink
from harness.report.site.trends import Trend
from harness.results.register import Joined, Refusal, ResultsFile

Plain = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Writes plain forms for one page; `up` leads from it to the root of the site, for the links `page` and `raw`."""

    up: str

    def link(self, link: RowLink) -> Plain:
        return {"name": link.name, "page": self.up + link.page}

    def result(self, row: Row) -> Plain:
        """Return what is known of one result, but for what only its raw file holds."""
        result = row.result
        return {
            "id": result.id,
            "case": to_builtins(result.case),
            "weights": result.weights,
            "machine": self.link(row.machine),
            "model": self.link(row.model),
            "run": result.run,
            "at": result.at,
            "verdict": result.verdict.value,
            "outcome": result.outcome.value,
            "stage": result.stage,
            "why": result.why,
            **_need(row),
            "metrics": result.metrics,
            "noisy": result.noisy,
            "answers": row.quality or None,
            "environment": result.environment,
            **self.evidence(row),
        }

    def evidence(self, row: Row) -> Plain:
        """Return where the whole result lies: the file of its machine, and its line there."""
        return {"raw": self.up + row.raw, "line": row.entry.line}

    def brief(self, row: Row | None) -> Plain | None:
        """Return the figures of a result and name the rest of it."""
        if row is None:
            return None
        result = row.result
        said = {"id": result.id, "machine": self.link(row.machine), **_need(row)}
        return {**said, "metrics": result.metrics, **self.evidence(row)}

    def tally(self, tally: Tally) -> Plain:
        return {**self.link(tally.link), "best": self.brief(tally.best), "cases": tally.cases, "works": tally.works}

    def run(self, tally: Tally) -> Plain:
        """Return how a model runs on a machine, and where all results of that machine are told."""
        return {**self.tally(tally), "data": f"{self.up}{tally.link.page.removesuffix('.html')}.json"}

    def machine_line(self, machine: MachineLine) -> Plain:
        return {**self.tally(machine.tally), "newest": machine.tally.newest}

    def need(self, need: Need | None) -> Plain | None:
        if need is None:
            return None
        case = {"precision": need.precision, "placement": need.placement, "vram_bytes": int(need.bytes), "card_bytes": need.card}
        return {**case, "measured": not need.planned, "basis": need.basis, **self.evidence(need.row)}

    def rung(self, rung: Rung) -> Plain:
        known = {"card_bytes": rung.size, "measured": rung.row is not None, "works": rung.row.works if rung.row else True}
        return {**known, "result": self.brief(rung.row), "predicted": self.need(rung.need)}

    def trend(self, trend: Trend) -> Plain:
        versions = [
            {"changed": list(one.changed), "at": one.row.result.at, **(self.brief(one.row) or {})} for one in trend.versions
        ]
        machine = self.link(trend.row.machine)
        told = {"id": trend.row.result.id, "machine": machine, "change": trend.change}
        return {**told, "left_out": trend.between, "versions": versions}

    def model_line(self, model: ModelLine) -> Plain:
        return {
            **self.link(model.link),
            "smallest_card_bytes": model.smallest.size if model.smallest else None,
            "predicted_card_bytes": model.least.card if model.least else None,
            "best": self.brief(model.shown),
            "machines": model.machines,
            "cases": model.cases,
            "works": model.works,
        }

    def model(self, model: ModelPage) -> Plain:
        """Return what the page of a model says, but for its machines."""
        return {
            "model": model.link.name,
            "workload": to_builtins(model.workload),
            "cards": [self.rung(rung) for rung in model.rungs],
            "needs": [self.need(need) for need in model.needs],
            "trends": [self.trend(trend) for trend in model.trends],
        }

    def card_line(self, on: OnCard) -> Plain:
        card = on.card
        told = {"card": card.model, "bytes": card.size, "emulated": card.emulated, "count": card.count}
        return {**self.link(on.link), **told, "tried": len(on.tried), "works": on.works, "predicted": len(on.predicted)}

    def on_card(self, tally: Tally) -> Plain:
        return {**self.tally(tally), "predicted": self.need(tally.need)}


def _need(row: Row) -> Plain:
    """Return what the case needs of the tier that decides, both null where nothing was measured."""
    found = row.measured
    return {"tier": found.tier if found else None, "needed_bytes": int(found.need.number) if found else None}


def of_sources(sources: Iterable[ResultsFile]) -> list[Plain]:
    """Return what is known of sources."""
    return [to_builtins(source) for source in sources]


def of_refusals(joined: Joined, refusals: Iterable[Refusal]) -> list[Plain]:
    """Return each refusal with its place."""
    return [{"where": joined.where(refusal), "why": refusal.why} for refusal in refusals]
