"""Bandwidth: measured for real, kept in the cache, never a reason to fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.core.units import MIB
from harness.machine import bandwidth


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The place of the cache, not made yet."""
    place = tmp_path / "cache"
    monkeypatch.setenv("FITMATRIX_CACHE", str(place))
    return place


def test_ram_is_read_at_some_speed() -> None:
    figure = bandwidth.measure_ram(2, 8 * MIB)
    assert figure is not None
    assert figure > 1e8


def test_disk_is_read_at_some_speed_and_left_clean(tmp_path: Path) -> None:
    figure = bandwidth.measure_disk(tmp_path, 2 * MIB)
    assert figure is None or figure > 1e5
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_not_waited_for(tmp_path: Path) -> None:
    """One block is written at least, so that there is something to read."""
    figure = bandwidth.measure_disk(tmp_path, patience_s=0)
    assert figure is None or figure > 1e5


def test_without_numpy_ram_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert bandwidth.measure_ram(1, MIB) is None


def test_without_room_nothing_is_taken(tmp_path: Path) -> None:
    assert bandwidth.measure_ram(1, 0) is None
    assert bandwidth.measure_disk(tmp_path, 0) is None


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    assert bandwidth.measure_disk(tmp_path / "absent") is None


def test_a_system_that_cannot_leave_the_cache_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    assert bandwidth.measure_disk(tmp_path, MIB) is None


def test_measured_once_and_again_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([2e9, 5e9])
    monkeypatch.setattr(bandwidth, "measure_ram", lambda *_: next(figures))
    assert bandwidth.ram("this cpu", 2, MIB) is None
    assert bandwidth.ram("this cpu", 2, MIB, measure=True) == 2e9
    assert bandwidth.ram("this cpu", 2, MIB) == 2e9
    assert bandwidth.ram("this cpu", 2, MIB, measure=True) == 5e9
    assert bandwidth.ram("this cpu", 2, MIB) == 5e9
    assert bandwidth.ram("another cpu", 2, MIB) is None


class Busy:
    """Processors that others took whole, for as many measurements as are said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *loads: float) -> None:
        clock, worked = [0.0], [0.0]
        self._loads, self._clock, self._worked = iter(loads), clock, worked
        monkeypatch.setattr("time.monotonic", lambda: clock[0])
        monkeypatch.setattr("time.process_time", lambda: 0.0)
        monkeypatch.setattr(bandwidth, "_busy_s", lambda: worked[0])
        monkeypatch.setattr("os.cpu_count", lambda: 2)

    def pass_second(self) -> None:
        self._clock[0] += 1
        self._worked[0] += 2 * next(self._loads)


def test_what_was_measured_under_load_is_marked_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, figures = Busy(monkeypatch, 0.5, 0.5, 0.05, 0.5), iter([2e9, 1e9, 9e9, 3e9])

    def measured(*_: int) -> float:
        busy.pass_second()
        return next(figures)

    monkeypatch.setattr(bandwidth, "measure_ram", measured)
    assert not bandwidth.is_under_load("ram", "cpu")
    assert bandwidth.ram("cpu", 2, MIB, measure=True) == 2e9
    assert bandwidth.is_under_load("ram", "cpu")
    assert bandwidth.ram("cpu", 2, MIB, measure=True) == 2e9  # load only takes: what is more is nearer
    assert bandwidth.ram("cpu", 2, MIB, measure=True) == 9e9
    assert not bandwidth.is_under_load("ram", "cpu")
    assert bandwidth.ram("cpu", 2, MIB, measure=True) == 9e9
    assert bandwidth.ram("cpu", 2, MIB) == 9e9
    assert not bandwidth.is_under_load("ram", "cpu")


def test_a_busy_processor_is_noticed() -> None:
    """The processors' times are the system's: those of all of them, in which our own are included."""
    with bandwidth.OthersAtWork() as others:
        pass
    assert not others.are_many
    assert bandwidth._busy_s() > 0


def test_ram_and_disk_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "measure_ram", lambda *_: 2e9)
    monkeypatch.setattr(bandwidth, "measure_disk", lambda *_: 1e9)
    bandwidth.ram("same", 1, MIB, measure=True)
    bandwidth.disk("same", tmp_path, MIB, measure=True)
    assert (bandwidth.ram("same", 1, MIB), bandwidth.disk("same", tmp_path, MIB)) == (2e9, 1e9)


def test_a_failed_measurement_does_not_forget_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "measure_disk", lambda *_: 1e9)
    bandwidth.disk("device", tmp_path, MIB, measure=True)
    monkeypatch.setattr(bandwidth, "measure_disk", lambda *_: None)
    assert bandwidth.disk("device", tmp_path, MIB, measure=True) is None
    assert bandwidth.disk("device", tmp_path, MIB) == 1e9


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"ram, this cpu": "fast"}', b"\xff\xfe"])
def test_a_damaged_cache_is_empty_and_is_mended(monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes) -> None:
    monkeypatch.setattr(bandwidth, "measure_ram", lambda *_: 2e9)
    cache.mkdir()
    (cache / "bandwidth.json").write_bytes(content)
    assert bandwidth.ram("this cpu", 1, MIB) is None
    bandwidth.ram("this cpu", 1, MIB, measure=True)
    assert bandwidth.ram("this cpu", 1, MIB) == 2e9
    assert [file.name for file in cache.iterdir()] == ["bandwidth.json"]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(bandwidth, "measure_ram", lambda *_: 2e9)
    cache.write_text("a file where the folder should be")
    assert bandwidth.ram("this cpu", 1, MIB, measure=True) == 2e9
    assert bandwidth.ram("this cpu", 1, MIB) is None


def test_without_the_variable_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FITMATRIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(bandwidth, "measure_ram", lambda *_: 2e9)
    bandwidth.ram("this cpu", 1, MIB, measure=True)
    assert len(list(tmp_path.rglob("bandwidth.json"))) == 1
