"""A site that grows: what has not changed is not made anew, and the result is to the byte what a build from nothing makes."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import pytest

from harness.cli import entry as cli
from harness.core.records import Machine, Result, encode_record
from harness.core.units import GIB
from harness.machine import atomic
from harness.report.site import build, intake, pages, state
from harness.report.site.parts import parts
from harness.results import collect, store
from tests.report.test_site import check_links, page_of, read_pages
from tests.report.test_site import targets as links_of
from tests.support import builders

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 29, tzinfo=timezone.utc)
replace = msgspec.structs.replace


def machine(name: str) -> Machine:
    return replace(builders.machine(builders.gpu()), name=name)


def results_of(name: str, run: str = "1", speed: float = 9.0) -> list[Result]:
    """Return results of one machine: two models, a case of each that works and one that does not."""
    found = []
    for model in ("small", f"only-{name}"):
        for precision in ("bf16", "int4"):
            case = replace(builders.case(precision, "direct", model=model), model=model)
            metrics = {"decode_tok_s": speed, "vram_process_peak_bytes": 2.0 * GIB}
            found.append(
                builders.result(case, id=case.id, machine=machine(name), run=run, at="2024-05-01T00:00:00Z", metrics=metrics)
            )
    return found


def put(folder: Path, name: str, results: list[Result]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / store.NAME).write_bytes(b"".join(encode_record(one) + b"\n" for one in results))


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Results of three machines, each in a folder of its own."""
    for name in ("a", "b", "c"):
        put(tmp_path / "shelf", name, results_of(name))
    return tmp_path / "shelf"


def publish(shelf: Path, place: Path, file: Path | None) -> int:
    """Build a site at a fixed hour; return how many pages were written anew, so that those taken from the old one are known."""
    before = {path: path.stat().st_ino for path in place.rglob("*.html")} if place.exists() else {}
    with state.opened(file) as kept:
        with atomic.replace_directory(place, marker=build.MARKER, ours=build.NAMES, option="--to") as folder:
            old = build.old_site(place, kept)
            joined = intake.gather(collect.find_artifacts([shelf]), folder, NOW, kept, old)
            build.write_site(joined, folder, NOW, kept, old)
        build.saved(place, kept)
    return sum(before.get(path) != path.stat().st_ino for path in place.rglob("*.html"))


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def grow(shelf: Path) -> None:
    put(shelf, "d", results_of("d"))


def change(shelf: Path) -> None:
    put(shelf, "b", results_of("b", run="2", speed=11.0))


def append(shelf: Path) -> None:
    put(shelf, "b", [*results_of("b"), *results_of("b", run="2", speed=11.0)])


def interleave(shelf: Path) -> None:
    """Let one more file of a machine have results from before and from behind those that it has, and one of them twice."""
    other = results_of("b")[0]
    earlier, later = (replace(other, run=at, at=f"2024-0{at}-01T00:00:00Z") for at in "46")
    put(shelf, "d", [later, results_of("b")[1], earlier, later])


def shrink(shelf: Path) -> None:
    (shelf / "c" / store.NAME).unlink()


def contradict(shelf: Path) -> None:
    put(shelf, "d", results_of("a", speed=99.0)[:1])


def say_again(shelf: Path) -> None:
    put(shelf, "d", results_of("a"))


def rename(shelf: Path) -> None:
    (shelf / "a").rename(shelf / "z")


def touch(shelf: Path) -> None:
    """Change nothing but times."""
    os.utime(shelf / "a" / store.NAME)


def pack(shelf: Path) -> None:
    """Put two files of results into an archive, as CI's artifacts come, one of which was there before."""
    with zipfile.ZipFile(shelf / "run.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a", "d"):
            archive.writestr(f"{name}/{store.NAME}", b"".join(encode_record(one) + b"\n" for one in results_of(name)))
    (shelf / "a" / store.NAME).unlink()


CHANGES = [pack, grow, change, append, interleave, shrink, contradict, say_again, rename, touch]


@pytest.mark.parametrize("changed", CHANGES)
def test_a_site_that_grew_is_to_the_byte_what_is_built_from_nothing(
    shelf: Path, tmp_path: Path, changed: Callable[[Path], None]
) -> None:
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    publish(shelf, place, file)
    changed(shelf)
    publish(shelf, place, file)
    publish(shelf, tmp_path / "whole", None)
    assert contents(place) == contents(tmp_path / "whole")
    check_links(place)


def test_one_machine_more_makes_no_page_of_another_anew(shelf: Path, tmp_path: Path) -> None:
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    publish(shelf, place, file)
    assert publish(shelf, place, file) == 2  # the front door and the provenance, which say when
    grow(shelf)
    assert publish(shelf, place, file) == 2 + 1 + 2 + 1  # and its own page, those of its models and of its card


def test_a_damaged_result_of_the_old_site_is_read_again(shelf: Path, tmp_path: Path) -> None:
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    publish(shelf, place, file)
    before = contents(place)
    for name in ("raw", "machines", "models"):
        path = next((place / name).glob("*.json*"))
        path.unlink()
        path.write_bytes(b"{")
    publish(shelf, place, file)
    assert contents(place) == before


