"""The cases of one matrix at a glance: what there is to draw of them, and how it is told apart from that of other matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.report.page import tradeoff
from harness.report.page.forecast import Forecast, forecast
from harness.report.page.tradeoff import SHAPES, Panel
from harness.report.page.view import Cell


@dataclass(frozen=True)
class Overview:
    """Memory against speed by kind of memory, with the shapes that occur there, and measured against predicted.

    `key` begins the ids of all that is drawn: no other matrix has the same.
    """

    key: str
    panels: tuple[Panel, ...]
    shapes: tuple[str, ...]
    has_noise: bool
    forecast: Forecast | None


def overview(cells: Sequence[Cell]) -> Overview | None:
    """Draw the cases of one matrix; None if there are fewer than two."""
    panels, checked = tradeoff.panels(cells), forecast(cells)
    if not panels and not checked:
        return None
    points = [point for panel in panels for point in panel.points]
    return Overview(
        key=f"over-{cells[0].anchor}",
        panels=tuple(panels),
        shapes=tuple(shape for shape in SHAPES if any(point.shape == shape for point in points)),
        has_noise=any(point.cell.speed.noisy for point in points),
        forecast=checked,
    )
