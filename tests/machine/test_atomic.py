"""A directory that is made whole or stays: what an error, a kill and a stranger's directory leave."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.errors import UsageError
from harness.machine import atomic

OURS = frozenset({"mark", "page"})


def fill(place: Path, text: str) -> None:
    with atomic.replace_directory(place, marker="mark", ours=OURS, option="--to") as folder:
        (folder / "page").write_text(text)


def content(place: Path) -> dict[str, str]:
    return {str(file.relative_to(place)): file.read_text() for file in sorted(place.rglob("*")) if file.is_file()}


def test_a_directory_is_made_with_its_parents_and_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "new/site"
    fill(place, "first")
    (place / "old").mkdir()
    fill(place, "second")
    assert content(place) == {"mark": "", "page": "second"}
    assert [entry.name for entry in place.parent.iterdir()] == ["site"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    fill(tmp_path / "site", "first")
    assert content(tmp_path / "site") == {"mark": "", "page": "first"}


def test_while_it_is_written_the_old_one_is_there_and_an_error_leaves_it(tmp_path: Path) -> None:
    place = tmp_path / "site"
    fill(place, "first")

    def broken() -> None:
        with atomic.replace_directory(place, marker="mark", ours=OURS, option="--to") as folder:
            (folder / "page").write_text("half")
            assert content(place)["page"] == "first"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert content(place) == {"mark": "", "page": "first"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["site"]


def test_what_its_owner_keeps_there_moves_on(tmp_path: Path) -> None:
    place = tmp_path / "site"
    fill(place, "first")
    (place / "CNAME").write_text("example.org")
    (place / ".git").mkdir()
    (place / ".git/HEAD").write_text("ref")
    fill(place, "second")
    assert content(place) == {".git/HEAD": "ref", "CNAME": "example.org", "mark": "", "page": "second"}


@pytest.mark.parametrize("name", ["photos", "photos/one.jpg"])
def test_what_is_not_ours_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("me")
    with pytest.raises(UsageError, match=r"^--to .* and stays as it is; name a new or empty directory$"):
        fill(tmp_path / name, "x")
    assert content(tmp_path) == {"photos/one.jpg": "me"}


def test_what_becomes_a_strangers_meanwhile_stays(tmp_path: Path) -> None:
    place = tmp_path / "site"

    def overtaken() -> None:
        with atomic.replace_directory(place, marker="mark", ours=OURS, option="--to"):
            place.mkdir()
            (place / "theirs").write_text("x")

    with pytest.raises(UsageError, match="not one of ours"):
        overtaken()
    assert content(place) == {"theirs": "x"}


def test_a_full_disk_or_a_read_only_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--to .*cannot be written \((Not a directory|File exists)\); choose another place"):
        fill(tmp_path / "file/site", "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from harness.machine import atomic
place = Path(sys.argv[1])
def stop(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "between":
    rename = Path.rename
    Path.rename = lambda self, to: (rename(self, to), stop())
with atomic.replace_directory(place, marker="mark", ours=frozenset({"mark", "page"}), option="--to") as folder:
    (folder / "page").write_text("half")
    if sys.argv[2] == "writing": stop()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
@pytest.mark.parametrize("moment", ["writing", "between"])
def test_after_a_kill_the_old_one_is_back_with_the_next_run(tmp_path: Path, moment: str) -> None:
    place = tmp_path / "site"
    fill(place, "first")
    (place / "CNAME").write_text("example.org")
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), moment], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError), atomic.replace_directory(place, marker="mark", ours=OURS, option="--to"):
        raise RuntimeError
    assert content(place) == {"CNAME": "example.org", "mark": "", "page": "first"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["site"]


def test_a_file_is_written_whole_with_its_folder_and_the_drafts_of_the_dead_go(tmp_path: Path) -> None:
    path = tmp_path / "new/page.html"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    atomic.write_text(path, "first\r\n")
    draft = path.parent / f".page.html.{dead.pid}"
    draft.write_text("half")
    atomic.write_bytes(path, b"second")
    assert content(path.parent) == {"page.html": "second"}


def test_what_cannot_be_written_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page/old").write_text("old")
    with pytest.raises(IsADirectoryError):
        atomic.write_text(tmp_path / "page", "new")
    assert content(tmp_path) == {"page/old": "old"}


def test_nothing_takes_the_place_of_the_root() -> None:
    with (
        pytest.raises(UsageError, match="--to / is the root of the file system"),
        atomic.replace_directory(Path("/"), marker="mark", ours=OURS, option="--to"),
    ):
        raise AssertionError
