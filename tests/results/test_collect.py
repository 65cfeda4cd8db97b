"""Where results lie: files, directories of directories, archives; and what is done with damaged, endless and hostile ones."""

from __future__ import annotations

import errno
import itertools
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


def said(*places: Path) -> list[str]:
    """What is wrong with the files of results there, and nothing is to be read from any."""
    found = []
    for artifact in collect.find_artifacts(places):
        with pytest.raises(StoreError) as error:
            list(collect.read(artifact))
        found.append(str(error.value).removeprefix(f"{artifact.where}: "))
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
def test_pipes_and_devices_block_nobody_are_told_and_loops_of_links_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/results.jsonl").symlink_to("/dev/zero")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/results.jsonl").symlink_to(tmp_path / "b/results.jsonl")
    assert said(tmp_path) == ["is no regular file, and was not read"] * 2 + ["is a link that leads nowhere"]
    assert said(Path("/dev/zero")) == ["is no regular file, and was not read"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").symlink_to(tmp_path / "gone")
    assert said(tmp_path) == ["is a link that leads nowhere"]


def test_a_directory_that_cannot_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path / "a/results.jsonl")
    kept(tmp_path / "b/results.jsonl")
    listed = os.scandir

    def sealed(place: str) -> object:
        if str(place).endswith("/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", sealed)
    good, bad = collect.find_artifacts([tmp_path])
    assert (good.damage, bad.damage) == ("", "cannot be looked into (Permission denied)")


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


@pytest.mark.parametrize("unpacked", [b"\n" * 5_000_000, b"x\n" * 1_000_000, LINE * 20_000])
def test_a_small_archive_of_much_is_refused_unread(tmp_path: Path, unpacked: bytes) -> None:
    place = archive(tmp_path / "a.zip", **{"results.jsonl": unpacked})
    assert [line.startswith("unpacks to ") and line.endswith("unpack it first if you trust it") for line in said(place)] == [True]


def test_many_files_that_share_their_bytes_are_as_many(tmp_path: Path) -> None:
    """Each is small beside the archive, all together are not."""
    place = archive(tmp_path / "a.zip", **{f"{number}/results.jsonl": b"\n" * 200_000 for number in range(60)})
    assert [line.startswith("unpacks to 11.4 MiB from ") for line in said(place)] == [True]


def test_an_archive_of_many_files_is_not_searched_for_each(tmp_path: Path) -> None:
    place = archive(tmp_path / "a.zip", **{f"{number}/results.jsonl": b"" for number in range(1001)})
    assert said(place) == ["holds 1,001 files of results among 1,001; unpack it first"]


def test_what_is_packed_so_that_it_takes_much_memory_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("results.jsonl", LINE)
    assert said(tmp_path) == ["is packed by another method than deflate; pack it anew"]


def test_lines_that_are_no_results_are_not_read_without_end(tmp_path: Path) -> None:
    file = kept(tmp_path / "results.jsonl", LINE + b"x\n" * 100_000 + LINE)
    (artifact,) = collect.find_artifacts([file])
    with pytest.raises(StoreError, match="has 1,000 lines that are no results, and nothing behind line 1,001 was read"):
        list(collect.read(artifact))
    assert len(list(itertools.islice(collect.read(artifact), 1001))) == 1001


def test_a_line_of_many_pieces_is_no_flood(tmp_path: Path) -> None:
    file = kept(tmp_path / "results.jsonl", b'{"schema":' * 100_000 + LINE)
    assert len(store.read_line(file.read_bytes())) < 200


def test_an_endless_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LONGEST_BYTES", len(LINE) + 1)
    file = kept(tmp_path / "results.jsonl", LINE + b"x" * 2 * len(LINE) + b"\n" + LINE)
    read = list(collect.read(collect.find_artifacts([file])[0]))
    assert [(number, type(one)) for number, one in read] == [(1, Result), (2, str)]
    assert "is longer than" in str(read[1][1])


def test_a_file_that_is_gone_by_now_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        list(collect.read(Artifact(path=str(tmp_path / "gone"), name="gone")))
