"""One measure of memory: bars, filters and figures of a case are equal on page, Markdown, JSON, CSV, site, terminal and plan.

Of every result that this repository publishes, and of results of cards: as they were measured, and where only what torch
allocated is known.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.metrics import format_metric
from harness.core.records import Phase, Result, Verdict, encode_record
from harness.core.redact import clean
from harness.core.units import GIB, KIB, format_size
from harness.measure import file_pages
from harness.report.export import data, summary
from harness.report.page import figures, view
from harness.report.planner.page import page_data
from harness.report.site.rows import rows_of
from harness.report.site.sitedata import Data
from harness.results import selection, store
from harness.results.needed import VRAM, completed, need_of, predicted_need, ram_needed, scarcest
from harness.results.register import PublishedResult
from harness.run import live
from tests.report.test_page import Node, rendered
from tests.support import builders
from tests.support.reporting import REPORTS

FILES = sorted(REPORTS.glob("*/results.jsonl"))


def of_cards(known: str) -> list[Result]:
    """Return results of a card; of `known` "torch", without what the whole process held."""
    found = [replace(one, case=replace(one.case, model=known)) for one in store.read(builders.GOLDEN)[0] if one.machine.gpus]
    if known == "torch":
        found = [replace(one, metrics={key: size for key, size in one.metrics.items() if key != VRAM}) for one in found]
    return found


def stored(file: Path) -> list[Result]:
    return list(store.read(file)[0])


SETS: dict[str, Callable[[], list[Result]]] = {file.parent.name: partial(stored, file) for file in FILES}
SETS |= {"cards": partial(of_cards, "process"), "cards by torch": partial(of_cards, "torch")}


@pytest.fixture(scope="module", params=SETS)
def results(request: pytest.FixtureRequest) -> list[Result]:
    return selection.newest(SETS[request.param]())


@pytest.fixture(scope="module")
def root(results: list[Result]) -> Node:
    return rendered(results)


def needs(results: list[Result]) -> dict[int, int]:
    """The bytes that each result needs, measured or planned, by its identity."""
    found = {}
    for result in results:
        need, planned = need_of(result), scarcest(result.estimate)
        if need:
            found[id(result)] = int(need.bytes)
        elif planned and not selection.ran(result):
            found[id(result)] = int(predicted_need(planned[1]).best)
    return found


def test_the_reports_have_something_to_say() -> None:
    assert len(FILES) >= 3


def shown_cells(results: list[Result]) -> Iterator[view.Cell]:
    for block in view.blocks(results):
        for matrix in block.matrices:
            yield from matrix.cells


def test_a_cell_its_bar_and_what_the_filter_reads_are_what_is_needed(results: list[Result], root: Node) -> None:
    known = needs(results)
    assert known
    drawn = {part.all("a")[0].attrs["href"]: part for part in root.all("td", look="cell") if part.all("a")}
    for cell in shown_cells(results):
        part, size = drawn[f"#{cell.anchor}"], known.get(id(cell.result))
        shown = [int(figure.attrs["value"]) for place in part.all("dd", look="need") for figure in place.all("data")]
        assert shown == ([] if size is None else [size]), cell.result.id
        memory = cell.memory
        if memory and size is not None and memory.capacity and not memory.predicted:
            most = max(size, memory.resident.number if memory.resident else 0, memory.capacity.number)
            firm = float(part.all("rect", look="firm")[0].attrs["width"].rstrip("%"))
            assert firm == pytest.approx(100 * size / most, abs=0.06), cell.result.id


def test_the_details_give_it_first_beside_the_plan_s(results: list[Result], root: Node) -> None:
    for cell in shown_cells(results):
        result = cell.result
        if "ram_needed_bytes" not in result.metrics:
            continue
        details = root.all("details", id=cell.anchor)[0]
        rows = {row.all("th")[0].text: row for row in details.all("tr") if row.all("th") and row.all("td")}
        values = [int(float(figure.attrs["value"])) for figure in rows["RAM needed"].all("data")]
        ram = result.estimate.tiers["cpu"] if result.estimate else None
        assert values == [int(result.metrics["ram_needed_bytes"]), *([predicted_need(ram).best] if ram else [])], result.id
        assert list(rows).index("RAM needed") < list(rows).index("peak RAM, resident")


def test_json_csv_site_and_the_terminal_say_the_same(results: list[Result]) -> None:
    exported = json.loads(data.render_json(results))
    table = list(csv.DictReader(io.StringIO(data.render_csv(results))))
    rows = rows_of(published(results))
    for result, plain, row, line in zip(results, exported["cases"], rows, table, strict=True):
        need = need_of(result)
        size = int(need.bytes) if need else None
        assert Data("").result(row)["needed_bytes"] == size
        assert (int(row.measured.need.number) if row.measured else None) == size
        if need and need.tier == "cpu":
            assert plain["metrics"]["ram_needed_bytes"] == size == int(line["ram_needed_bytes"])
        if need and result.outcome.value == "ok":
            assert f"  {format_size(need.bytes)} " in live.summary(result)
    by_case = {(result.id, result.case.workload, result.machine.name): result for result in results}
    assert len(by_case) == len(results)
    for answer in exported["answers"]:
        chosen = [result for result in results if result.id == answer["case"] and result.machine.name == answer["machine"]]
        sizes = {int(need.bytes) for one in chosen if (need := need_of(one))}
        assert answer["case"] is None or answer["needed_bytes"] in sizes


def published(results: list[Result]) -> list[PublishedResult]:
    return [PublishedResult(result=one, digest=f"{n:032x}", line=1) for n, one in enumerate(results)]


def test_the_planner_s_page_shows_each_sound_result_with_its_figures(results: list[Result]) -> None:
    rows = rows_of(published(results))
    receipts = {one["page"]: one for one in page_data(rows)["measured"]}
    sound = {row.page: row.result for row in rows if selection.is_sound(row.result) and need_of(row.result)}
    assert receipts.keys() == sound.keys()
    for page, result in sound.items():
        need, receipt = need_of(result), receipts[page]
        assert need
        speed = result.metrics.get("decode_tok_s")
        assert receipt["memory"] == format_size(need.bytes)
        assert receipt["kind"] == ("RAM" if need.tier == "cpu" else "VRAM")
        assert receipt["speed"] == ("" if speed is None else format_metric("decode_tok_s", speed))
        assert (receipt["model"], receipt["precision"], receipt["placement"]) == (
            result.case.model,
            result.case.precision,
            result.case.placement,
        )


def test_what_is_shared_says_the_same_as_what_was_measured(results: list[Result]) -> None:
    """What `share` sends and a site publishes is cleaned, and is read again from its line."""
    for result in results:
        sent = store.decode(encode_record(clean(result, Path("nowhere"))))
        assert (need_of(sent), figures.status(sent)) == (need_of(result), figures.status(result))
        assert sent.metrics == result.metrics
        assert selection.is_sound(sent) == selection.is_sound(result)


def test_markdown_says_the_same(results: list[Result]) -> None:
    text = summary.render_summary(results)
    for cell in shown_cells(results):
        need = need_of(cell.result)
        if need and cell.status.measured:
            assert f"{format_size(need.bytes)} of " in text, cell.result.id


def test_the_memory_of_a_card_is_the_whole_process_s_or_says_what_it_is_derived_from() -> None:
    whole, parts = ({one.id.partition("/")[2]: one for one in selection.newest(of_cards(known))} for known in ("process", "torch"))
    measured = {name: one for name, one in whole.items() if VRAM in one.metrics and parts[name].metrics.get("vram_peak_bytes")}
    assert len(measured) > 5
    for name, one in measured.items():
        exact, derived = need_of(one), need_of(parts[name])
        assert exact
        assert derived
        assert (exact.key, exact.how, exact.bytes) == (derived.key, "", one.metrics[VRAM])
        assert derived.bytes >= one.metrics["vram_peak_bytes"]
        is_known = derived.bytes > one.metrics["vram_peak_bytes"]
        said = r"and .+ for the CUDA context" if is_known else "without the CUDA context, which is not known"
        assert re.fullmatch(rf"what torch allocated, {said}", derived.how)


@pytest.mark.parametrize("known", ["process", "torch"])
def test_a_derived_figure_says_so_on_page_and_site(known: str) -> None:
    found = selection.newest(of_cards(known))
    marks = [mark.attrs["title"] for mark in rendered(found).all("em", look="doubt") if mark.text == "derived"]
    rows = rows_of(published(found))
    on_site = [row.measured.need.derived for row in rows if row.measured and row.measured.need.derived]
    derived = [need.how for one in found if (need := need_of(one)) and need.how]
    assert len(on_site) == len(derived)
    assert (known == "torch") == (len(derived) > 5)
    assert {*on_site, *marks} == set(derived)
    assert len(marks) >= 2 * len(derived)  # in the cell, and in the line of the case


def test_the_order_of_the_plans_and_of_what_was_measured_is_by_the_same_measure(results: list[Result]) -> None:
    for result in results:
        ram = result.estimate.tiers.get("cpu") if result.estimate else None
        if result.estimate is None or ram is None:
            continue
        assert figures.predictions(result.estimate)["ram_needed_bytes"] == predicted_need(ram)
        assert all(need.tier in result.estimate.tiers for need in [need_of(result)] if need and not need.how)
        need = need_of(result)
        if need and need.tier == "cpu" and result.verdict in (Verdict.FITS, Verdict.TIGHT):
            assert result.metrics["ram_anon_peak_bytes"] <= need.bytes <= result.metrics["ram_peak_bytes"]


def test_with_8_gib_chatglm_is_offered_in_int4_and_not_from_the_disk() -> None:
    (file,) = (file for file in FILES if file.parent.name == "full-size")
    found = [one for one in store.read(file)[0] if one.case.model == "chatglm-6b"]
    fitting = [one for one in found if selection.is_sound(one) and (need := need_of(one)) and need.bytes <= 8 * GIB]
    best = selection.best_result(fitting)
    assert best
    assert (best.case.precision, best.case.placement) == ("int4", "cpu")
    assert re.match(r"5\.\d", f"{(ram_needed(best) or 0) / GIB}")


# How it is measured


def phase(name: str, peak: int, anon: int) -> Phase:
    return Phase(name=name, start_s=0, end_s=1, ram_peak_bytes=peak, ram_anon_bytes=anon)


def measured(*phases: Phase, mapped: int | None, libraries: int | None = 5) -> Result:
    loaded = replace(builders.loaded(), mapped_bytes=mapped, library_bytes=libraries)
    metrics = {
        "ram_peak_bytes": float(max(one.ram_peak_bytes or 0 for one in phases)),
        "ram_anon_peak_bytes": float(max(one.ram_anon_bytes or 0 for one in phases)),
    }
    return completed(builders.result(loaded=loaded, phases=list(phases), metrics=metrics))


def test_mapped_weights_count_once_tokens_read_them_and_never_more_than_was_resident() -> None:
    assert measured(phase("load", 900, 300), phase("warm", 800, 100), mapped=0).metrics["ram_needed_bytes"] == 305
    assert measured(phase("load", 900, 300), phase("warm", 800, 100), mapped=400).metrics["ram_needed_bytes"] == 505
    assert measured(phase("load", 200, 90), phase("warm", 300, 100), mapped=400).metrics["ram_needed_bytes"] == 300


def test_where_the_system_does_not_tell_what_is_mapped_all_that_was_resident_counts() -> None:
    assert measured(phase("warm", 800, 100), mapped=None).metrics["ram_needed_bytes"] == 800


def test_no_phase_has_more_anonymous_memory_than_was_resident() -> None:
    found = measured(phase("load", 300, 400), phase("warm", 350, 200), mapped=0)
    assert [one.ram_peak_bytes for one in found.phases] == [400, 350]
    assert found.metrics["ram_peak_bytes"] == 400


def test_pages_of_files_are_read_from_the_system_s_own_words() -> None:
    found = file_pages.parse(
        "7f00-7f20 r-xp 00000000 08:01 42 /usr/lib/libc.so.6\nRss: 16 kB\nAnonymous: 4 kB\n"
        "7f20-7f30 rw-p 00001000 08:01 42 /usr/lib/libc.so.6\nRss: 8 kB\nAnonymous: 8 kB\n"
        "a000-b000 rw-p 00000000 00:00 0 [heap]\nRss: 100 kB\nAnonymous: 100 kB\n"
        "c000-d000 rw-s 00000000 00:05 7 /dev/shm/torch_1 (deleted)\nRss: 64 kB\n"
        "e000-f000 r--s 00000000 08:01 9 /models/a b.safetensors\nRss: 512 kB\n"
    )
    assert [(one.path, one.executable, one.resident_bytes // KIB) for one in found] == [
        ("/usr/lib/libc.so.6", True, 12),
        ("/usr/lib/libc.so.6", False, 0),
        ("/models/a b.safetensors", False, 512),
    ]
    assert file_pages.library_bytes(found) == 12 * KIB
    assert [file_pages.lies_in_file(address, found) for address in (0xE800, 0xA800, 0xC800, 0x10000)] == [True, False, False, False]


def test_this_process_runs_from_libraries() -> None:
    found = file_pages.own_mappings()
    if found is None:
        pytest.skip("this system has no /proc")
    assert file_pages.library_bytes(found) > KIB
