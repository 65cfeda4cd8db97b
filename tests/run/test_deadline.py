"""Limits of time: what counts for a case and its phases, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from harness.run import deadline
from harness.run.deadline import Deadline


class Clock:
    """A clock moved by hand: who looks waits as long as he may, and `stopped` seconds more at the looks named there."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looks = 0

    def looker(self, *, stopped: dict[int, float] | None = None, answer_at: float = math.inf) -> Callable[[float], Sequence[str]]:
        """Return a look that finds something once the clock shows `answer_at`."""

        def look(most_s: float) -> Sequence[str]:
            self.looks += 1
            end_s = self.now_s + most_s + (stopped or {}).get(self.looks, 0.0)
            self.now_s = max(self.now_s, min(end_s, answer_at)) if not stopped else end_s
            return ["an answer"] if self.now_s >= answer_at else []

        return look


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("harness.run.deadline.time.monotonic", lambda: clock.now_s)
    return clock


def test_an_answer_in_time_is_found(clock: Clock) -> None:
    limits = Deadline(case_s=10)
    assert limits.wait(clock.looker(answer_at=3.5)) == ["an answer"]
    assert limits.left_s == pytest.approx(6.5)


@pytest.mark.parametrize(("case_s", "phase_s", "reached", "after_s"), [(5, 60, "timeout", 5), (60, 5, "phase timeout", 5)])
def test_the_limit_that_is_reached_is_known(clock: Clock, case_s: float, phase_s: float, reached: str, after_s: float) -> None:
    limits = Deadline(case_s=case_s, phase_s=phase_s)
    assert not limits.wait(clock.looker())
    assert limits.reached == reached
    assert limits.limit_s(reached) == after_s
    assert clock.now_s == pytest.approx(after_s)


def test_a_phase_begins_anew_and_the_case_goes_on(clock: Clock) -> None:
    limits = Deadline(case_s=10, phase_s=4)
    for number in (1, 2, 3):
        limits.begin_phase()
        found = limits.wait(clock.looker(answer_at=3.5 * number))
        assert bool(found) is (number < 3)
    assert limits.reached == "timeout"


def test_time_between_two_waits_does_not_count(clock: Clock) -> None:
    limits = Deadline(case_s=10)
    limits.wait(clock.looker(answer_at=1))
    clock.now_s += 3600
    assert limits.left_s == pytest.approx(9)


def test_time_in_which_we_stood_still_does_not_count(clock: Clock) -> None:
    limits = Deadline(case_s=10)
    assert not limits.wait(clock.looker(stopped={3: 3600.0}))
    assert clock.now_s == pytest.approx(3610)


def test_being_a_little_late_counts(clock: Clock) -> None:
    """A busy machine is no excuse."""
    limits = Deadline(case_s=10)
    assert not limits.wait(clock.looker(stopped=dict.fromkeys(range(1, 100), deadline._LATE_S / 2)))
    assert clock.now_s < 11.5


def test_an_answer_that_came_while_we_were_stopped_is_found_though_time_is_over() -> None:
    limits = Deadline(case_s=0)
    assert limits.wait(lambda _: ["an answer"]) == ["an answer"]


def test_waiting_wakes_up_once_a_second(clock: Clock) -> None:
    """More would disturb what is measured."""
    Deadline(case_s=60).wait(clock.looker())
    assert clock.looks <= 61
