"""Badges: what they say for each model and size of card, and that a name cannot become anything but text."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from harness.cli.entry import main
from harness.core.records import Case, Machine, Outcome, Quality, Result, Verdict, encode_record
from harness.core.units import GIB
from harness.report.export.badges import Badge, badges
from harness.results import store
from tests.support.builders import GOLDEN, gpu, loaded, machine, result

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {"svg", "title", "linearGradient", "stop", "clipPath", "rect", "g", "text"}
CARD = machine(gpu())


def one(precision: str = "int8", *, where: Machine = CARD, vram: int | None = None, **changes: Any) -> Result:
    of = Case(model=changes.pop("model", "chatglm-6b"), precision=precision, placement="direct", vram_bytes=vram)
    usual = {"metrics": {"vram_peak_bytes": 8.2 * GIB, "decode_tok_s": 23.1, "ready_s": 20.0}}
    return result(of, **({"machine": where} | usual | changes))


def too_big(vram: int | None = None, **changes: Any) -> Result:
    return one(vram=vram, outcome=Outcome.SKIPPED, verdict=Verdict.TOO_BIG, stage="plan", metrics={}, **changes)


def said(*results: Result) -> list[str]:
    return [badge.said for badge in badges(results)]


def drawn(badge: Badge) -> ElementTree.Element:
    return ElementTree.fromstring(badge.svg)


def quality(verdict: str) -> Quality:
    return Quality(probe="1", verdict=verdict, why="because")


def test_it_says_what_fits_the_card_and_how_fast() -> None:
    (badge,) = badges([one(), one("int4", metrics={"vram_peak_bytes": 5.0 * GIB, "decode_tok_s": 9.0})])
    assert (badge.model, badge.said, badge.slug) == ("chatglm-6b", "int8 fits 12 GiB, 23.1 tok/s", "chatglm-6b-12GiB")


def test_it_says_that_nothing_fits() -> None:
    assert said(too_big()) == ["does not fit 12 GiB"]
    assert said(one(outcome=Outcome.OOM, stage="load")) == ["does not fit 12 GiB"]


def test_emulated_sizes_have_a_badge_each_and_no_speed_of_the_larger_card() -> None:
    found = badges([one(vram=12 * GIB), too_big(8 * GIB)])
    assert [(badge.slug, badge.said) for badge in found] == [
        ("chatglm-6b-8GiB", "does not fit 8 GiB"),
        ("chatglm-6b-12GiB", "int8 fits 12 GiB"),
    ]
    assert "limited to vram12GiB" in (drawn(found[1]).findtext(f"{SVG}title") or "")


def test_what_needs_the_ram_as_well_says_so() -> None:
    spilled = one(loaded=loaded(tiers={"gpu:0": 10, "cpu": 5, "disk": 1}))
    assert said(spilled) == ["int8 fits 12 GiB + RAM + disk, 23.1 tok/s"]


def test_a_case_in_the_ram_is_no_fit_of_the_card() -> None:
    in_ram = result(
        Case(model="m", precision="bf16", placement="cpu"), machine=CARD, metrics={"ram_peak_bytes": 9.0 * GIB, "decode_tok_s": 1.5}
    )
    assert said(too_big(model="m"), in_ram) == ["bf16 in RAM only, 1.50 tok/s"]


def test_without_a_card_the_ram_is_the_size() -> None:
    found = badges([one(where=machine(), metrics={"ram_peak_bytes": 9.0 * GIB, "decode_tok_s": 1.5})])
    assert [(badge.slug, badge.said) for badge in found] == [("chatglm-6b-16GiB-RAM", "int8 fits 16 GiB RAM, 1.50 tok/s")]


def test_several_cards_are_counted() -> None:
    assert said(one(where=machine(gpu(0), gpu(1)))) == ["int8 fits 2 x 12 GiB, 23.1 tok/s"]


def test_doubts_are_said() -> None:
    assert said(one(quality=quality("degraded"))) == ["int8 fits 12 GiB, 23.1 tok/s, answers degraded"]
    assert said(one(quality=quality("broken"))) == ["answers broken on 12 GiB"]
    assert said(one(checks={"precision": "int8 did not take effect"})) == ["int8 fits 12 GiB, 23.1 tok/s, 1 check failed"]
    assert said(one(outcome=Outcome.CRASH, stage="load", metrics={})) == ["does not work on 12 GiB"]
    assert said(one(outcome=Outcome.SKIPPED, verdict=Verdict.UNAVAILABLE, stage="plan", metrics={})) == ["not measured on 12 GiB"]
    (synthetic,) = badges([one(weights="synthetic")])
    assert synthetic.said.endswith(", synthetic weights")
    assert synthetic.slug.endswith("-synthetic")


def test_of_machines_with_cards_of_one_size_the_newest_result_counts() -> None:
    other = msgspec.structs.replace(CARD, name="another machine")
    older = one(at="2026-01-01T00:00:00Z")
    newer = one(where=other, at="2026-02-01T00:00:00Z", metrics={"vram_peak_bytes": 8.0 * GIB, "decode_tok_s": 40.0})
    assert said(newer, older) == said(older, newer) == ["int8 fits 12 GiB, 40.0 tok/s"]


def test_a_badge_is_for_everybody() -> None:
    (badge,) = badges([one()])
    root = drawn(badge)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "chatglm-6b: int8 fits 12 GiB, 23.1 tok/s"
    assert (root.findtext(f"{SVG}title") or "").startswith("chatglm-6b on a machine: Use int8 with placement direct: 8.20 GiB")
    assert list(dict.fromkeys(text.text for text in root.iter(f"{SVG}text"))) == ["chatglm-6b", "int8 fits 12 GiB, 23.1 tok/s"]


def contrast(color: str, gloss: float = 0.0) -> float:
    """Return WCAG 2's contrast of white on a color under so much of #bbb, badgepy's gloss."""
    letters = color.lstrip("#")
    pairs = [letter * 2 for letter in letters] if len(letters) == 3 else [letters[at : at + 2] for at in (0, 2, 4)]
    values = [((1 - gloss) * int(pair, 16) + gloss * 0xBB) / 255 for pair in pairs]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_white_is_read_on_every_color() -> None:
    assert round(contrast("#767676"), 2) == 4.54  # a known value
    shown = [one(), too_big(model="b"), one(model="c", quality=quality("degraded"))]
    shown.append(one(model="d", outcome=Outcome.SKIPPED, verdict=Verdict.UNAVAILABLE, stage="plan", metrics={}))
    roots = [drawn(badge) for badge in badges(shown)]
    fills = {rect.get("fill") or "" for root in roots for rect in root.iterfind(f"{SVG}g/{SVG}rect")}
    gloss = {(stop.get("stop-color", "#000"), stop.get("stop-opacity")) for root in roots for stop in root.iter(f"{SVG}stop")}
    assert gloss == {("#bbb", ".1"), ("#000", ".1")}
    colors = {fill for fill in fills if not fill.startswith("url(")}
    assert len(colors) == 5
    assert min(contrast(color, 0.1) for color in colors) >= 4.5


def test_badges_of_one_page_share_no_id() -> None:
    roots = [drawn(badge) for badge in badges([one(), one(model="b"), one(model="org/m~1")])]
    ids = [element.get("id") for root in roots for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) == 6


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        '"/><a href="x">',
        "a\u202eb\x00\x1b[31m\n\ufffe\ud800",
        "]]>&amp;",
        "模型" * 30,
        "x" * 10_000,
        "../../etc",
    ],
    ids=lambda name: ascii(name[:8]),
)
def test_a_hostile_name_stays_text_and_in_the_folder(name: str, tmp_path: Path) -> None:
    (badge,) = badges([one(model=name)])
    root = drawn(badge)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= DRAWN
    assert "\u202e" not in badge.svg
    assert float(root.get("width") or 0) < 1000
    path = tmp_path / f"{badge.slug}.svg"
    assert path.resolve().parent == tmp_path.resolve()
    assert not badge.slug.startswith(".")
    path.write_text(badge.svg, encoding="utf-8")


def test_names_that_differ_have_files_of_their_own() -> None:
    slugs = [badge.slug for badge in badges([one(model="org/m"), one(model="org-m"), one(model="org m")])]
    assert slugs == ["org-m-12GiB", "org-m-12GiB~2", "org-m-12GiB~3"]


# The command


def test_the_command_writes_a_directory_of_badges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / store.NAME).write_bytes(GOLDEN.read_bytes())
    assert main(["report", str(tmp_path), "--badge", str(tmp_path / "badges")]) == 0
    written = sorted((tmp_path / "badges").iterdir())
    assert [path.name for path in written] == ["chatglm-6b-12GiB.svg", "smollm2-135m-7.65GiB-RAM.svg"]
    assert capsys.readouterr().out.splitlines() == [f"badge: {path}" for path in written]
    assert not (tmp_path / "index.html").exists()


def test_the_command_writes_one_file_where_there_is_one_badge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / store.NAME).write_bytes(encode_record(one()) + b"\n")
    assert main(["report", str(tmp_path), "--badge", str(tmp_path / "b.svg"), "--format", "md"]) == 0
    assert (tmp_path / "b.svg").read_text(encoding="utf-8").startswith("<svg ")
    assert "badge: " not in capsys.readouterr().out
    (tmp_path / store.NAME).write_bytes(GOLDEN.read_bytes())
    assert main(["report", str(tmp_path), "--badge", str(tmp_path / "b.svg")]) == 2
    assert "there are 2 badges, not one: give a directory" in capsys.readouterr().err
