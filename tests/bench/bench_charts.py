"""What the charts of a page of 500 results cost, and what they would cost if Altair and vl-convert drew them.

The library has the easier task: no links, no names beside points, no phases, no second language, no dark colors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import altair as alt
import vl_convert
from msgspec.structs import replace

from harness.core.records import Result
from harness.core.units import GIB
from harness.report.page.charts import decimate, timeline
from harness.report.page.forecast import Forecast, forecast
from harness.report.page.tradeoff import Panel, panels
from harness.report.page.view import Cell, blocks
from harness.report.site.rows import rows_of
from harness.report.site.trends import Trend, spark, trends_of
from harness.results.register import PublishedResult
from tests.bench.bench_page import many
from tests.support.reporting import Figure, Section

CASES = 500
# Of a line, as a page of so many cases has them.
POINTS = 48
# What the whole page of so many results may take, as bench_page asks.
PAGE_S, PAGE_MB = 1.0, 2.0
# The narrowest screen, and the smallest letters that tests/browser allows there, in CSS pixels.
SCREEN, LETTERS = 360, 11
Chart = alt.Chart | alt.LayerChart


def drawn(svgs: Iterable[str]) -> tuple[float, float, str]:
    """Return what drawings cost while they are made, in seconds of processor time, their megabytes, and the last."""
    begun = time.process_time()
    found = [svg for svg in svgs if svg]
    return time.process_time() - begun, sum(len(svg.encode()) for svg in found) / 1e6, found[-1]


def compare(figures: list[Figure], kind: str, ours: Iterable[str], library: Sequence[Chart]) -> tuple[float, float, str]:
    """Make the same charts by our own code and by the library; return what the library's cost, and the last."""
    by_us = drawn(ours)
    by_library = drawn(vl_convert.vegalite_to_svg(one.to_dict()) for one in library)
    for by, (seconds, megabytes, _) in (("our own", by_us), ("by Altair", by_library)):
        figures.append(Figure(what=f"{kind}, {by}", found=f"{seconds:.2f} s, {megabytes:.2f} MB", wanted="", rows=len(library)))
    return by_library


def chart(values: Iterable[Mapping[str, object]], width: int = 640, height: int = 170) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(values)), width=width, height=height)


def line(result: Result) -> alt.Chart:
    """Draw memory over time: two areas."""
    samples = result.timeline
    assert samples
    series = (("RAM", samples.ram_bytes), ("anonymous RAM", samples.ram_anon_bytes))
    values = [{"s": s, "GiB": size / GIB, "of": name} for name, sizes in series for s, size in decimate(samples.t_s, sizes, POINTS)]
    areas: alt.Chart = chart(values).mark_area(opacity=0.3).encode(x="s:Q", y=alt.Y("GiB:Q", stack=None), color="of:N")
    return areas


def points(panel: Panel) -> alt.Chart:
    """Draw memory against speed: a point for each case, by quality."""
    values = [{"GiB": point.size / GIB, "tokens/s": point.speed, "answers": point.shape} for point in panel.points]
    marks: alt.Chart = chart(values, height=300).mark_point().encode(x="GiB:Q", y="tokens/s:Q", shape="answers:N")
    return marks


def bars(found: Forecast) -> alt.LayerChart:
    """Draw measured against predicted: an interval and a point for each case and figure."""
    values = [
        {
            "case": row.name,
            "ratio": check.ratio,
            "low": check.expected.low / check.expected.best,
            "high": check.expected.high / check.expected.best,
        }
        for row, _ in found.drawn
        for check in row.checks
    ]
    base = chart(values, height=24 * len(found.drawn)).encode(y="case:N")
    layers: alt.LayerChart = base.mark_bar().encode(x="low:Q", x2="high:Q") + base.mark_point().encode(x="ratio:Q")
    return layers


def sparks(trend: Trend) -> alt.Chart:
    """Draw the speed of a case over versions: a line without axes."""
    values = [{"at": at, "tokens/s": float(one.row.speed.value)} for at, one in enumerate(trend.versions) if one.row.speed.value]
    bare = {"x": alt.X("at:Q", axis=None), "y": alt.Y("tokens/s:Q", axis=None)}
    line: alt.Chart = chart(values, width=112, height=28).mark_line(point=True).encode(**bare)
    return line


def trends(results: Sequence[Result]) -> list[Trend]:
    """Let the results come again with two later versions of torch; return the cases that have a speed in two or more."""
    again = [
        replace(result, environment=result.environment | {"torch": torch}) for torch in ("2.6", "2.7", "2.8") for result in results
    ]
    entries = [PublishedResult(result=result, digest=str(line), line=line) for line, result in enumerate(again, 1)]
    return [trend for trend in trends_of(rows_of(entries)) if spark(trend)]


def marks(cells: Sequence[Cell]) -> str:
    """Draw what `bars` draws by our own code; empty where there is nothing to draw."""
    found = forecast(cells)
    return "".join(mark for _, pair in found.drawn for mark in pair) if found else ""


def test_a_page_of_charts_by_the_library_would_be_too_slow(section: Section) -> None:
    """Where this fails, the reason that the report's module of axes gives for drawing by our own code has gone."""
    results, figures = many(CASES), section.figures
    timed = [result for result in results if result.timeline]
    cells = [matrix.cells for block in blocks(results) for matrix in block.matrices]
    plots, checks = [panel for of in cells for panel in panels(of)], [one for of in cells if (one := forecast(of))]
    start = drawn(vl_convert.vegalite_to_svg(points(plot).to_dict()) for plot in plots[:1])[0]
    figures.append(Figure(what="the library's first chart, which starts it", found=f"{start:.2f} s", wanted="", rows=1))
    lines = (str(timeline(one.timeline, one.phases, points=POINTS)) for one in timed)
    costs = [
        compare(figures, "memory over time", lines, [*map(line, timed)]),
        compare(figures, "memory against speed", (panel.drawing for of in cells for panel in panels(of)), [*map(points, plots)]),
        compare(figures, "measured against predicted", map(marks, cells), [*map(bars, checks)]),
    ]
    seconds, megabytes, plot = sum(cost[0] for cost in costs), sum(cost[1] for cost in costs), costs[1][2]
    (width,) = map(int, re.findall(r'^<svg [^>]* width="(\d+)"', plot))
    letters = min(map(int, re.findall(r'font-size="(\d+)px"', plot))) * SCREEN / width
    most = f"{PAGE_S:.0f} s, {PAGE_MB:.0f} MB for all of the page"
    figures.append(Figure(what="all of these by Altair", found=f"{seconds:.1f} s, {megabytes:.1f} MB", wanted=most))
    figures.append(Figure(what=f"its letters on a screen of {SCREEN} pixels", found=f"{letters:.1f} px", wanted=f"{LETTERS} px"))
    moves = trends(results)
    compare(figures, "speed over versions, on pages of a site", (str(spark(trend)) for trend in moves), [*map(sparks, moves)])
    section.notes.append(f"The library is altair {alt.__version__} with vl-convert {version('vl-convert-python')}.")
    assert seconds > PAGE_S
    assert letters < LETTERS
