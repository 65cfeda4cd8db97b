"""The site of many machines: every link leads somewhere, every figure is the store's, and no name becomes a path or markup."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import entry as cli
from harness.core.records import Case, Machine, Outcome, Result, Tier, Verdict, encode_record
from harness.core.units import GIB
from harness.report import tasks
from harness.report.planner.page import page_data
from harness.report.site import atlas, choices, pages, rows
from harness.report.site.sitedata import Data
from harness.results import audit, store
from harness.results.register import Joined, PublishedResult, entry_of
from tests.report.test_page import Node, programs, read
from tests.support import builders

ROOT = Path(__file__).parents[2]
replace = msgspec.structs.replace


def dated(result: Result, year: int = 2024) -> Result:
    """Move a result of the golden file to a past that is past on any clock."""
    return replace(result, at=result.at.replace("2026", str(year)))


@pytest.fixture(scope="module")
def golden() -> list[Result]:
    return [dated(result) for result in store.read(builders.GOLDEN)[0]]


def save(folder: Path, results: Iterable[Result]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in results))
    return folder


def upgraded(results: Iterable[Result], torch: str, factor: float) -> Iterator[Result]:
    """Run the same cases again with another torch, `factor` times as fast."""
    for result in results:
        if result.outcome is Outcome.OK and result.metrics and result.case.placement == "direct":
            speed = {key: value * factor for key, value in result.metrics.items() if key == "decode_tok_s"}
            samples = {key: [one * factor for one in values] for key, values in result.samples.items() if key == "decode_tok_s"}
            yield replace(
                result,
                run=f"{result.run} torch {torch}",
                at="2024-12-01T00:00:00Z",
                metrics=result.metrics | speed,
                samples=result.samples | samples,
                environment=result.environment | {"torch": torch},
            )


def emulated(result: Result, size: int, **changes: Any) -> Result:
    case = replace(result.case, vram_bytes=size)
    return replace(result, case=case, id=case.id, run=f"emulated {size}", **changes)


def on_another(results: Iterable[Result], model: str) -> Iterator[Result]:
    """Give results to a machine with a larger card and a model of another name."""
    for result in results:
        if result.machine.gpus and result.case.placement in ("direct", "auto"):
            tiers = [
                replace(tier, total_bytes=24 * GIB, model="RTX 4090") if tier.kind == "gpu" else tier
                for tier in result.machine.tiers
            ]
            case = replace(result.case, model=model)
            machine = replace(result.machine, name="RTX 4090 24GB, 31.3 GiB RAM", tiers=tuple(tiers))
            yield replace(result, case=case, id=case.id, machine=machine, run=f"{result.run}-4090")


@pytest.fixture(scope="module")
def artifacts(golden: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    save(folder / "golden", golden)
    save(folder / "again/gpu", [*golden[:5], *upgraded(golden, "2.12.0", 1.5)])
    direct = next(r for r in reversed(golden) if r.case.id == "chatglm-6b/int4/direct" and r.outcome is Outcome.OK)
    oom: dict[str, Any] = {"outcome": Outcome.OOM, "stage": "load", "metrics": {}, "samples": {}, "phases": [], "quality": None}
    save(folder / "emulated", [emulated(direct, 8 * GIB), emulated(direct, 4 * GIB, **oom)])
    save(folder / "another", on_another(golden, "Qwen/Qwen2.5-7B"))
    return folder


@pytest.fixture(scope="module")
def built(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("built") / "site"
    assert cli.main(["publish", str(artifacts), "--to", str(place)]) == 0
    return place


def read_pages(place: Path) -> dict[Path, Node]:
    return {file: read(file.read_text(encoding="utf-8")) for file in sorted(place.rglob("*.html"))}


def targets(root: Node) -> list[str]:
    return [node.attrs[key] for node in root.below() for key in ("href", "src") if key in node.attrs]


def check_links(place: Path) -> int:
    """Follow every link of every page and of every JSON; return how many there are."""
    found, seen = read_pages(place), 0
    ids = {file: {node.attrs["id"] for node in root.below() if "id" in node.attrs} for file, root in found.items()}
    for file, root in found.items():
        for target in targets(root):
            if target == "data:,":
                continue
            path, _, fragment = target.partition("#")
            assert not re.match(r"[a-z]+:|/", target), f"{file}: {target} is not relative"
            leads = (file.parent / path).resolve() if path else file
            assert leads.is_file(), f"{file}: {target}"
            assert leads.is_relative_to(place.resolve())
            assert not fragment or fragment in ids.get(leads, ids.get(file, set())), f"{file}: {target}"
            seen += 1
    for file in place.rglob("*.json"):
        for target in json_links(json.loads(file.read_text())):
            assert (file.parent / target).is_file(), f"{file}: {target}"
            seen += 1
    return seen


def json_links(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (inner for key, inner in value.items() if key in ("page", "raw"))
        for inner in value.values():
            yield from json_links(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from json_links(inner)


def test_every_link_leads_to_a_file_of_the_site(built: Path) -> None:
    assert check_links(built) > 500


def test_every_page_can_be_reached_from_the_index(built: Path) -> None:
    found, reached, todo = read_pages(built), set[Path](), [built / "index.html"]
    while todo:
        file = todo.pop()
        if file in reached or file not in found:
            continue
        reached.add(file)
        todo += [(file.parent / target.partition("#")[0]).resolve() for target in targets(found[file]) if ":" not in target]
    assert reached == set(found)


def test_every_figure_leads_to_its_case_on_a_page_and_from_there_to_the_result_that_holds_it(built: Path) -> None:
    found, seen = read_pages(built), 0
    for file, root in found.items():
        for link in root.all("a", look="raw"):
            seen += same_figures(link, store.decode(raw_line(file, link)), file)
        for link in root.all("a", look="fig"):
            page, _, mark = link.attrs["href"].partition("#")
            there = (file.parent / page).resolve()
            line = next(row for row in found[there].all("tr") if row.attrs.get("id") == mark)
            raw = next(one for one in line.all("a", look="raw") if one.attrs.get("aria-label", "").startswith("raw result of"))
            result = store.decode(raw_line(there, raw))
            seen += same_figures(link, result, file) + same_figures(line, result, there)
        if file.parent.name != "machines":
            linked = {id(figure) for look in ("raw", "fig") for link in root.all("a", look=look) for figure in link.all("data")}
            assert all(id(figure) in linked for figure in root.all("data") if "data-key" in figure.attrs), file
    assert seen > 100


def raw_line(file: Path, link: Node) -> bytes:
    """Return the line that a link to a raw result names, in the file that it leads to."""
    (number,) = re.findall(r"^line (\d+)$", link.attrs.get("title") or link.text)
    return (file.parent / link.attrs["href"]).read_bytes().splitlines()[int(number) - 1]


def same_figures(link: Node, result: Result, file: Path) -> int:
    """Hold the figures of a link, or of a row, against a result; return how many there are."""
    figures = [figure for figure in link.all("data") if figure.attrs.get("data-key")]
    for figure in figures:
        assert result.metrics[figure.attrs["data-key"]] == float(figure.attrs["value"]), f"{file}: {result.id}"
    return len(figures)


@pytest.mark.parametrize(("verdict", "is_sound"), [("intact", True), ("degraded", False), ("broken", False)])
def test_a_way_on_the_front_door_is_sound_where_its_answers_are(golden: list[Result], verdict: str, is_sound: bool) -> None:
    result = next(one for one in golden if one.outcome is Outcome.OK and one.quality)
    assert result.quality is not None
    judged = replace(result, quality=replace(result.quality, verdict=verdict))
    (row,) = rows.rows_of([PublishedResult(result=judged, digest="0", line=1)])
    (shown,) = read(choices.write_choice(row)).all("tr")
    assert ("data-sound" in shown.attrs) is is_sound
    assert verdict in shown.text


@pytest.mark.parametrize("weights", ["real", "synthetic"])
def test_the_front_door_says_which_weights_are_synthetic(golden: list[Result], weights: str) -> None:
    result = replace(next(one for one in golden if one.outcome is Outcome.OK), weights=weights)
    (row,) = rows.rows_of([PublishedResult(result=result, digest="0", line=1)])
    assert ("synthetic weights" in choices.write_choice(row)) is (weights == "synthetic")
    assert page_data([row])["measured"][0]["synthetic"] is (weights == "synthetic")


def test_the_front_door_lists_each_way_that_is_worth_choosing(built: Path) -> None:
    """What needs less and is as fast and answers as well leaves no reason for another; a way that works nowhere is not there."""
    index = read((built / "index.html").read_text(encoding="utf-8"))
    assert index.all("h2")[0].text == "What runs on my card"
    ways = [row for row in index.all("tr") if "data-of" in row.attrs]
    assert {row.attrs["data-kind"] for row in ways} == {"VRAM", "RAM"}
    for one, other in itertools.permutations(ways, 2):
        if all(one.attrs[key] == other.attrs[key] for key in ("data-of", "data-kind")):
            is_as_good = float(one.attrs["data-need"]) <= float(other.attrs["data-need"])
            is_as_good &= float(one.attrs["data-speed"]) >= float(other.attrs["data-speed"])
            is_as_good &= "data-sound" in one.attrs or "data-sound" not in other.attrs
            assert not is_as_good, (one.text, other.text)


def test_the_json_of_a_machine_holds_its_results_as_the_store_does(built: Path, artifacts: Path) -> None:
    given = {encode_record(one) for file in artifacts.rglob(store.NAME) for one in store.read(file)[0]}
    files = list((built / "raw").iterdir())
    assert len(files) == len(list((built / "machines").glob("*.html")))
    raw = [line for file in files for line in file.read_bytes().splitlines() if store.decode(line)]
    assert (len(raw), set(raw)) == (len(given), given)
    seen = set()
    for file in (built / "machines").glob("*.json"):
        told = json.loads(file.read_text())
        assert told["schema"] == pages.SITE_SCHEMA
        for one in told["results"]:
            line = (file.parent / one["raw"]).read_bytes().splitlines()[one["line"] - 1]
            result = store.decode(line)
            assert one["metrics"] == result.metrics
            assert (one["id"], one["run"], one["outcome"]) == (result.id, result.run, result.outcome.value)
            assert one["environment"] == result.environment
            seen.add(line)
    assert seen == given


def test_beside_every_page_lies_its_data(built: Path) -> None:
    for file in built.rglob("*.html"):
        told = json.loads(file.with_suffix(".json").read_text())
        assert told["schema"] == pages.SITE_SCHEMA
        assert file.with_suffix(".json").name in targets(read(file.read_text(encoding="utf-8")))


def test_no_page_may_load_or_run_anything_else(built: Path) -> None:
    for file, root in read_pages(built).items():
        text = file.read_text(encoding="utf-8")
        (policy,) = root.all("meta", http_equiv="Content-Security-Policy")
        assert policy.attrs["content"].startswith("default-src 'none';")
        assert len(programs(root)) == 1
        assert "url(" not in text
        assert "http:" not in text.replace("http-equiv", "")


def test_pages_are_read_in_order_with_a_title_heads_and_captions(built: Path) -> None:
    for file, root in read_pages(built).items():
        levels = [int(node.tag[1]) for node in root.below() if re.fullmatch("h[1-6]", node.tag)]
        assert levels[0] == 1, file
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert all(table.all("caption") for table in root.all("table", look="list"))
        assert all("scope" in head.attrs for head in root.all("th"))
        ids = [node.attrs["id"] for node in root.below() if "id" in node.attrs]
        assert len(ids) == len(set(ids)), file


def page_of(built: Path, name: str) -> Node:
    return read((built / name).read_text(encoding="utf-8"))


def test_a_model_says_which_card_it_needs(built: Path) -> None:
    root = page_of(built, "models/chatglm-6b.html")
    answer = root.all("div", look="answer")[0].text
    assert "A card with 8 GiB works: int4, direct takes 5.61 GiB VRAM" in answer
    assert "( NVIDIA GeForce RTX 3060 limited to 8 GiB by --vram)" in answer
    assert "predicted A card with 6 GiB should do: int4, direct takes 5.61 GiB (measured)." in answer
    told = json.loads((built / "models/chatglm-6b.json").read_text())
    by_size = {one["card_bytes"] // GIB: one for one in told["cards"]}
    assert (by_size[4]["measured"], by_size[4]["works"]) == (True, False)
    assert (by_size[6]["measured"], by_size[6]["predicted"]["precision"]) == (False, "int4")
    assert (by_size[8]["measured"], by_size[8]["works"]) == (True, True)
    assert (by_size[16]["predicted"]["measured"], by_size[16]["predicted"]["basis"]) == (False, "predicted by the plan")
    rows = {row.all("th")[0].text: row for row in root.all("table")[0].all("tr")[1:]}
    assert "should fit" in rows["6 GiB"].text
    assert "out of memory" in rows["4 GiB"].text
    assert "guessed" in rows["16 GiB"].attrs["class"]


def test_a_card_says_what_runs_on_it_and_what_should(built: Path) -> None:
    (file,) = (built / "cards").glob("8-gib*.html")
    root = read(file.read_text(encoding="utf-8"))
    assert root.all("h1")[0].text == "8 GiB, emulated on NVIDIA GeForce RTX 3060"
    rows = {row.all("th")[0].text: row.text for row in root.all("table")[0].all("tr")[1:]}
    assert "works int4, direct 5.61 GiB VRAM" in rows["chatglm-6b"]
    assert "should fit int4, direct" in rows["Qwen/Qwen2.5-7B"]


def test_a_trend_follows_a_case_over_versions(built: Path) -> None:
    trends = json.loads((built / "models/chatglm-6b.json").read_text())["trends"]
    int8 = next(trend for trend in trends if trend["id"] == "chatglm-6b/int8/direct")
    assert int8["change"] == pytest.approx(0.5)
    assert int8["versions"][-1]["changed"] == ["torch 2.12.0"]
    root = page_of(built, "models/chatglm-6b.html")
    shown = next(node for node in root.all("details", look="trend") if "int8, direct" in node.text)
    assert "+50.0 %" in shown.text
    assert len(shown.all("svg", look="spark")[0].all("path")) == 2
    assert [row.all("th")[0].text for row in shown.all("tbody")[0].all("tr")][-1] == "2024-12-01"


def test_the_page_of_a_machine_is_that_of_report(built: Path) -> None:
    (file,) = (built / "machines").glob("rtx-3060*.html")
    root = read(file.read_text(encoding="utf-8"))
    assert root.all("table", look="matrix")
    assert len(root.all("a", look="raw")) > 30


def test_the_provenance_names_each_file_and_what_came_of_it(built: Path) -> None:
    told = json.loads((built / "provenance.json").read_text())
    by_name = {source["name"].partition("/")[2]: source for source in told["sources"]}
    assert by_name["golden/results.jsonl"]["repeated"] + by_name["again/gpu/results.jsonl"]["repeated"] == 5
    assert told["refused"] == []
    text = page_of(built, "provenance.html").text
    assert "nothing was refused" in text
    assert all(name in text for name in by_name)


def test_the_same_results_make_the_same_site(built: Path, artifacts: Path, tmp_path: Path) -> None:
    assert cli.main(["publish", *map(str, sorted(artifacts.iterdir(), reverse=True)), "--to", str(tmp_path / "site")]) == 0
    for file in built.rglob("*"):
        if file.is_file() and file.stem != "provenance":
            again = tmp_path / "site" / file.relative_to(built)
            assert again.read_bytes() == file.read_bytes(), file


HOSTILE = [
    "../../../etc/passwd",
    "..",
    ".",
    "",
    "CON",
    "con",
    "com1.txt",
    "a/b",
    "A/B",
    "A-b",
    "模型",
    "x" * 10_000,
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "\u202egnp.exe\u2066",
    "a\x00b\x1b[31m\n",
    "javascript:alert(1)",
    "index",
]


def test_no_name_becomes_a_path_or_markup(tmp_path: Path) -> None:
    results = []
    for number, name in enumerate(HOSTILE):
        gpu = replace(builders.gpu(), model=name)
        machine = replace(builders.machine(gpu), name=name, cpu=name)
        case = builders.case(name or "", name, model=name)
        case = replace(case, placement="direct") if number % 2 else case
        results.append(
            builders.result(
                case,
                at="2024-05-01T00:00:00Z",
                run=name,
                machine=machine,
                why=name,
                metrics={"vram_peak_bytes": 5.0 * GIB, "decode_tok_s": 1.0},
                environment={"torch": name, name: name},
            )
        )
    save(tmp_path / "in" / "<b>&x", results)
    place = tmp_path / "out" / "site"
    assert cli.main(["publish", str(tmp_path / "in"), "--to", str(place)]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["site"]
    files = [str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()]
    assert len({file.casefold() for file in files}) == len(files)
    assert all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", file, re.ASCII) for file in files)
    assert len(list((place / "models").glob("*.html"))) == len(HOSTILE)
    for file, root in read_pages(place).items():
        assert len(programs(root)) == 1, file
        assert not root.all("img")
        assert not set(file.read_text(encoding="utf-8")) & set("\u202e\u2066\x00\x1b")
    check_links(place)
    index = (place / "index.html").read_text(encoding="utf-8")
    assert max(map(len, re.findall("x+", index))) < 200, "long names are cut"


ODD: dict[type, list[Any]] = {
    int: [0, -1, 1, 1 << 40, 1 << 62],
    float: [0.0, -1.0, 5.5, 1e308, 1e-308],
    str: ["", "..", "\u202e", "<b>", "cpu", "gpu:0", "ok", "works", "\x00", "2.1"],
    list: [[]],
    dict: [{}],
    bool: [True, False],
    type(None): [None],
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the ways to all values of a JSON object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from leaves(one, (*path, key))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_accepted_can_be_shown(golden: list[Result], tmp_path: Path, seed: int) -> None:
    """Results with one value of another kind than a run writes: most are sound as far as can be told."""
    chance, lines = random.Random(seed), []
    for number in range(200):
        plain = json.loads(encode_record(replace(chance.choice(golden), run=f"{number}")))
        *way, last = chance.choice(list(leaves(plain)))
        of = functools.reduce(lambda value, key: value[key], way, plain)
        of[last] = chance.choice(ODD[type(of[last])])
        with contextlib.suppress(msgspec.ValidationError):
            plain["id"] = msgspec.convert(plain["case"], Case).id
        lines.append(json.dumps(plain))
    (tmp_path / store.NAME).write_text("\n".join(lines))
    assert cli.main(["publish", str(tmp_path), "--to", str(tmp_path / "site")]) == 0
    assert json.loads((tmp_path / "site/index.json").read_text())["results"] > 100
    check_links(tmp_path / "site")


@given(st.text(max_size=80), st.text(max_size=80))
def test_a_slug_is_a_name_of_a_file_everywhere_and_its_own(one: str, other: str) -> None:
    slugs = [rows.slug(one), rows.slug(other)]
    for slug in slugs:
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,80}[a-z0-9])?", slug)
        assert ".." not in slug
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", slug)
    assert (slugs[0] == slugs[1]) == (one == other)


def test_a_plain_name_is_its_own_slug() -> None:
    for name in ("chatglm-6b", "smollm2-135m", "qwen2.5-7b"):
        assert rows.slug(name) == name
    taken = rows.slug("RTX 3060")
    assert rows.slug(taken) != taken, "else a name could take the page of another"


def tampered(result: Result) -> Result:
    return replace(result, metrics={"vram_peak_bytes": 99.0 * GIB}, run="tampered")


def test_what_is_refused_is_told_and_the_rest_published(
    golden: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "in", [golden[0], tampered(golden[0])])
    with (folder / store.NAME).open("ab") as file:
        file.write(b'{"schema": 99}\nnonsense\n')
    (tmp_path / "in/broken.zip").write_bytes(b"PK")
    assert cli.main(["publish", str(folder), "--to", str(tmp_path / "site")]) == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path}/site/index.html (1 result, 5 pages, 4 lines refused)" in out
    path = folder / store.NAME
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"fitmatrix: {path}:2: says peak VRAM, allocated 99.0 GiB, and its machine ")
    assert lines[2] == f"fitmatrix: {path}:3: has format 99, and this version reads up to 1; update fitmatrix"
    assert lines[3].startswith(f"fitmatrix: {path}:4: not a result, set aside: ")
    assert lines[0].startswith(f"fitmatrix: {folder}/broken.zip: ")
    told = json.loads((tmp_path / "site/provenance.json").read_text())["refused"]
    assert [one["where"] for one in told] == ["in/broken.zip", *(f"in/results.jsonl:{line}" for line in (2, 3, 4))]
    shown = (tmp_path / "site/provenance.html").read_text(encoding="utf-8")
    assert "4 lines refused" in shown
    assert str(tmp_path) not in shown


def test_refused_lines_are_counted_and_few_of_them_told(
    golden: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (save(tmp_path / "in", golden[:3]) / store.NAME).open("ab") as file:
        file.write(b"x\n" * 100)
    with (save(tmp_path / "worse", golden[3:5]) / store.NAME).open("ab") as file:
        file.write(b"x\n" * 100_000)
    assert cli.main(["publish", str(tmp_path / "in"), str(tmp_path / "worse"), "--to", str(tmp_path / "site")]) == 0
    out, err = capsys.readouterr()
    assert "1,101 lines refused)" in out
    told = err.splitlines()
    assert len(told) == 20 + 1 + 20 + 1 + 1
    assert any(line.endswith("in/results.jsonl: refused as well: 80 more lines") for line in told)
    assert any(line.endswith("1,000 lines that are no results, and nothing behind line 1,002 was read") for line in told)
    data = json.loads((tmp_path / "site/provenance.json").read_text())
    assert [source["refused"] for source in data["sources"]] == [100, 1001]


def test_strict_writes_nothing_where_anything_is_refused(golden: list[Result], tmp_path: Path) -> None:
    folder, place = save(tmp_path / "in", golden), tmp_path / "site"
    assert cli.main(["publish", str(folder), "--to", str(place), "--strict"]) == 0
    before = (place / "index.json").read_bytes()
    save(folder, [*golden[:3], tampered(golden[0])])
    assert cli.main(["publish", str(folder), "--to", str(place), "--strict"]) == 1
    assert (place / "index.json").read_bytes() == before


def test_where_nothing_remains_the_old_site_stays(golden: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = save(tmp_path / "in", golden), tmp_path / "site"
    assert cli.main(["publish", str(folder), "--to", str(place)]) == 0
    save(folder, [tampered(golden[0])])
    assert cli.main(["publish", str(folder), "--to", str(place)]) == 2
    assert "nothing to publish: no result in 1 file, 1 line refused" in capsys.readouterr().err
    assert (place / "index.html").is_file()
    (tmp_path / "empty").mkdir()
    assert cli.main(["publish", str(tmp_path / "empty"), "--to", str(place)]) == 2
    assert "no results.jsonl below; run: pytest cases/ --results DIR" in capsys.readouterr().err


def test_machines_of_one_name_and_other_hardware_have_pages_of_their_own(tmp_path: Path) -> None:
    machines = [builders.machine(), replace(builders.machine(), cpu="another")]
    results = [builders.result(at="2024-05-01T00:00:00Z", machine=machine, run=f"{i}") for i, machine in enumerate(machines)]
    assert cli.main(["publish", str(save(tmp_path / "in", results)), "--to", str(tmp_path / "site")]) == 0
    assert len(list((tmp_path / "site/machines").glob("a-machine-*.html"))) == 2


def test_many_files_are_shared_among_processes_and_keep_their_order(tmp_path: Path) -> None:
    for number in range(tasks.WORTH_SHARING + 1):
        machine = replace(builders.machine(), name=f"machine {number}")
        save(tmp_path / f"in/{number:03}", [builders.result(at="2024-05-01T00:00:00Z", run=f"{number}", machine=machine)])
    command = [sys.executable, "-W", "error", "-m", "harness", "publish", str(tmp_path / "in"), "--to", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"({tasks.WORTH_SHARING + 1} results, " in done.stdout
    assert done.stderr == ""
    sources = json.loads((tmp_path / "site/provenance.json").read_text())["sources"]
    assert [source["runs"] for source in sources] == [[f"{number}"] for number in range(tasks.WORTH_SHARING + 1)]


class Drawn(NamedTuple):
    models: list[atlas.ModelPage]
    lines: list[atlas.ModelLine]
    machines: list[atlas.MachineLine]


def drawn(*results: Result) -> Drawn:
    published = [PublishedResult(result=one, digest=audit.digest(encode_record(one)), line=at) for at, one in enumerate(results, 1)]
    of_machine = rows.grouped(published, lambda one: audit.identity(one.result.machine)).values()
    lines, shares = zip(*(atlas.shares_of(rows.rows_of(some)) for some in of_machine), strict=True)
    names = sorted({name for found in shares for name in found})
    models = [atlas.model_page([found[name] for found in shares if name in found]) for name in names]
    return Drawn(models, [atlas.line_of(model) for model in models], list(lines))


def of(machine: Machine, precision: str, placement: str, run: str = "1", **changes: Any) -> Result:
    return builders.result(builders.case(precision, placement), machine=machine, run=run, **changes)


def card(size: int, name: str) -> Tier:
    return replace(builders.gpu(), total_bytes=size, free_bytes=size, model=name)


def test_what_a_model_needs_is_the_most_that_any_card_measured_of_what_lies_on_it_whole() -> None:
    small, large = builders.machine(card(8 * GIB, "A")), builders.machine(card(24 * GIB, "B"))
    (model,) = drawn(
        of(small, "int4", "direct", metrics={"vram_process_peak_bytes": 5.0 * GIB}),
        of(large, "int4", "ram-to-gpu", metrics={"vram_process_peak_bytes": 5.5 * GIB}),
        of(large, "int4", "gpu+cpu", metrics={"vram_process_peak_bytes": 20.0 * GIB}),
        of(large, "fp16", "direct", outcome=Outcome.OOM, stage="load", metrics={"vram_process_peak_bytes": 23.0 * GIB}),
    ).models
    (need,) = model.needs
    assert (need.precision, need.bytes, need.card, need.planned) == ("int4", 5.5 * GIB, 6 * GIB, False)
    assert [(rung.label, rung.row is not None) for rung in model.rungs] == [("6 GiB", False), ("8 GiB", True), ("24 GiB", True)]


def test_a_line_about_a_model_is_of_one_case_and_the_same_on_both_pages() -> None:
    small, large = builders.machine(card(8 * GIB, "A")), replace(builders.machine(card(24 * GIB, "B")), name="another machine")
    found = drawn(
        of(small, "int8", "direct", metrics={"vram_process_peak_bytes": 7.0 * GIB, "decode_tok_s": 5.0}),
        of(large, "int4", "direct", metrics={"vram_process_peak_bytes": 5.0 * GIB, "decode_tok_s": 90.0}),
    )
    (model,) = found.models
    assert model.shown is not None
    assert (model.shown.result.case.precision, model.shown.speed.value) == ("int8", "5")
    line = Data("").model_line(found.lines[0])
    assert (line["smallest_card_bytes"], line["predicted_card_bytes"]) == (8 * GIB, 6 * GIB)
    assert line["best"]["needed_bytes"] == 7 * GIB
    assert line["best"]["metrics"]["decode_tok_s"] == 5.0
    entries = tuple(entry_of(row.result, encode_record(row.result), 0, 1) for row in model.rows)
    joined, now = Joined(entries=entries, refusals=(), sources=()), datetime(2026, 1, 1, tzinfo=timezone.utc)
    cards = atlas.draw_cards(found.lines, found.machines)
    front = pages.front_pages(joined, now, found.lines, cards, found.machines, has_planner=False)
    told = {page.link: read(page.html()) for page in [*front, *pages.model_pages(model, has_planner=False)]}
    index, about = told["index.html"].all("table", look="list")[0].text, told[model.link.page].all("div", look="answer")[0].text
    assert all("6 GiB" in text and "8 GiB" in text and "5.00 tokens/s" in text for text in (index, about))
    assert "90.0" not in index


def test_torchs_figure_alone_is_told_and_what_cuda_takes_is_added() -> None:
    machine = builders.machine(card(8 * GIB, "A"))
    (model,) = drawn(of(machine, "int4", "direct", metrics={"vram_peak_bytes": 5.0 * GIB})).models
    assert model.needs[0].basis == "what torch allocated, without the CUDA context, which is not known"


def test_a_usual_size_that_was_measured_is_not_predicted_as_well() -> None:
    machine = builders.machine(card(int(79.2 * GIB), "A100"))
    (model,) = drawn(of(machine, "fp32", "direct", metrics={"vram_process_peak_bytes": 70.0 * GIB})).models
    assert [rung.label for rung in model.rungs] == ["79.2 GiB"]


def test_what_works_no_more_stands_before_what_became_slower() -> None:
    machine = builders.machine()
    ran = [
        of(
            machine,
            precision,
            "cpu",
            run=f"{version}",
            at=f"2024-05-0{version}T00:00:00Z",
            environment={"torch": f"2.{version}"},
            **found,
        )
        for precision, first, then in (
            ("fp32", {"metrics": {"decode_tok_s": 4.0}}, {"metrics": {"decode_tok_s": 1.0}}),
            ("bf16", {"metrics": {"decode_tok_s": 4.0}}, {"outcome": Outcome.CRASH, "stage": "load"}),
            ("fp16", {"metrics": {"decode_tok_s": 4.0}}, {"metrics": {"decode_tok_s": 4.0}}),
        )
        for version, found in ((1, first), (2, then))
    ]
    (model,) = drawn(*ran).models
    assert [(trend.row.result.case.precision, trend.change) for trend in model.trends] == [
        ("bf16", None),
        ("fp32", -0.75),
        ("fp16", 0),
    ]


def test_a_case_on_the_cpu_of_a_machine_with_a_card_needs_none() -> None:
    machine = builders.machine(card(8 * GIB, "A"))
    (model,) = drawn(of(machine, "bf16", "cpu", metrics={"ram_peak_bytes": 1.0 * GIB, "decode_tok_s": 3.0})).models
    assert model.smallest is None
    assert model.without
    assert model.without.result.case.placement == "cpu"


def test_a_model_that_works_nowhere_says_so(tmp_path: Path) -> None:
    result = builders.result(at="2024-05-01T00:00:00Z", run="1", outcome=Outcome.SKIPPED, stage="plan", verdict=Verdict.TOO_BIG)
    assert cli.main(["publish", str(save(tmp_path / "in", [result])), "--to", str(tmp_path / "site")]) == 0
    assert "Nothing works yet: none of 1 case." in page_of(tmp_path / "site", "models/tiny.html").text


def test_dates_are_held_against_the_clock_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    year = datetime.now(timezone.utc).year + 1
    folder = save(tmp_path / "in", [builders.result(at=f"{year}-12-31T00:00:00Z", run="1")])
    assert cli.main(["publish", str(folder), "--to", str(tmp_path / "site")]) == 2
    assert f"is dated {year}-12-31T00:00:00Z, and now is " in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
