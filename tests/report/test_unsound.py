"""A case whose answers broke or whose check failed is no "works", wherever it is shown."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import msgspec
import pytest

from harness.core.records import Outcome, Quality, Result
from harness.report.export import data, summary
from harness.report.page import render
from harness.report.page.figures import STATUSES, status
from harness.report.page.view import blocks
from harness.report.site.rows import rows_of
from harness.results.register import PublishedResult
from harness.run import live
from tests.report.test_page import read
from tests.support import builders

replace = msgspec.structs.replace
BROKEN = Quality(probe="1", verdict="broken", why="a perplexity of 507, and 0 of 10 answers")
SAID = "int4 did not take effect"
FIGURES = {"decode_tok_s": 20.0, "ram_anon_peak_bytes": 2.0 * (1 << 30), "ram_peak_bytes": 2.0 * (1 << 30)}

CASES: dict[str, dict[str, Any]] = {
    "answers broken": {"quality": BROKEN},
    "check failed": {"checks": {"precision": SAID}},
}
WORDS = pytest.mark.parametrize("word", CASES)


def made(word: str) -> Result:
    return replace(builders.result(builders.case(), metrics=FIGURES), outcome=Outcome.OK, **CASES.get(word, {}))


@WORDS
def test_its_status_is_its_own_and_the_filter_has_it(word: str) -> None:
    found = status(made(word))
    assert (found.word, found.measured) == (word, True)
    assert found in STATUSES
    assert len({entry.look for entry in STATUSES}) == len(STATUSES)


def test_broken_answers_are_said_before_a_failed_check() -> None:
    assert status(replace(made("answers broken"), checks={"precision": SAID})).word == "answers broken"


def test_a_check_that_found_nothing_and_sound_answers_work() -> None:
    assert status(replace(made(""), checks={"precision": "ok"})).word == "works"


@WORDS
def test_the_page_has_no_tick_for_it_and_counts_it_apart(word: str) -> None:
    page = read(render.render([made(word)]))
    assert "i-works" not in {use.attrs["href"].lstrip("#") for use in page.all("use")}
    (block,) = blocks([made(word)])
    assert [(entry.word, count) for entry, count in block.matrices[0].counts] == [(word, 1)]
    (cell,) = page.all("td", look="cell")
    assert word in cell.text
    assert "20.0 tokens/s" in cell.text, "what was measured is still shown"
    assert page.all("details", look="case")[0].text.count("works") == 0


@WORDS
def test_markdown_has_no_tick_for_it(word: str) -> None:
    text = summary.render_summary([made(word)])
    assert "✅" not in text
    assert f"⚠️ **{word}**" in text or f"⚠️ {word}" in text
    assert "ran but did not work, or failed a check" in text


@WORDS
def test_json_and_csv_say_it(word: str) -> None:
    (case,) = json.loads(data.render_json([made(word)]))["cases"]
    (row,) = csv.DictReader(io.StringIO(data.render_csv([made(word)])))
    assert (case["status"], row["status"]) == (word, word)


@WORDS
def test_a_site_does_not_count_it_among_what_works(word: str) -> None:
    (row,) = rows_of([PublishedResult(result=made(word), digest="0" * 8, line=1)])
    assert (row.works, row.status.word) == (False, word)


@WORDS
def test_the_line_of_a_run_begins_with_it(word: str) -> None:
    assert live.summary(made(word)).startswith(word)
