"""Frames one after the other: bounded however long, saved beside the results, and over when the process is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.live import reading
from harness.live.moment import frame
from harness.live.reading import Reading, Sensors
from harness.live.stream import Recording, Stream, frames
from harness.live.subject import Subject, WatchTarget
from harness.machine.scratch import Scratch
from harness.measure.beacon import Announced
from tests.live import moments


class Scripted:
    """Sensors that read a list, and a target that is always the same process until the list ends."""

    def __init__(self, readings: list[Reading], said: Announced | None) -> None:
        self._left, self._said = readings[::-1], said

    def look(self) -> Subject:
        if not self._left:
            raise ProcessLookupError(4242)
        return Subject(pid=4242, pids=(4242,))

    def read(self, _: Subject | None) -> Reading:
        return self._left.pop()

    def announced(self, _: Subject | None) -> Announced | None:
        return self._said


def stream(readings: list[Reading], said: Announced | None = None) -> Stream:
    both = Scripted(readings, said)
    return Stream(both, both)  # type: ignore[arg-type]  # what a stream needs of them


def test_frames_come_until_the_process_has_ended() -> None:
    readings, said = moments.recorded()
    found = list(frames(stream(readings, said), 0.0))
    assert len(found) == len(readings)
    assert found[-1] == frame(readings, said)


def test_ten_thousand_frames_take_no_more_memory_than_a_few_minutes() -> None:
    readings = [moments.reading(float(second), beat=moments.beat(second + 1, float(second))) for second in range(10_000)]
    watched, kept = stream(readings, moments.announced()), Recording(most=100)
    for one in frames(watched, 0.0):
        kept.add(one)
    assert len(watched._readings) <= 240
    assert 50 <= len(kept) <= 100


def test_a_long_recording_is_thinned_evenly_and_keeps_its_beginning(tmp_path: Path) -> None:
    kept = Recording(most=8)
    for second in range(100):
        kept.add(frame([moments.reading(float(second))]))
    lines = kept.save(tmp_path, "2026-11-29T12:00:00+00:00").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["at_s"] for line in lines] == [16.0 * step for step in range(7)]


def test_what_is_read_of_one_case_says_nothing_of_the_next() -> None:
    readings = [moments.reading(0.0, pid=1, beat=moments.beat(5)), moments.reading(1.0, pid=2, beat=moments.beat(9, 1.0))]
    watched = stream(readings, moments.announced())
    watched.next_frame()
    assert watched.next_frame().tokens_per_s is None


def test_it_is_saved_beside_results_that_stay_and_else_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    kept = Recording()
    kept.add(frame([moments.reading()]))
    with Scratch(tmp_path) as run:  # as the results of a chat
        assert kept.save(run, "2026-11-29T12:00:00+00:00") == here / "watch-20261129T120000.jsonl"
    assert kept.save(None, "2026-11-29T12:00:01+00:00").parent == here
    assert kept.save(tmp_path / "gone", "2026-11-29T12:00:02+00:00").parent == here
    assert kept.save(tmp_path, "2026-11-29T12:00:03+00:00").parent == tmp_path


def test_this_process_is_read_as_it_is() -> None:
    with reading.sensors() as sensors:
        found = Stream(WatchTarget(os.getpid()), sensors).next_frame()
    assert found.pid == os.getpid()
    (ram,) = [one for one in found.tiers if one.name == "cpu"]
    assert ram.process_bytes is not None
    assert ram.process_bytes > 10 << 20
    assert sum(ram.parts.values()) == ram.total_bytes


def test_a_card_that_vanishes_is_gone_from_then_on() -> None:
    class Cards:
        """NVML of a card that answers once."""

        left = 1

        def ask(self, call: str, *_: object) -> dict[str, object]:
            if call != "nvmlDeviceGetMemoryInfo" or not self.left:
                return {}
            self.left -= 1
            return {"gpu:0": type("Memory", (), {"total": 100, "used": 10})}

        def process_bytes(self, *_: int) -> dict[str, int]:
            return {}

    sensors = Sensors(Cards())  # type: ignore[arg-type]  # what sensors need of the cards
    assert next(one.name for one in frame([sensors.read(None)]).tiers if not one.is_gone) == "gpu:0"
    for _ in range(2):
        assert frame([sensors.read(None)]).tiers[0].is_gone


class SlowClock:
    """A clock that the tests move; what is slept is noted."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_machine_that_slept_is_not_caught_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SlowClock()
    monkeypatch.setattr("harness.live.stream.time", clock)

    class Sleeper:
        def next_frame(self) -> None:
            clock.now += 60.0 if not clock.slept else 0.0

    shown = frames(Sleeper(), 1.0)  # type: ignore[arg-type]  # a stream without sensors
    for _ in range(4):
        next(shown)
    assert clock.slept == [0.0, 1.0, 1.0]
