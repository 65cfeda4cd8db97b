"""Reports as Markdown, JSON and CSV: what they say is what the store holds, and hostile names stay text."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from markdown_it import MarkdownIt

from harness.cli.entry import main
from harness.core.metrics import METRICS, format_metric
from harness.core.records import Case, Outcome, Result, Verdict, encode_record
from harness.core.text import visible
from harness.core.units import GIB, MIB
from harness.report.export import data, summary
from harness.report.export.formats import FORMATS
from harness.report.page.view import blocks
from harness.report.terminal import output
from harness.results import selection, store
from harness.results.needed import need_of
from tests.support.builders import GOLDEN, case, gpu, machine, result

EVIL = "<script>alert(1)</script>|`*x*\u202e\n@everyone [a](https://a.example)"
FORMULA = '=HYPERLINK("http://a.example","x")'


@pytest.fixture(scope="module")
def golden() -> list[Result]:
    return store.read(GOLDEN)[0]


def worked(precision: str = "int8", placement: str = "cpu", **changes: Any) -> Result:
    metrics = {"ram_peak_bytes": 2.0 * GIB, "decode_tok_s": 20.123456789012345, "ready_s": 4.5}
    return result(case(precision, placement), metrics=metrics | changes.pop("metrics", {}), **changes)


def hostile(name: str) -> Result:
    """A result every text of which is the name."""
    of = Case(model=name, precision=name, placement=name)
    return result(
        of, machine=msgspec.structs.replace(machine(), name=name, cpu=name), outcome=Outcome.CRASH, why=name, stage=name,
        checks={name: name}, environment={"python": name}, code=name,
    )  # fmt: skip


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


# Markdown


def test_markdown_gives_the_answer_then_the_matrix_then_what_was_not_measured(golden: list[Result]) -> None:
    text = summary.render_summary(golden)
    block = blocks(golden)[0]
    best = block.matrices[0].best
    assert best is not None
    order = ["### `chatglm-6b` on", f"**Use {best.result.case.precision} with placement", "| precision |", "not measured", "<sub>"]
    places = [text.index(piece) for piece in order]
    assert all(here < there for here, there in pairwise(places))
    answer = text.splitlines()[text.splitlines().index("### `chatglm-6b` on RTX 3060 12GB, 31.3 GiB RAM") + 2]
    need = need_of(best.result)
    assert need
    assert format_metric(need.key, need.bytes) in answer
    for key in ("ready_s", "decode_tok_s"):
        assert format_metric(key, best.result.metrics[key]) in answer
    assert f"{block.facts[0][0]} {block.facts[0][1]}" in text


def test_every_case_of_the_matrix_stands_in_the_table_with_its_figures(golden: list[Result]) -> None:
    text = summary.render_summary(golden)
    for block in blocks(golden):
        for heading, cells in block.matrices[0].rows:
            line = next(
                line for line in text.splitlines() if line.startswith(f"| `{heading.name}` |") and len(cells) == line.count("|") - 2
            )
            for cell, written in zip(cells, line.split(" | ")[1:], strict=True):
                assert cell is not None
                assert cell.status.word in written
                assert cell.status.look != "works" or cell.speed.text in written


def test_each_size_of_card_has_its_answer() -> None:
    card = gpu()
    big, small = 12 * GIB, 6 * GIB
    fits = [
        result(
            Case(model="m", precision=name, placement="direct", vram_bytes=size), machine=machine(card), outcome=outcome,
            verdict=verdict, stage="done" if outcome is Outcome.OK else "plan",
            metrics={"vram_peak_bytes": 5.0 * GIB, "decode_tok_s": 9.0} if outcome is Outcome.OK else {},
        )
        for name, size, outcome, verdict in (
            ("bf16", big, Outcome.OK, Verdict.FITS), ("bf16", small, Outcome.SKIPPED, Verdict.TOO_BIG),
        )
    ]  # fmt: skip
    text = summary.render_summary(fits)
    assert "| precision | `direct@vram6GiB` | `direct@vram12GiB` |" in text
    assert "- vram12GiB: Use bf16 with placement direct" in text
    assert "- vram6GiB: Nothing works: 1 × too big." in text


@pytest.mark.parametrize(
    "name", [EVIL, FORMULA, "x" * 10_000, "| a |\n|---|", "</details><h1>", "``` \n# h"], ids=lambda name: name[:8]
)
def test_hostile_names_stay_text_in_markdown(name: str) -> None:
    text = summary.render_summary([hostile(name), worked()], [name])
    assert "\u202e" not in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inner = [child for token in tokens for child in token.children or []]
    assert not [token for token in inner if token.type in ("link_open", "image")]
    pieces = {token.content for token in inner if token.type == "html_inline"}
    assert pieces <= {"<br>", "<sub>", "</sub>"}
    for token in tokens:
        if token.type == "html_block":
            assert token.content.startswith(("<details><summary>", "</details>")), token.content
            assert "h1" not in token.content
            assert "script" not in token.content
    tables = [token for token in tokens if token.type == "table_open"]
    assert len(tables) == 2
    assert sum(token.type == "heading_open" for token in tokens) == 3


def test_a_summary_stays_below_the_limit_of_a_job_and_says_so() -> None:
    many = [
        msgspec.structs.replace(
            worked(str(number), code="x = 1\n" * 50), machine=msgspec.structs.replace(machine(), name=f"m{number}")
        )
        for number in range(2500)
    ]
    text = summary.render_summary(many)
    assert len(text.encode()) < MIB
    assert "Truncated here" in text
    assert text.rstrip().endswith("shows everything on a page.")
    assert "Truncated here" not in summary.render_summary(many[:50])


def test_a_cell_says_only_what_there_is() -> None:
    text = summary.render_summary([worked(), msgspec.structs.replace(hostile("x"), machine=machine())])
    assert "| `int8` | ✅ **works** ⭐<br>2.00 GiB of 16.0 GiB RAM<br>20.1 tokens/s |" in text
    assert "| `x` | 💥 crashed |" in text
    assert "<sub>Newest result 2026-11-24T08:00:00Z.</sub>" in text


def test_no_results_say_how_to_make_some() -> None:
    assert "pytest cases/ --model MODEL" in summary.render_summary([])


# JSON


def test_json_holds_the_newest_result_of_each_case_under_the_names_of_the_records(golden: list[Result]) -> None:
    found = json.loads(data.render_json(golden, ["one line is none"]))
    assert found["schema"] == data.EXPORT_SCHEMA
    assert found["problems"] == ["one line is none"]
    newest = selection.newest(golden)
    assert [entry["id"] for entry in found["cases"]] == [one.id for one in newest]
    for entry, one in zip(found["cases"], newest, strict=True):
        plain = msgspec.to_builtins(one)
        assert entry["metrics"] == plain["metrics"]
        assert entry["estimate"] == plain["estimate"]
        assert entry["workload"] == plain["case"]["workload"]
    assert {entry["name"] for entry in found["machines"]} == {one.machine.name for one in golden}
    chosen = found["answers"][0]
    assert (chosen["case"], chosen["machine"]) == ("chatglm-6b/int4/direct", "RTX 3060 12GB, 31.3 GiB RAM")
    one = next(one for one in newest if one.id == chosen["case"])
    need = need_of(one)
    assert need
    assert chosen["needed_bytes"] == chosen["peak_bytes"] == int(need.bytes)
    assert chosen["decode_tok_s"] == one.metrics["decode_tok_s"]
    assert chosen["code"] == one.code


def test_json_is_ascii_and_has_null_for_what_is_no_number() -> None:
    text = data.render_json([worked(metrics={"load_s": math.inf, "kl": math.nan}), hostile(EVIL)])
    assert text.isascii()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["cases"][0]["metrics"]["load_s"] is None
    assert found["cases"][1]["model"] == EVIL


def test_what_a_command_prints_for_programs_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    undecodable = os.fsdecode(b"\xff\xfe")
    output.print_json({"figures": [math.inf, -math.inf, math.nan, 0.1], "names": (EVIL, undecodable)})
    text = capsys.readouterr().out
    assert text.isascii()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found == {"figures": [None, None, None, 0.1], "names": [EVIL, undecodable]}


def test_json_has_the_letters_that_python_writes() -> None:
    value = {"none": [[], {}, ""], "small": [1e-05, -0.0, 1e16, 1 / 3], EVIL: {"": [{"deep": [None, True, '\u2028"\\']}]}}
    assert output.json_text(value) == json.dumps(value, indent=2)


def test_nothing_that_works_is_a_null_and_a_sentence() -> None:
    (answer,) = json.loads(data.render_json([worked(outcome=Outcome.OOM, stage="load")]))["answers"]
    assert answer["case"] is None
    assert answer["said"] == "Nothing works: 1 × out of memory."


# CSV


def test_csv_has_a_row_for_each_case_with_all_digits(golden: list[Result]) -> None:
    text = data.render_csv(golden)
    assert text.count("\r\n") == text.count("\n") == len(selection.newest(golden)) + 1
    found = rows(text)
    assert tuple(found[0]) == data.COLUMNS
    for row, one in zip(found, selection.newest(golden), strict=True):
        assert row["id"] == one.id
        assert {key: float(row[key]) for key in METRICS if row[key]} == {
            key: one.metrics[key] for key in METRICS if key in one.metrics
        }
        if one.estimate:
            assert float(row["predicted_load_s"]) == one.estimate.load_s.best
    assert {row["id"] for row in found if row["recommended"] == "yes"} == {"chatglm-6b/int4/direct", "smollm2-135m/bf16/cpu"}


def test_csv_leaves_out_what_is_no_number() -> None:
    (row,) = rows(data.render_csv([worked(metrics={"load_s": math.inf, "kl": math.nan, "perplexity": -0.5})]))
    assert (row["load_s"], row["kl"], row["perplexity"], row["ram_peak_bytes"]) == ("", "", "-0.5", str(2 * GIB))
    assert float(row["decode_tok_s"]) == 20.123456789012345


@pytest.mark.parametrize(
    "name", [FORMULA, "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", " =1", "\t=1", "\uff1d1", EVIL, 'a,"b"\r\nc', "x" * 10_000]
)
def test_csv_is_no_formula_and_one_row_whatever_the_names(name: str) -> None:
    text = data.render_csv([hostile(name)])
    assert text.count("\n") == 2
    (row,) = rows(text)
    assert row["model"].lstrip("'") == visible(name).replace("\n", "␤").replace("\t", "␉")
    assert not [value for value in row.values() if value.lstrip().startswith(("=", "+", "-", "@", "\uff1d"))]


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / store.NAME).write_bytes(GOLDEN.read_bytes())
    return tmp_path


def test_a_format_goes_to_standard_output_and_nothing_else_does(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    results = store.read(GOLDEN)[0]
    for name in ("md", "json", "csv"):
        assert main(["report", str(folder), "--format", name]) == 0
        assert capsysbinary.readouterr() == (FORMATS[name].render(results, []).encode(), b"")
    assert [path.name for path in folder.iterdir()] == [store.NAME]


def test_without_a_directory_it_is_the_one_where_a_run_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "fitmatrix-results/results.jsonl: no results here" in capsys.readouterr().err
    (tmp_path / "fitmatrix-results").mkdir()
    (tmp_path / "fitmatrix-results" / store.NAME).write_bytes(encode_record(worked()) + b"\n")
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "page: fitmatrix-results/index.html\n"


def test_several_formats_go_to_files_by_their_endings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: folder / "out" / f"r.{name}" for name in ("csv", "md", "json")}
    outputs = [word for path in files.values() for word in ("--output", str(path))]
    assert main(["report", str(folder), *outputs, "--html", str(folder / "p.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"page: {folder / 'p.html'}", *(f"{name}: {files[name]}" for name in ("md", "json", "csv"))]
    assert rows(files["csv"].read_bytes().decode())[0]["model"] == "chatglm-6b"
    assert json.loads(files["json"].read_text(encoding="utf-8"))["schema"] == 1
    assert not (folder / "index.html").exists()


def test_one_format_and_one_file_need_no_ending(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--format", "json", "--output", str(folder / "x.txt")]) == 0
    assert json.loads((folder / "x.txt").read_text(encoding="utf-8"))
    assert main(["report", str(folder), "--format", "html", "--format", "md"]) == 0
    shown = capsys.readouterr()
    assert "### `chatglm-6b`" in shown.out
    assert shown.err == f"page: {folder / 'index.html'}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "md", "--format", "csv"], "--format md and csv would both go to standard output"),
        (["--output", "x.txt"], "--output x.txt: unknown format"),
        (["--output", "x.md", "--output", "y.md"], "are both md"),
        (["--html", "a.html", "--output", "b.html"], "both name the page"),
        (["--format", "md", "--badge", "b.svg"], "there are 2 badges, not one"),
        (["--format", "csv", "--output", "."], "the csv cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_sentence(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["report", ".", *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_lines_that_are_none_are_told_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / store.NAME).write_bytes(b"\n".join([encode_record(worked()), b"{torn", b""]))
    for name in ("md", "json", "csv"):
        assert main(["report", str(tmp_path), "--format", name]) == 0
        shown = capsys.readouterr()
        assert "not a result, set aside" in shown.err
        assert name == "csv" or "not a result, set aside" in shown.out
