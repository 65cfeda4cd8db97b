"""What a case tells who watches: beats that cost next to nothing, and files that nobody trips over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.core.records import Workload, encode_record
from harness.measure import beacon, sampler
from harness.measure.beacon import Announced, Beat, Pulse
from harness.measure.sampler import Memory


def none() -> dict[str, tuple[int, int]]:
    return {}


def test_a_beat_says_phase_tokens_and_what_torch_holds(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, lambda: {"gpu:0": (5, 7)})
    pulse.begin("cold")
    pulse.prompt(64, batch=2)
    found = beacon.last_beat(tmp_path)
    assert found is not None
    assert (found.phase, found.tokens, found.made, found.vram) == ("cold", 63, 0, {"gpu:0": (5, 7)})


def test_tokens_are_told_four_times_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("harness.measure.beacon.time.monotonic", lambda: now[0])
    asked: list[float] = []
    pulse = Pulse(tmp_path, lambda: asked.append(now[0]) or {})  # type: ignore[func-returns-value]  # it notes when it is asked
    pulse.begin("warm")
    pulse.prompt(10, batch=3)
    for _ in range(1000):
        now[0] += 0.01
        pulse.token()
    assert len(asked) == 2 + 40
    now[0] += 0.01
    pulse.token()
    pulse.finish()
    found = beacon.last_beat(tmp_path)
    assert found is not None
    assert found.tokens == 9 + found.made // 3 == 1010


def test_memory_is_noted_before_loading_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([1, 2])
    monkeypatch.setattr(sampler, "memory", lambda _: Memory(ram_bytes=(size := next(sizes)), anon_bytes=size))
    pulse = Pulse(tmp_path, none)
    for phase in ("import", "load", "cold", "warm"):
        pulse.begin(phase)
    found = beacon.last_beat(tmp_path)
    assert found is not None
    assert (found.start, found.loaded) == (Memory(ram_bytes=1, anon_bytes=1), Memory(ram_bytes=2, anon_bytes=2))


def test_a_folder_that_takes_no_file_is_done_without(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "gone", none)
    pulse.begin("load")
    pulse.prompt(5)
    pulse.token()
    assert beacon.last_beat(tmp_path / "gone") is None


def test_a_disk_that_is_full_ends_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    pulse = Pulse(tmp_path, none)
    monkeypatch.setattr(os, "write", full)
    pulse.begin("load")


def test_of_several_processes_the_cards_are_put_together_and_the_memory_added(tmp_path: Path) -> None:
    """The process that leads the others loads nothing, and its beat says so."""
    memory = Memory(ram_bytes=100, anon_bytes=60)
    for pid, at_s, start, vram in ((1, 0.0, None, {}), (2, 5.0, memory, {"gpu:0": (1, 2)}), (3, 6.0, memory, {"gpu:1": (3, 4)})):
        beat = Beat(phase="warm", begun_s=0, at_s=at_s, tokens=pid, start=start, vram=vram)
        (tmp_path / f"pulse-{pid}").write_bytes(encode_record(beat))
    found = beacon.last_beat(tmp_path)
    assert found is not None
    assert (found.tokens, found.vram) == (3, {"gpu:0": (1, 2), "gpu:1": (3, 4)})
    assert found.start == Memory(ram_bytes=160, anon_bytes=120)


@pytest.mark.parametrize("text", [b"", b"{", b'{"phase": 5}', b"\xff\xfe", b"[]"])
def test_what_is_no_beat_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "pulse-1").write_bytes(text)
    (tmp_path / beacon.ANNOUNCED).write_bytes(text)
    assert beacon.last_beat(tmp_path) is None
    assert beacon.announced(tmp_path) is None


def test_an_announcement_is_read_as_it_was_made(tmp_path: Path) -> None:
    what = Announced(case="tiny/bf16/cpu", workload=Workload(), device_map={"": "cpu"}, results="results")
    beacon.announce(tmp_path, what)
    assert beacon.announced(tmp_path) == what
