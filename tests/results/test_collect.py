"""Where results lie: files, directories of directories, archives; and what is done with damaged, endless and hostile ones."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from harness.core.errors import StoreError, UsageError
from harness.core.records import Result, encode_record
from harness.results import collect, store
from harness.results.collect import Artifact
from tests.support import builders

LINE = encode_record(builders.result()) + b"\n"


def kept(place: Path, data: bytes = LINE) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place


def archive(place: Path, **members: bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return place


def names(*places: Path) -> list[str]:
    return [artifact.name for artifact in collect.find_artifacts(places)]


def test_files_directories_and_archives_are_found_below_any_depth(tmp_path: Path) -> None:
    kept(tmp_path / "all/matrix-gpu-1/results.jsonl")
    kept(tmp_path / "all/matrix-gpu-1/deeper/results.jsonl")
    kept(tmp_path / "all/matrix-gpu-1/other.jsonl", b"")
    archive(tmp_path / "all/matrix-gpu-2.zip", results_jsonl=b"", out__results_jsonl=LINE, **{"results.jsonl": LINE})
    alone = kept(tmp_path / "rtx3060.jsonl")
    assert names(tmp_path / "all", alone) == [
        "all/matrix-gpu-2.zip/results.jsonl",
        "all/matrix-gpu-1/results.jsonl",
        "all/matrix-gpu-1/deeper/results.jsonl",
        "rtx3060.jsonl",
    ]


def test_a_file_that_several_places_lead_to_is_there_once(tmp_path: Path) -> None:
    file = kept(tmp_path / "a/results.jsonl")
    assert len(names(tmp_path / "a", file, tmp_path)) == 1


def test_what_others_read_tells_no_directory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path / "home/alice-b/runs/results.jsonl")
    monkeypatch.chdir(tmp_path / "home/alice-b")
    assert names(Path("runs")) == ["runs/results.jsonl"]
    assert names(Path()) == ["alice-b/runs/results.jsonl"]
    assert names(tmp_path / "home/alice-b/runs") == ["runs/results.jsonl"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
def test_a_name_that_is_no_text_can_be_published(tmp_path: Path) -> None:
    kept(tmp_path / os.fsdecode(b"gpu-\xff") / "results.jsonl")
    (artifact,) = collect.find_artifacts([tmp_path])
    assert artifact.name.encode().endswith(b"/gpu-?/results.jsonl")
    assert [one for _, one in collect.read(artifact) if isinstance(one, Result)]


def test_a_place_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file or directory; name directories"):
        collect.find_artifacts([tmp_path / "none"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
def test_pipes_block_nobody_and_loops_of_links_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_link_to_nothing_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").symlink_to(tmp_path / "gone")
    assert names(tmp_path) == []


def test_lines_have_their_numbers_whole_or_not(tmp_path: Path) -> None:
    file = kept(tmp_path / "results.jsonl", LINE + b"\n" + LINE[:40] + b"\n" + LINE[:40] + LINE + LINE.rstrip())
    (artifact,) = collect.find_artifacts([file])
    read = [(number, type(one)) for number, one in collect.read(artifact)]
    assert read == [(1, Result), (3, str), (4, Result), (4, str), (5, Result)]


def test_what_is_read_is_what_the_store_reads(tmp_path: Path) -> None:
    kept(tmp_path / "results.jsonl", LINE + b"{}\n" + LINE[:50] + LINE)
    results, problems = store.read(tmp_path / "results.jsonl")
    (artifact,) = collect.find_artifacts([tmp_path])
    read = list(collect.read(artifact))
    assert [one for _, one in read if isinstance(one, Result)] == results
    assert [(number, said) for number, said in read if isinstance(said, str)] == [
        (problem.line, str(problem).partition(f":{problem.line}: ")[2]) for problem in problems
    ]


def test_an_archive_is_read_without_being_unpacked(tmp_path: Path) -> None:
    place = archive(tmp_path / "a.zip", **{"x/results.jsonl": LINE * 3})
    (artifact,) = collect.find_artifacts([place])
    assert artifact.where == f"{place}/x/results.jsonl"
    assert [number for number, _ in collect.read(artifact)] == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_a_name_in_an_archive_leads_nowhere(tmp_path: Path) -> None:
    place = archive(tmp_path / "in/a.zip", **{"../../results.jsonl": LINE, "/etc/results.jsonl": LINE})
    assert [len(list(collect.read(artifact))) for artifact in collect.find_artifacts([place])] == [1, 1]
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", LINE, b"PK\x05\x06" + b"\xff" * 18])
def test_a_damaged_archive_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    kept(tmp_path / "results.jsonl")
    kept(tmp_path / "a.zip", data)
    good, bad = sorted(collect.find_artifacts([tmp_path]), key=lambda artifact: artifact.damage)
    assert len(list(collect.read(good))) == 1
    with pytest.raises(StoreError, match=r"a\.zip: ") as error:
        list(collect.read(bad))
    assert len(str(error.value).splitlines()) == 1


def test_damage_inside_an_archive_is_one_sentence(tmp_path: Path) -> None:
    place = archive(tmp_path / "a.zip", **{"results.jsonl": LINE * 50})
    data = bytearray(place.read_bytes())
    data[60:90] = bytes(30)
    place.write_bytes(data)
    (artifact,) = collect.find_artifacts([place])
    with pytest.raises(StoreError, match="cannot be unpacked"):
        list(collect.read(artifact))


def test_what_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact,) = collect.find_artifacts([archive(tmp_path / "a.zip", **{"results.jsonl": LINE * 50})])
    monkeypatch.setattr(collect, "_MEMBER_BYTES", len(LINE) * 49)
    with pytest.raises(StoreError, match=r"unpacks to .*: more than any results"):
        list(collect.read(artifact))


def test_an_endless_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_LINE_BYTES", len(LINE) + 1)
    file = kept(tmp_path / "results.jsonl", LINE + b"x" * 2 * len(LINE) + b"\n" + LINE)
    read = list(collect.read(collect.find_artifacts([file])[0]))
    assert [(number, type(one)) for number, one in read] == [(1, Result), (2, str)]
    assert "is longer than" in str(read[1][1])


def test_a_file_that_is_gone_by_now_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        list(collect.read(Artifact(path=str(tmp_path / "gone"), name="gone")))
