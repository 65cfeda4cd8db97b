"""Reports of measuring runs: a run replaces its own sections and keeps the others."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tests.accuracy import chart
from tests.accuracy.chart import Pair
from tests.support.reporting import Figure, Section, joined, sections_of, written


def test_a_report_is_taken_apart_as_it_was_put_together() -> None:
    sections = {"bench_b": "## B\n\ntext", "bench_a": "## A\n\n| a |\n|---|"}
    assert sections_of(joined("Heading", sections)) == sections
    assert joined("Heading", sections).index("## A") < joined("Heading", sections).index("## B")


def test_a_report_of_before_or_none_has_no_sections() -> None:
    assert sections_of("") == {}
    assert sections_of("# Heading\n\n| what |\n") == {}


def test_a_section_names_machine_and_versions_and_counts_rows_only_where_there_are_some() -> None:
    plain = written(Section("Title", [Figure(what="speed", found="1 s", wanted="2 s")], ["a note"]), "tox run -e x")
    assert "| what | found | wanted |" in plain
    assert "| speed | 1 s | 2 s |" in plain
    assert "python 3." in plain
    assert plain.endswith("a note")
    counted = written(Section("Title", [Figure(what="speed", found="1 s", wanted="2 s", rows=3)], []), "tox run -e x")
    assert "| speed | 3 | 1 s | 2 s |" in counted


def test_a_chart_has_a_point_for_each_pair_and_a_line_for_each_figure(tmp_path: Path) -> None:
    pairs = [
        Pair(case=f"<{case}>", figure=figure, estimated=2.0 * number, measured=2.5 * number)
        for number, case in enumerate(("tiny/fp16/cpu", "tiny/int8/cpu"), 1)
        for figure in ("peak RAM", "peak RAM & more")
    ]
    chart.write(tmp_path / "chart.svg", pairs, "GiB", 0.5)
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    said = [element.get("aria-label") or "" for element in root.iter()]
    assert {f"{pair.case}: {pair.figure}, estimated / measured 0.80" for pair in pairs} <= set(said)
    assert {"measured, GiB", "estimated, GiB", "peak RAM", "peak RAM & more"} <= {element.text for element in root.iter()}
