"""The folder of a run: its own while it lives, gone when it ends, and taken away by the next one if it was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.machine import scratch
from harness.machine.scratch import Scratch, sweep

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from harness.machine.scratch import Scratch

made = Scratch(Path(sys.argv[1]))
(made.path / "case-1/offload").mkdir(parents=True)
(made.path / "case-1/offload/weights.dat").write_bytes(bytes(1000))
print(made.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another run with its folder."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    yield owner, Path(owner.stdout.readline().strip())
    owner.kill()
    owner.communicate()


def test_a_folder_is_new_and_goes(tmp_path: Path) -> None:
    one, two = Scratch(tmp_path), Scratch(tmp_path)
    assert one.path != two.path
    (one.path / "file").write_text("x")
    for made in (one, two, one):
        made.remove()
    assert not list(tmp_path.iterdir())


def test_a_living_run_s_folder_is_left_alone(tmp_path: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    Scratch(tmp_path).remove()
    assert (other[1] / "case-1/offload/weights.dat").exists()


def test_a_stopped_run_is_alive(tmp_path: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    other[0].send_signal(signal.SIGSTOP)
    Scratch(tmp_path).remove()
    assert (other[1] / "case-1/offload/weights.dat").exists()


def test_the_next_run_removes_a_dead_one_s_folder(tmp_path: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    other[0].kill()
    other[0].wait()
    made = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [made.path]
    made.remove()


def test_what_only_looks_like_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "fitmatrix-results").mkdir()
    (tmp_path / "fitmatrix-results/results.jsonl").write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".fitmatrix-scratch").write_text("")
    (tmp_path / "fitmatrix-link").symlink_to(elsewhere)
    sweep(tmp_path)
    assert (tmp_path / "fitmatrix-results/results.jsonl").exists()
    assert (elsewhere / ".fitmatrix-scratch").exists()


def test_links_in_a_dead_folder_are_not_followed(tmp_path: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (other[1] / "link").symlink_to(tmp_path / "precious")
    other[0].kill()
    other[0].wait()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious/file").exists()


def test_a_folder_taken_for_dead_at_its_birth_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, seen = scratch._locked_anew, []

    def late(lock: Path) -> int | None:
        seen.append(lock)
        if len(seen) == 1:
            shutil.rmtree(lock.parent)
        return locked(lock)

    monkeypatch.setattr(scratch, "_locked_anew", late)
    made = Scratch(tmp_path)
    assert made.path == seen[1].parent
    assert made.path.is_dir()
    made.remove()


def test_a_directory_that_the_user_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "_in_ram", lambda _: True)
    assert scratch.base_folder() == tmp_path


@pytest.mark.parametrize(("in_ram", "place"), [(set(), "usual"), ({"usual"}, "/var/tmp"), ({"usual", "/var/tmp"}, "usual")])
def test_files_do_not_lie_in_ram_if_it_can_be_helped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_ram: set[str], place: str
) -> None:
    places = {"usual": tmp_path, "/var/tmp": Path("/var/tmp")}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(scratch, "_in_ram", lambda folder: folder in {places[name] for name in in_ram})
    assert scratch.base_folder() == places[place]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in RAM here")
def test_a_file_system_in_ram_is_known(tmp_path: Path) -> None:
    assert scratch._in_ram(Path("/dev/shm"))
    assert not scratch._in_ram(ROOT)
    assert not scratch._in_ram(tmp_path / "missing")
