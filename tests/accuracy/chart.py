"""Predicted against measured as one SVG: both axes logarithmic, a band of 10 % around the diagonal, a color a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import altair as alt
import vl_convert

from harness.core.records import Record

SIDE = 400
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe-Ito
MARGIN = 1.1


class Pair(Record, frozen=True, kw_only=True):
    """One case: what was estimated and what was measured, both more than 0, of one figure."""

    case: str
    figure: str
    estimated: float
    measured: float


def write(path: Path, pairs: Sequence[Pair], unit: str, scale: float) -> None:
    """Draw the pairs, divided by `scale`, which makes `unit`."""
    values = [value / scale for pair in pairs for value in (pair.estimated, pair.measured)]
    ends = [min(values) / MARGIN, max(values) * MARGIN]
    log = alt.Scale(type="log", domain=ends, nice=False)
    across, up = (
        alt.X("measured:Q", title=f"measured, {unit}", scale=log),
        alt.Y("estimated:Q", title=f"estimated, {unit}", scale=log),
    )
    figures = list(dict.fromkeys(pair.figure for pair in pairs))
    legend = alt.Legend(title=None, orient="bottom", direction="vertical")
    color = alt.Color("figure:N", scale=alt.Scale(domain=figures, range=COLORS[: len(figures)]), legend=legend)
    points = _chart([_point(pair, scale) for pair in pairs]).mark_circle(size=50, opacity=0.7)
    ideal = _chart([{"measured": end, "estimated": end, "least": 0.9 * end, "most": 1.1 * end} for end in ends])
    band = ideal.mark_area(opacity=0.12, clip=True, description="within 10 %").encode(across, alt.Y("least:Q"), alt.Y2("most:Q"))
    line = ideal.mark_line(color="#999", strokeDash=[4, 4]).encode(across, up)
    drawn = (band + line + points.encode(across, up, color, alt.Description("said:N"))).properties(width=SIDE, height=SIDE)
    sized = drawn.configure_axis(labelFontSize=12, labelSeparation=6, titleFontSize=12).configure_legend(labelFontSize=12)
    path.write_text(vl_convert.vegalite_to_svg(sized.to_dict()) + "\n", encoding="utf-8")


def _chart(values: Iterable[Mapping[str, float | str]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(values)))


def _point(pair: Pair, scale: float) -> dict[str, float | str]:
    ratio = f"{pair.case}: {pair.figure}, estimated / measured {pair.estimated / pair.measured:.2f}"
    return {"measured": pair.measured / scale, "estimated": pair.estimated / scale, "figure": pair.figure, "said": ratio}
