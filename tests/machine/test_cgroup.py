"""Groups of our own: the kernel kills at the limit, page cache counts, and nothing stays behind."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.units import GIB, MIB
from harness.machine import cgroup
from harness.machine.cgroup import ControlGroup

TAKE = "import sys; sys.stdin.readline(); held = b'x' * int(sys.argv[1]); print(len(held))"
READ = "import sys; sys.stdin.readline(); print(len(open(sys.argv[1], 'rb').read()))"
needs_groups = pytest.mark.skipif(not cgroup.is_allowed(), reason="no control group can be made here")


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    made = cgroup.group(64 * MIB)
    assert made is not None
    yield made
    made.remove()
    assert not made._folder.exists()


def run_in(group: ControlGroup, code: str, argument: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program that waits for a line before it does anything, and put it into the group meanwhile."""
    command = [sys.executable, "-c", code, str(argument)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert group.add(process.pid)
        out, _ = process.communicate(b"go\n")
    return subprocess.CompletedProcess(command, process.returncode, out)


@needs_groups
def test_what_stays_below_the_limit_lives(group: ControlGroup) -> None:
    assert run_in(group, TAKE, 32 * MIB).returncode == 0
    assert group.oom_kills == 0


@needs_groups
def test_the_kernel_kills_what_passes_the_limit_and_counts_it(group: ControlGroup) -> None:
    assert run_in(group, TAKE, 200 * MIB).returncode == -signal.SIGKILL
    assert group.oom_kills == 1


@needs_groups
def test_files_count_once_they_are_forgotten(tmp_path: Path) -> None:
    """A page is charged to who reads it first: without forgetting, that was who wrote the file."""
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (24 * MIB))
    peaks = []
    for forget in (False, True):
        other = cgroup.group(GIB)
        assert other is not None
        if forget:
            cgroup.forget_files(tmp_path)
        run_in(other, READ, file)
        peaks.append(other.peak_bytes or 0)
        other.remove()
    assert peaks[1] - peaks[0] > 20 * MIB


def test_pages_that_another_maps_cannot_be_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (4 * MIB))
    (tmp_path / "empty").touch()
    assert cgroup.forget_files(tmp_path) == 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(mapped.read()) == 4 * MIB
        assert cgroup.forget_files(tmp_path) == 4 * MIB
    assert cgroup.forget_files(tmp_path) == 0


def test_a_file_that_tells_nothing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"x" * MIB)
    seen: list[int] = []

    def refuse(descriptor: int) -> None:
        seen.append(descriptor)
        raise OSError(errno.EINVAL, "a file system without fsync")

    monkeypatch.setattr(os, "fsync", refuse)
    assert cgroup.forget_files(tmp_path) == 0
    assert len(seen) == 2


@needs_groups
def test_a_limit_below_what_is_held_does_not_pass_for_one_that_holds(group: ControlGroup) -> None:
    hold = "import sys; sys.stdin.readline(); held = b'x' * (40 << 20); print('held', flush=True); sys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert group.add(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        print("go", file=process.stdin, flush=True)
        process.stdout.readline()
        holds = group.limit(8 * MIB)
        process.kill()
    assert not holds or group.oom_kills


@needs_groups
def test_what_a_dead_run_left_is_removed_by_the_next() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from harness.machine import cgroup; print(cgroup.group(1 << 30)._folder)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    left = Path(done.stdout.strip())
    assert left.is_dir()
    mine = cgroup.group(GIB)
    other = cgroup.group(GIB)
    assert mine is not None
    assert other is not None
    assert not left.exists()
    assert mine._folder.exists()
    mine.remove()
    other.remove()
    other.remove()


def test_a_run_that_was_killed_has_its_groups_removed_and_no_others(tmp_path: Path) -> None:
    ours = tmp_path / "sys/fs/cgroup/app.slice/run.scope"
    ours.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/app.slice/run.scope\n")
    (tmp_path / "proc/self/mountinfo").write_text("35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    (ours.parent / "cgroup.subtree_control").write_text("memory\n")
    for name in ("fitmatrix-12-0", "fitmatrix-12-1", "fitmatrix-123-0"):
        (ours.parent / name).mkdir()
    cgroup.remove_groups_of(12, tmp_path)
    assert {path.name for path in ours.parent.glob("fitmatrix-*")} == {"fitmatrix-123-0"}


def test_no_hierarchy_no_group(tmp_path: Path) -> None:
    assert cgroup.group(GIB, tmp_path) is None


def test_under_v2_a_group_stands_where_memory_is_handed_down(tmp_path: Path) -> None:
    """The layout of a user's session: nothing may stand below our own group, which holds processes, but beside it."""
    ours = tmp_path / "sys/fs/cgroup/user.slice/app.slice/run.scope"
    ours.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/app.slice/run.scope\n")
    (tmp_path / "proc/self/mountinfo").write_text("35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    (ours / "cgroup.subtree_control").write_text("\n")
    (ours.parent / "cgroup.subtree_control").write_text("memory pids\n")
    made = cgroup.group(GIB, tmp_path)
    assert made is not None
    assert made._folder.parent == ours.parent
    assert made.add(os.getpid())
    said = {name: (made._folder / name).read_text() for name in ("memory.max", "memory.swap.max", "cgroup.procs")}
    assert said == {"memory.max": str(GIB), "memory.swap.max": "0", "cgroup.procs": str(os.getpid())}