@pytest.mark.parametrize("harm", [b"", b"no database", b"SQLite format 3\0" + bytes(4096)])
def test_a_damaged_state_is_made_anew(shelf: Path, tmp_path: Path, harm: bytes) -> None:
    place = tmp_path / "site"
    assert cli.main(["publish", str(shelf), "--to", str(place)]) == 0
    before, file = contents(place), state.file_for(place)
    file.write_bytes(harm)
    assert cli.main(["publish", str(shelf), "--to", str(place)]) == 0
    after = contents(place)
    assert {name for name in before if before[name] != after[name]} <= {"provenance.html", "provenance.json"}


def test_a_blob_that_rotted_is_made_anew(shelf: Path, tmp_path: Path) -> None:
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    publish(shelf, place, file)
    before = contents(place)
    with sqlite3.connect(file) as db:
        for table in ("sources", "machines", "models", "cards", "shares"):
            db.execute(f"UPDATE {table} SET value = CAST(substr(value, 1, length(value) - 3) || x'000000' AS BLOB)")
    db.close()
    grow(shelf)
    publish(shelf, place, file)
    (shelf / "d" / store.NAME).unlink()
    publish(shelf, place, file)
    assert contents(place) == before


def test_the_state_of_another_program_or_of_other_secrets_is_not_used(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    put(shelf, "told", [replace(results_of("told")[0], command="pytest --password correct-horse-battery")])
    publish(shelf, place, file)
    assert any(b"correct-horse" in data for data in contents(place).values())
    monkeypatch.setenv("MY_SECRET", "correct-horse-battery")
    publish(shelf, place, file)
    assert not any(b"correct-horse" in data for data in contents(place).values())
    monkeypatch.setattr(state, "_FORMAT", 0)
    with state.opened(file) as kept:
        assert kept.site == ""


def test_a_site_that_came_from_elsewhere_lends_no_pages(shelf: Path, tmp_path: Path) -> None:
    """The state knows which site its pages are of: another one at the same place has pages of the same names and sizes."""
    place, file = tmp_path / "site", tmp_path / "state.sqlite"
    publish(shelf, place, file)
    before = contents(place)
    page = next((place / "machines").glob("*.html"))
    page.write_bytes(page.read_bytes().replace(b"tokens/s", b"TOKENS/S"))
    (place / build.MARKER).write_text("of another")
    publish(shelf, place, file)
    assert contents(place) == before


@pytest.mark.parametrize("after_s", [0.7, 1.2, 1.8, 2.4])
def test_a_build_that_is_killed_leaves_a_whole_site_and_the_next_completes_it(shelf: Path, tmp_path: Path, after_s: float) -> None:
    place = tmp_path / "site"
    command = [sys.executable, "-m", "harness", "publish", str(shelf), "--to", str(place)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    before = contents(place)
    grow(shelf)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    time.sleep(after_s)
    running.kill()
    running.wait()
    found = contents(place)
    assert found == before or len(read_pages(place)) > sum(name.endswith(".html") for name in before)
    check_links(place)
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    publish(shelf, tmp_path / "whole", None)
    after, whole = contents(place), contents(tmp_path / "whole")
    assert {name for name in after.keys() | whole.keys() if after.get(name) != whole.get(name)} <= {
        "provenance.html",
        "provenance.json",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_long_list_goes_on_on_pages_by_name(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("d", "e"):
        put(shelf, name, results_of(name))
    monkeypatch.setattr(pages, "MOST_LISTED", dict.fromkeys(pages.MOST_LISTED, 2))
    publish(shelf, tmp_path / "site", None)
    place = tmp_path / "site"
    check_links(place)
    found, reached, todo = read_pages(place), set[Path](), [place / "index.html"]
    while todo:
        file = todo.pop()
        if file not in reached:
            reached.add(file)
            todo += [(file.parent / link.partition("#")[0]).resolve() for link in links_of(found[file]) if link.endswith(".html")]
    assert reached == set(found)
    listed = [
        cell.text
        for page in ("index.html", "machines/~2.html", "machines/~3.html")
        for row in page_of(place, page).all("tr")
        for cell in row.all("th", scope="row")
        if re.fullmatch("[a-e]", cell.text)
    ]
    assert [name for name in listed if name] == ["a", "b", "c", "d", "e"]
    runs = [json.loads((place / f"models/small{part}.json").read_text()) for part in ("", "~2", "~3")]
    assert [one["name"] for part in runs for one in part["machines"]] == ["a", "b", "c", "d", "e"]
    assert runs[0]["more_machines"]["page"] == "../models/small~2.html"
    assert "more_machines" not in runs[2]


def test_parts_say_where_a_name_is_to_be_found() -> None:
    found = parts(["ant", "bee", "cat", "dog", "eel"], 2, "index.html", str, "animals/")
    assert [list(part.things) for part in found] == [["ant", "bee"], ["cat", "dog"], ["eel"]]
    assert found[1].ways == (("ant … bee", "index.html"), ("cat … dog", "animals/~2.html"), ("eel", "animals/~3.html"))
    assert [part.link for part in found] == ["index.html", "animals/~2.html", "animals/~3.html"]
    assert parts([], 2, "index.html", str)[0].things == []
