"""A cache is a convenience: whatever fails in it, the answer is the same, and nobody sees a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from harness.architecture import skeleton_source, traces
from harness.core.records import Machine
from harness.machine import bandwidth
from harness.machine.cache import cache_dir, keep, kept, kept_names
from harness.planning import calibration
from harness.planning.calibrating import kept_calibration

Figures = dict[str, float]


def make_file(place: Path) -> None:
    place.write_text("a file where the cache should be")


def make_folders_of_files(place: Path) -> None:
    for name in ("bandwidth.json", "calibration.json"):
        (place / name).mkdir(parents=True)


def make_loop(place: Path) -> None:
    place.symlink_to(place)


def make_sealed(place: Path) -> None:
    place.mkdir(mode=0)


def make_pipes(place: Path) -> None:
    place.mkdir()
    for name in ("bandwidth.json", "calibration.json"):
        os.mkfifo(place / name)


def make_devices(place: Path) -> None:
    place.mkdir()
    for name in ("bandwidth.json", "calibration.json"):
        (place / name).symlink_to("/dev/zero")


BROKEN: dict[str, Callable[[Path], None]] = {
    "a file": make_file,
    "folders for files": make_folders_of_files,
    "a link to itself": make_loop,
    "no right to enter": make_sealed,
    "pipes for files": make_pipes,
    "devices for files": make_devices,
}
DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"a": "\xff"}',
    b'{"a": [1]}',
    b"[" * 100_000,
    b"null",
    b'"text"',
    b'{"ram, x": 0}',
    b"\0" * 64,
]


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    BROKEN[request.param](place)
    monkeypatch.setenv("FITMATRIX_CACHE", str(place))
    return place


def test_a_cache_that_is_none_keeps_nothing_and_stops_nobody(broken: Path) -> None:
    config = {"model_type": "nobody_s", "hidden_size": 8}
    keep(broken / "bandwidth.json", b"{}")
    assert bandwidth.ram("x", 1, 0) is None
    assert bandwidth.gpu_context("x", 123) == 123
    assert skeleton_source.at_hand(config, cache_dir()) is None
    assert traces.record_for(config, "bf16", cache_dir()) is None
    found = kept_calibration.corrected((), Machine(name="x", tiers=()))
    assert found.constants == calibration.default().constants


def test_a_skeleton_that_cannot_be_kept_is_answered(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = skeleton_source.named("smollm2-135m")
    monkeypatch.setattr(skeleton_source, "ask_worker", lambda *_: msgspec.json.encode(answer))
    assert skeleton_source.build({"model_type": "nobody_s"}, broken) == answer


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:14]))
def test_a_damaged_file_is_not_there(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    for name in ("bandwidth.json", "calibration.json"):
        (tmp_path / name).write_bytes(data)
    assert bandwidth.ram("x", 1, 0) is None
    assert not kept(tmp_path / "bandwidth.json", list[int])
    assert kept_calibration.corrected((), Machine(name="x", tiers=())).fitted == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "write_bytes", "open", "replace", "glob", "unlink"])
def test_every_call_may_fail_in_every_way(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "figures", b'{"a": 1}')

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os if call == "open" else Path, call, fail)
        keep(tmp_path / "figures", b'{"a": 2}')
        assert kept(tmp_path / "figures", Figures) in (None, {"a": 1}, {"a": 2})
    assert kept(tmp_path / "figures", Figures) in ({"a": 1}, {"a": 2}), "what was kept stays whole"


def test_names_that_cannot_be_listed_are_none(tmp_path: Path) -> None:
    assert kept_names(tmp_path / "none") == []


@pytest.mark.parametrize("named", ["~nobody-of-this-name/x", "relative"])
def test_any_name_is_a_place(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("FITMATRIX_CACHE", named)
    assert cache_dir().name == named.rpartition("/")[2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (("models",), ""),
        (("models",), "1"),
        (("plan", "smollm2-135m"), ""),
        (("plan", "smollm2-135m", "--json"), "1"),
        (("--help",), ""),
    ],
)
def test_a_full_standard_output_is_one_sentence(words: tuple[str, ...], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr == "fitmatrix: standard output cannot be written (No space left on device)\n"


def test_without_a_temporary_directory_a_plan_is_made() -> None:
    script = (
        "import os, sys, tempfile\n"
        "tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"
        "from harness.cli.entry import main\n"
        "from harness.core.redact import clean_text\n"
        "assert clean_text('text') == 'text'\n"
        "sys.exit(main(['plan', 'smollm2-135m', '--ram', '32GiB']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
