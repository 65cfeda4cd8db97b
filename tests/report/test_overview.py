"""The overview: points where their values are, a front that nothing beats, names that can be read, predictions held to account."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from harness.core.records import Estimate, Outcome, Quality, Result, Span, TierEstimate, Verdict
from harness.core.units import GIB, MIB
from harness.report.page import forecast as forecasts
from harness.report.page import labels, render, tradeoff, view
from harness.report.page.overview import overview
from harness.report.page.view import Cell
from harness.results import store
from tests.report.test_page import Node, read, replace
from tests.support import builders

SIZES = st.integers(1, 64 * GIB)
SPEEDS = st.floats(1e-3, 1e4)
MADE = st.lists(st.tuples(SIZES, SPEEDS, st.sampled_from(["intact", "degraded", "broken", "not_measured"])), max_size=25)
HOSTILE = "<script>x</script>\"'&\u202e" + "x" * 10_000


def case(name: str, size: int, speed: float, quality: str = "intact", *, vram: bool = False, **changes: Any) -> Result:
    """A case that worked, with its peak of memory and its speed."""
    metrics = {"decode_tok_s": speed, "ram_peak_bytes": size} | ({"vram_peak_bytes": size} if vram else {})
    changes = {"machine": builders.machine(*([builders.gpu()] if vram else []))} | changes
    found = Quality(probe="1", verdict=quality, why="")
    return builders.result(builders.case(name, "direct" if vram else "cpu"), metrics=metrics, quality=found, **changes)


def cells(*results: Result) -> list[Cell]:
    return list(view.blocks(results)[0].matrices[0].cells) if results else []


def panel(*results: Result) -> tradeoff.Panel:
    [found] = tradeoff.panels(cells(*results))
    return found


def places(drawing: Markup) -> dict[str, tuple[float, float]]:
    """Read where the points are from a drawing: percent across and pixels down, by the names of their cases."""
    links = read(str(drawing)).all("a")
    marks = {link.all("title")[0].text.partition(":")[0]: link.all("use")[-1].attrs for link in links}
    return {name: (float(mark["x"].removesuffix("%")), float(mark["y"])) for name, mark in marks.items()}


# Memory against speed


@given(MADE)
def test_the_front_is_what_no_sound_case_beats(made: list[tuple[int, float, str]]) -> None:
    results = [case(f"p{i}", size, speed, quality) for i, (size, speed, quality) in enumerate(made)]
    points = [point for panel in tradeoff.panels(cells(*results)) for point in panel.points]
    front = tradeoff.front(points)
    sound = [point for point in points if point.shape in ("intact", "not checked")]
    for point in sound:
        beaten = any(
            other.size <= point.size and other.speed >= point.speed and (other.size, other.speed) != (point.size, point.speed)
            for other in sound
        )
        stands_for = any((other.size, other.speed) == (point.size, point.speed) for other in front)
        assert stands_for == (not beaten)
    assert all(point in sound for point in front)
    assert [point.size for point in front] == sorted({point.size for point in front})
    assert [point.speed for point in front] == sorted({point.speed for point in front})


def test_a_case_that_failed_a_check_is_not_on_the_front() -> None:
    found = panel(case("a", GIB, 30, checks={"dtype": "float32 where float16 was to be"}), case("b", 2 * GIB, 20))
    assert [point.name for point in tradeoff.front(found.points)] == ["b/cpu"]
    assert found.sentence == "b/cpu uses the least memory (2.00 GiB) and is the fastest (20.0 tokens/s)."


def test_the_sentence_writes_memory_as_the_matrix_does() -> None:
    found = cells(case("a", 660 * MIB, 30), case("b", 604 * MIB, 20))
    assert tradeoff.panels(found)[0].sentence == (
        "b/cpu uses the least memory (604 MiB, 20.0 tokens/s), a/cpu is the fastest (30.0 tokens/s, 660 MiB)."
    )
    assert sorted(one.memory.need.text for one in found if one.memory) == ["604 MiB", "660 MiB"]


@given(st.lists(st.tuples(SIZES, st.floats(10, 99)), min_size=3, max_size=12, unique_by=lambda pair: pair[0]))
def test_points_stand_where_their_values_are(made: list[tuple[int, float]]) -> None:
    found = panel(*(case(f"p{i}", size, speed) for i, (size, speed) in enumerate(made)))
    at = places(found.drawing)
    (low, _), (high, _) = min(made), max(made)
    [left, right] = sorted([at[f"p{made.index(end)}/cpu"][0] for end in (min(made), max(made))])
    for i, (size, speed) in enumerate(made):
        x, y = at[f"p{i}/cpu"]
        assert x == pytest.approx(left + (right - left) * (size - low) / (high - low), abs=0.16)
        assert found.height - y == pytest.approx(found.height * speed / (1.12 * max(speed for _, speed in made)), abs=0.06)


def test_a_point_on_a_tick_lies_on_its_line() -> None:
    results = [case(f"p{i}", i * GIB, 10.0 ** (i - 1)) for i in (1, 2, 3, 4)]
    found = panel(*results)
    drawn = read(str(found.drawing))
    at = places(found.drawing)
    texts = [(text.text, text.attrs) for text in drawn.all("g", look="axes")[0].all("text")]
    for size, speed, name in (("2", "10", "p2/cpu"), ("4", "1,000", "p4/cpu")):
        x = next(attrs["x"] for text, attrs in texts if text == size and attrs["class"] == "middle")
        y = next(attrs["y"] for text, attrs in texts if text == speed and attrs["class"] == "end")
        assert (float(x.removesuffix("%")), float(y) - 4) == pytest.approx(at[name], abs=0.11)
    assert "tokens/s, log scale" in drawn.text


def test_speeds_that_are_near_each_other_are_not_drawn_by_their_logarithm() -> None:
    assert "log scale" not in panel(case("a", GIB, 10), case("b", GIB, 99)).drawing
    assert "log scale" in panel(case("a", GIB, 10), case("b", GIB, 101)).drawing


def test_sizes_that_are_written_alike_lie_beside_each_other() -> None:
    """A ten-thousandth of a GiB apart, they were at both ends of the drawing."""
    found = panel(case("a", int(1.7301 * GIB), 10), case("b", int(1.7302 * GIB), 20))
    (left, _), (right, _) = (places(found.drawing)[f"{name}/cpu"] for name in "ab")
    assert 0 <= right - left < 1
    assert 25 < left < 75
    marks = re.findall(r'<text class="middle" x="(.+?)%" y=".+?">(.+?)<', found.drawing)
    assert {marks[0][0], marks[-1][0]} == {"0", "100"}
    assert all(len(text) <= len("1.75") for _, text in marks)


def test_ram_and_vram_never_share_an_axis() -> None:
    mixed = [case(f"r{i}", (i + 1) * GIB, 1 + i) for i in range(3)]
    mixed = [replace(result, machine=builders.machine(builders.gpu())) for result in mixed]
    mixed += [case(f"v{i}", (i + 1) * GIB, 10 + i, vram=True) for i in range(2)]
    by_kind = {found.kind: found for found in tradeoff.panels(cells(*mixed))}
    assert {kind: sorted(places(found.drawing)) for kind, found in by_kind.items()} == {
        "RAM": ["r0/cpu", "r1/cpu", "r2/cpu"],
        "VRAM": ["v0/direct", "v1/direct"],
    }
    assert all(f"{kind} needed, GiB" in found.drawing for kind, found in by_kind.items())
    speeds = [re.findall(r'<text class="end" x="-8" y="(.+?)">(.+?)<', found.drawing) for found in by_kind.values()]
    assert speeds[0] == speeds[1]  # one scale of speed
    alone = [found.kind for found in tradeoff.panels(cells(*mixed[:4]))]
    assert alone == ["RAM"]


def test_only_measured_cases_that_work_are_points() -> None:
    works = [case("a", GIB, 10), case("b", 2 * GIB, 20)]
    others = [
        case("oom", GIB, 10, outcome=Outcome.OOM, stage="load"),
        case("slow", GIB, 0.0),
        case("odd", GIB, math.nan),
        case("endless", GIB, math.inf),
        case("none", 0, 5),
        replace(case("planned", GIB, 10), metrics={}, outcome=Outcome.SKIPPED, stage="plan", estimate=estimate(GIB, 1)),
    ]
    assert sorted(places(panel(*works, *others).drawing)) == ["a/cpu", "b/cpu"]
    assert tradeoff.panels(cells(works[0], *others)) == []
    assert overview(cells(works[0], *others)) is None
    assert overview([]) is None


def test_quality_is_a_shape_and_noise_a_ring() -> None:
    kinds = ("intact", "degraded", "broken", "not_measured", "not_compared")
    results = [case(kind, (i + 1) * GIB, 10 + i, kind) for i, kind in enumerate(kinds)]
    results[1] = replace(results[1], noisy={"decode_tok_s": "others took 2 of 4 cores"})
    links = read(str(panel(*results).drawing)).all("a")
    marks = {link.all("title")[0].text: [use.attrs["href"] for use in link.all("use")] for link in links}
    assert marks == {
        "intact/cpu: 1.00 GiB RAM, 10.0 tokens/s, intact": ["#q-intact"],
        "degraded/cpu: 2.00 GiB RAM, 11.0 tokens/s, noisy, degraded": ["#q-noisy", "#q-degraded"],
        "broken/cpu: 3.00 GiB RAM, 12.0 tokens/s, broken": ["#q-broken"],
        "not_measured/cpu: 4.00 GiB RAM, 13.0 tokens/s, not checked": ["#q-not-checked"],
        "not_compared/cpu: 5.00 GiB RAM, 14.0 tokens/s, not checked": ["#q-not-checked"],
    }
    shown = overview(cells(*results))
    assert shown
    assert shown.shapes == tradeoff.SHAPES
    assert shown.has_noise


@pytest.mark.parametrize(("size", "lines"), [(14 * GIB, 1), (11 * GIB, 0), (17 * GIB, 1)])
def test_a_capacity_in_reach_is_a_line(size: int, lines: int) -> None:
    found = panel(case("a", 10 * GIB, 1), case("b", size, 2))
    assert len(read(str(found.drawing)).all("line", look="capacity")) == lines
    assert ("16.0 GiB free" in found.drawing) == bool(lines)


def test_the_front_is_named_first_and_in_bold() -> None:
    names = read(str(panel(case("a", GIB, 10), case("b", 2 * GIB, 20), case("c", 3 * GIB, 5)).drawing)).all("g", look="names")[0]
    assert {text.text: "best" in text.attrs.get("class", "") for text in names.all("text")} == {
        "a/cpu": True,
        "b/cpu": True,
        "c/cpu": False,
    }


# Labels

MARKS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 300)), min_size=1, max_size=30)


@given(MARKS, st.lists(st.text("abé模", min_size=1, max_size=30), min_size=30, max_size=30), st.integers(0, 30))
def test_labels_overlap_neither_each_other_nor_a_point_nor_the_edge(
    at: list[tuple[float, float]], texts: list[str], wanted: int
) -> None:
    marks = [labels.mark(x, y) for x, y in at]
    taken = [labels.Box((0.5, -2), (0.5, 2), 0, 300)]
    found = labels.place(marks, dict(enumerate(texts[: min(wanted, len(marks))])), 300, taken)
    for width in labels.WIDTHS:
        shown = [label.box for label in found.values() if width > labels.WIDTHS[0] or not label.is_roomy]
        assert not any(labels.overlap(one, other, width) for one, other in combinations(shown, 2))
        assert not any(labels.overlap(box, mark, width) for box in shown for mark in (*marks, *taken))
        assert all(min(box.ends(width)[0], box.top) >= 0 for box in shown)
        assert all(box.ends(width)[1] <= width and box.bottom <= 300 for box in shown)


def test_a_label_stands_to_the_right_unless_that_is_taken() -> None:
    free = labels.place([labels.mark(0.5, 100)], {0: "int4"}, 300)[0]
    assert (free.anchor, free.dy, free.is_roomy) == ("start", 0, False)
    beside = labels.place([labels.mark(0.5, 100), labels.mark(0.55, 100)], {0: "int4"}, 300)[0]
    assert beside.anchor == "end"


def test_a_label_that_needs_room_is_for_wide_drawings_and_one_without_any_is_left_out() -> None:
    assert labels.place([labels.mark(0.5, 100)], {0: "x" * 33}, 300)[0].is_roomy
    assert labels.place([labels.mark(0.5, 100)], {0: "x" * 99}, 300) == {}


# Measured against predicted


def estimate(size: float, speed: float, *, spread: float = 0.2, tier: str = "cpu") -> Estimate:
    ends = {"low_bytes": int(size * (1 - spread)), "high_bytes": int(size * (1 + spread))}
    parts = dict.fromkeys(("weights_bytes", "kv_bytes", "activation_bytes", "overhead_bytes"), 0)
    found = TierEstimate(
        **parts, **ends, allocated_bytes=int(size), peak_bytes=int(size), load_peak_bytes=0, capacity_bytes=16 * GIB
    )
    span = Span(low=speed * (1 - spread), best=speed, high=speed * (1 + spread))
    return Estimate(tiers={tier: found}, load_s=span, first_token_s=span, decode_tok_s=span)


def planned(name: str, memory: float, speed: float, **changes: Any) -> Result:
    """A case that took so many times the memory and the speed that were predicted."""
    given: dict[str, Any] = {"estimate": estimate(4 * GIB, 10), "verdict": Verdict.FITS}
    return case(name, int(4 * GIB * memory), 10 * speed, **given | changes)


def checked(*results: Result) -> forecasts.Forecast:
    found = forecasts.forecast(cells(*results))
    assert found
    return found


def test_the_farthest_off_comes_first_and_every_mark_stands_where_its_ratio_is() -> None:
    found = checked(planned("near", 1.02, 0.97), planned("far", 1.0, 2.0), planned("mid", 0.8, 1.0))
    assert [row.name for row, _ in found.drawn] == ["far/cpu", "mid/cpu", "near/cpu"]
    at = {row.name: [float(read(str(mark)).all("circle")[0].attrs["cx"][:-1]) for mark in marks] for row, marks in found.drawn}
    wanted = {"far/cpu": (1.0, 2.0), "mid/cpu": (0.8, 1.0), "near/cpu": (1.02, 0.97)}  # the axis goes from 1/2.5 to 2.5
    for name, ratios in wanted.items():
        assert at[name] == pytest.approx([50 + 50 * math.log(ratio) / math.log(2.5) for ratio in ratios], abs=0.06)
    ends = read(str(found.drawn[0][1][0])).all("rect")[0].attrs
    assert float(ends["x"][:-1]) == pytest.approx(50 + 50 * math.log(0.8) / math.log(2.5), abs=0.06)
    assert float(ends["width"][:-1]) == pytest.approx(50 * math.log(1.2 / 0.8) / math.log(2.5), abs=0.06)


def test_the_sentence_counts_what_held() -> None:
    found = checked(planned("a", 1.02, 0.97), planned("b", 1.15, 2.0), planned("c", 1.3, 0.5))
    assert found.sentence.replace("\xa0", " ") == (
        "Memory: 1 of 3 within ±10 %, 2 inside the predicted interval. Speed: 1 of 3 within ±10 %, 1 inside the predicted interval."
    )
    assert [row.memory and row.memory.look for row in found.rows] == ["held", "held", "missed"]


@pytest.mark.parametrize(
    ("ratio", "off"), [(1.0, "0 %"), (1.051, "+5 %"), (0.851, "−15 %"), (2.0, "+100 %"), (3.14, "×3.1"), (0.25, "÷4.0")]
)
def test_how_far_off_is_said_in_percent_or_in_times(ratio: float, off: str) -> None:
    row = checked(planned("a", ratio, ratio), planned("b", 1, 1)).rows[0]
    assert row.memory
    assert row.speed
    assert (row.memory.off, row.speed.off) == (off, off)


def test_false_fits_and_refusals_come_first_and_are_named() -> None:
    fit = planned("fit", 1.1, 1, outcome=Outcome.OOM, stage="warm", verdict=Verdict.TIGHT)
    refusal = planned("refusal", 1.0, 1.01, verdict=Verdict.TOO_BIG)
    found = checked(planned("far", 1.9, 1.9), fit, refusal)
    assert [(row.name, row.surprise) for row, _ in found.drawn] == [
        ("fit/cpu", "false fit"),
        ("refusal/cpu", "false refusal"),
        ("far/cpu", ""),
    ]
    row = found.drawn[0][0]
    assert row.memory
    assert (row.memory.off, row.memory.look, row.speed) == ("≥ +10 %", "more", None)
    assert found.sentence.endswith("1 false fit, 1 false refusal.")
    assert found.sentence.startswith("Memory: 1 of 2 ")  # what ran out of memory says nothing of its peak


def test_the_process_is_held_to_the_interval_where_it_was_measured() -> None:
    on_gpu = [planned(name, 1, 1, vram=True, estimate=estimate(4 * GIB, 10, tier="gpu:0")) for name in ("a", "b")]
    on_gpu[0] = replace(on_gpu[0], metrics=on_gpu[0].metrics | {"vram_process_peak_bytes": 5 * GIB})
    process, allocated = (row.memory for row in checked(*on_gpu).rows)
    assert process
    assert allocated
    assert (process.figure.key, process.interval) == ("vram_process_peak_bytes", "3.20–4.80")
    assert (allocated.figure.key, allocated.interval) == ("vram_peak_bytes", "")
    assert (process.has_held, allocated.has_held) == (False, True)


def test_many_cases_are_all_in_the_table_and_the_farthest_off_are_drawn() -> None:
    found = checked(*(planned(f"p{i}", 1 + i / 100, 1) for i in range(60)))
    assert len(found.drawn) == forecasts.MOST_ROWS
    assert found.drawn[0][0].name == "p59/cpu"
    assert len(read(f"<table>{found.numbers}</table>").all("tr")) == 60


@pytest.mark.parametrize("ratio", [1e-9, 1e9])
def test_what_is_beyond_the_axis_stands_at_its_end(ratio: float) -> None:
    found = checked(planned("a", 1, ratio), planned("b", 1, 1))
    assert read(str(found.drawn[0][1][1])).all("circle")[0].attrs["cx"] in ("0%", "100%")


def test_predictions_that_are_no_numbers_are_not_drawn() -> None:
    for speed in (0.0, math.inf, math.nan):
        odd = [planned(name, 1, 1, estimate=estimate(0, speed)) for name in ("a", "b")]
        assert forecasts.forecast(cells(*odd)) is None
    assert forecasts.forecast(cells(planned("a", 1, 1))) is None


# The page


@pytest.fixture(scope="module")
def real() -> Node:
    lines = builders.GOLDEN.read_bytes().splitlines()
    return read(render.render([store.decode(line) for line in lines]))


def test_every_point_leads_to_its_case_and_every_drawing_has_a_name(real: Node) -> None:
    ids = [node.attrs["id"] for node in real.below() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    charts = real.all("svg", look="plot")
    assert len(charts) == 3
    for chart in charts:
        assert chart.attrs["role"] == "group"
        assert chart.attrs["aria-label"].startswith("Memory against speed")
        assert chart.attrs["aria-describedby"] in ids
        assert all(link.attrs["href"][1:] in ids and link.all("title")[0].text for link in chart.all("a"))
    for figure in (figure for part in real.all("div", look="overview") for figure in part.all("figure")):
        assert figure.attrs["aria-labelledby"] in ids
        assert figure.all("details", look="numbers")


def test_the_tables_say_what_the_drawings_show(real: Node) -> None:
    chart, table = real.all("svg", look="plot")[0], real.all("details", look="numbers")[0]
    titles = sorted(link.all("title")[0].text for link in chart.all("a"))
    assert titles
    rows = table.all("tbody")[0].all("tr")
    assert len(rows) == len(titles)
    kind = table.all("th", scope="col")[1].text.split()[0]
    for row in rows:
        name, size, speed, answers = (part.text for part in row.children if isinstance(part, Node))
        speed = speed.removeprefix("noisy ")
        assert any(title.startswith(f"{name}: {size} GiB {kind}, {speed} tokens/s") for title in titles)
        assert answers.partition(",")[0] in tradeoff.SHAPES


def test_hostile_names_stay_text_and_are_cut() -> None:
    results = [replace(planned(name, 1, 1), case=builders.case(f"{name}{HOSTILE}", HOSTILE)) for name in ("a", "b")]
    shown = overview(cells(*results))
    assert shown
    assert shown.forecast
    html = render.render(results)
    start = html.index('<div class="overview">')
    drawn = html[start : html.rindex("</div>", start, html.index("<h3>Machine and versions</h3>", start))]
    assert "<script" not in drawn
    assert "\u202e" not in drawn
    assert len(drawn) < 20_000
    assert len(read(drawn).all("a")) == 4


def test_a_point_takes_few_bytes() -> None:
    few, many = (
        overview(cells(*(case(f"int4-{i}", GIB + i * (GIB >> 7), 10 + i) for i in range(count))))
        for count in (tradeoff.MOST_NAMES, 216)
    )
    assert few
    assert many
    assert (len(many.panels[0].drawing) - len(few.panels[0].drawing)) / (216 - tradeoff.MOST_NAMES) < 155
