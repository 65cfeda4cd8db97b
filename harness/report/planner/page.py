"""What the planner's page offers and knows: models, cards, and the measured results that stand beside its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from markupsafe import Markup

from harness.catalog.listing import known_models
from harness.core.records import to_builtins
from harness.machine.gpus import Gpu, gpu_table
from harness.report.site.rows import Row, gib

SCRIPTS = ("language.js", "planner.js", "site.js")
STYLES = ("site.css", "planner.css")
# What stands in the fields of a page that was opened without an address of a question.
_USUAL_MODEL, _USUAL_CARD = "chatglm-6b", "RTX 3060 12GB"


def page_says(rows: Iterable[Row], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return what the template writes; `sizes` are the bytes of the scripts that the page loads."""
    models = sorted(map(to_builtins, known_models()), key=lambda model: bool(model["name"] != _USUAL_MODEL))
    cards = sorted(gpu_table(), key=lambda card: (card.vram_bytes, card.short_name))
    known = {**page_data(rows), "models": models, "bytes": sum(sizes.values())}
    return {
        "models": models,
        "cards": f"{len(cards)} cards",
        "by_size": [(gib(size), _names(found)) for size, found in groupby(cards, lambda card: card.vram_bytes)],
        "usual": _USUAL_CARD,
        "known": Markup(json.dumps(known, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
    }


def _names(cards: Iterable[Gpu]) -> list[str]:
    """Return the names by which `plan --gpu` knows cards, each once."""
    return list(dict.fromkeys(card.short_name for card in cards))


def page_data(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the results that stand beside plans: of each what it took and how fast it was, and where that is told in full."""
    shown = [row for row in rows if row.works and row.measured and row.answers_well]
    return {"measured": [_receipt(row) for row in shown]}


def _receipt(row: Row) -> dict[str, Any]:
    assert row.measured is not None, "it is of what was measured"
    case = row.result.case
    return {
        "model": case.model,
        "precision": case.precision,
        "placement": case.placement,
        "memory": row.measured.need.text,
        "kind": row.measured.kind,
        "speed": row.speed.text if row.speed.value else "",
        "synthetic": row.result.weights == "synthetic",
        "on": row.card.name if row.card else row.machine.name,
        "card_bytes": row.card.size if row.card else None,
        "page": row.page,
    }
