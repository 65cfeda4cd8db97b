"""The search over releases: what it measures, what it skips, and what it says where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.errors import UsageError
from harness.core.records import Outcome, Quality, Result, Verdict
from harness.core.units import MIB
from harness.fleet.bisect.search import ATTEMPTS, END, BisectAnswer, Bisection, Side, Unmeasured, known_figure
from harness.results.compare import thresholds
from tests.support import builders

RELEASES = tuple(f"1.{number}" for number in range(12))
LIMITS = thresholds({})
Figures = Callable[[int], Mapping[str, Any]]


def needs(*mib: float) -> Figures:
    """RAM by number of the release; the last figure holds for all that follow."""
    return lambda number: {"metrics": {"ram_needed_bytes": mib[min(number, len(mib) - 1)] * MIB}}


class ScriptedReleases:
    """Shows a case with releases as a function of their number says; `wrong` has those that cannot be measured."""

    def __init__(self, figures: Figures, wrong: Sequence[str] = ()) -> None:
        self.figures, self.wrong = figures, wrong
        self.asked: list[str] = []

    def __call__(self, release: str, attempt: int) -> Result:
        assert attempt == self.asked.count(release)
        self.asked.append(release)
        if release in self.wrong:
            raise Unmeasured("cannot be installed")
        return builders.result(**self.figures(RELEASES.index(release)))


def searched(figures: Figures, wrong: Sequence[str] = (), figure: str | None = None) -> tuple[BisectAnswer, list[str]]:
    scripted = ScriptedReleases(figures, wrong)
    return Bisection(RELEASES, scripted, LIMITS, figure).run(), scripted.asked


@given(st.integers(1, len(RELEASES) - 1), st.booleans())
def test_a_change_is_found_wherever_it_is_and_whichever_way_it_goes(first_bad: int, is_worse: bool) -> None:
    before, after = (100, 110) if is_worse else (110, 100)
    answer, asked = searched(needs(*[before] * first_bad, after))
    assert (answer.last_good, answer.first_bad) == (RELEASES[first_bad - 1], RELEASES[first_bad])
    assert answer.is_exact
    assert len(set(asked)) <= 2 + 4  # both ends, and the logarithm of what is between
    sides = {one.release: one.side for one in answer.tried}
    assert sides == {name: Side.BAD if RELEASES.index(name) >= first_bad else Side.GOOD for name in asked}
    # A figure without samples does not show how noisy it is: what is beyond the threshold is measured twice.
    assert all(asked.count(name) == (2 if side is Side.BAD or name == RELEASES[0] else 1) for name, side in sides.items())


def test_it_says_the_figure_and_how_it_changed() -> None:
    answer, _ = searched(needs(100, 100, 110))
    assert answer.figure == "ram_needed_bytes"
    assert answer.said == "RAM needed 110 MiB, was 100 MiB (+10.0 %)"
    (bad,) = [one for one in answer.tried if one.release == "1.2"]
    assert bad.value == 110 * MIB
    assert bad.change == pytest.approx(0.1)


def test_it_tells_how_many_releases_are_left_and_in_how_many_steps_they_are_searched() -> None:
    told: list[str] = []
    Bisection(RELEASES, ScriptedReleases(needs(*[100] * 4, 110)), LIMITS, None, told.append).run()
    assert [one for one in told if "left" in one] == [
        "10 left between 1.0 and 1.11, about 4 steps",
        "4 left between 1.0 and 1.5, about 3 steps",
        "2 left between 1.2 and 1.5, about 2 steps",
        "1 left between 1.3 and 1.5, about 1 step",
    ]


def test_ends_that_are_alike_by_the_gates_rule_end_it() -> None:
    answer, asked = searched(needs(100, 104))
    assert asked == [RELEASES[0], RELEASES[-1]]
    assert answer.said == "nothing changed from 1.0 to 1.11 by the gate's rule"
    assert (answer.is_changed, answer.is_exact, answer.is_over) == (False, False, True)
    assert {one.side for one in answer.tried} == {Side.GOOD}


def test_the_threshold_is_that_of_the_gate() -> None:
    scripted = ScriptedReleases(needs(100, 104))
    assert Bisection(RELEASES, scripted, thresholds({"memory": 0.03})).run().first_bad == "1.1"


def test_a_figure_that_is_named_is_followed_and_the_others_are_told() -> None:
    def figures(number: int) -> Mapping[str, Any]:
        return {"metrics": {"ram_needed_bytes": 100 + 20 * (number > 2), "perplexity": 9 - 2 * (number > 6)}}

    answer, _ = searched(figures)
    assert (answer.figure, answer.first_bad, answer.also) == ("ram_needed_bytes", "1.3", ("perplexity",))
    answer, _ = searched(figures, figure="perplexity")
    assert (answer.figure, answer.first_bad, answer.also) == ("perplexity", "1.7", ("ram_needed_bytes",))
    answer, asked = searched(figures, figure="ready_s")
    assert answer.said == "there is no ready_s: nothing changed from 1.0 to 1.11 by the gate's rule"
    assert (answer.figure, answer.is_changed, len(asked)) == ("ready_s", False, 2)
    answer, asked = searched(needs(100, 104), figure="ram_needed_bytes")
    assert answer.said == "ram_needed_bytes did not change from 1.0 to 1.11 by the gate's rule"
    assert [one.value for one in answer.tried] == [100 * MIB, 104 * MIB]
    with pytest.raises(UsageError, match="--figure perplexty: did you mean 'perplexity'"):
        known_figure("perplexty")
    assert [known_figure(name) for name in (None, END, "perplexity")] == [None, END, "perplexity"]


@pytest.mark.parametrize("middle", ["wrong", "crash"])
def test_what_cannot_be_measured_is_skipped_and_the_answer_may_be_a_range(middle: str) -> None:
    def figures(number: int) -> Mapping[str, Any]:
        if middle == "crash" and number in (5, 6):
            return {"outcome": Outcome.CRASH, "why": "something else"}
        return needs(*[100] * 6, 110)(number)

    answer, _ = searched(figures, ("1.5", "1.6") if middle == "wrong" else ())
    assert (answer.last_good, answer.first_bad, answer.between) == ("1.4", "1.7", ("1.5", "1.6"))
    assert answer.is_over
    assert not answer.is_exact
    why = {one.release: one.why for one in answer.tried if one.side is Side.SKIPPED}
    said = "cannot be installed" if middle == "wrong" else "shows no ram_needed_bytes: crash: something else"
    assert why == {"1.5": said, "1.6": said}


def test_what_is_skipped_beside_the_change_does_not_widen_it() -> None:
    answer, _ = searched(needs(*[100] * 9, 110), ("1.5", "1.6"))
    assert (answer.last_good, answer.first_bad, answer.is_exact) == ("1.8", "1.9", True)


def test_how_a_case_ends_is_followed_before_any_figure() -> None:
    def figures(number: int) -> Mapping[str, Any]:
        return {"outcome": Outcome.OOM, "why": "too much"} if number > 7 else needs(100)(number)

    answer, _ = searched(figures)
    assert (answer.figure, answer.last_good, answer.first_bad) == (END, "1.7", "1.8")
    assert answer.said == "worked, and now oom: too much"


def test_another_end_than_that_of_the_bad_release_is_skipped() -> None:
    def figures(number: int) -> Mapping[str, Any]:
        ends = {5: Outcome.CRASH, 4: Outcome.SKIPPED}
        return {"outcome": Outcome.OOM} if number > 7 else {"outcome": ends[number]} if number in ends else needs(100)(number)

    answer, asked = searched(figures)
    assert asked[2:4] == ["1.5", "1.6"]
    assert (answer.last_good, answer.first_bad, answer.is_exact) == ("1.7", "1.8", True)
    assert [one.why for one in answer.tried if one.why] == ["ends otherwise: crash"]


def test_answers_that_broke_are_an_end() -> None:
    def figures(number: int) -> Mapping[str, Any]:
        verdict = "broken" if number > 3 else "sound"
        return {**needs(100)(number), "quality": Quality(probe="1", verdict=verdict, why="no sense")}

    answer, _ = searched(figures)
    assert (answer.figure, answer.first_bad) == (END, "1.4")
    assert "answers were sound, and now are broken" in answer.said


@pytest.mark.parametrize(("odd", "side"), [((110, 100, 100), Side.GOOD), ((110, 100, 110), Side.BAD)])
def test_one_odd_measurement_of_memory_decides_nothing(odd: Sequence[float], side: Side) -> None:
    left = [*odd]

    def figures(number: int) -> Mapping[str, Any]:
        return {"metrics": {"ram_needed_bytes": (left.pop(0) if number == 5 else 110 if number > 7 else 100) * MIB}}

    answer, asked = searched(figures)
    assert next(one.side for one in answer.tried if one.release == "1.5") is side
    assert asked.count("1.5") == 3


def test_an_odd_measurement_of_an_end_is_no_change() -> None:
    ram = iter([100, 110, 100, 100])
    scripted = ScriptedReleases(lambda _: {"metrics": {"ram_needed_bytes": next(ram) * MIB}})
    answer = Bisection(RELEASES, scripted, LIMITS).run()
    assert answer.said == "nothing changed from 1.0 to 1.11 by the gate's rule"
    assert scripted.asked == ["1.0", "1.11"] * 2


def noisy(times: int, number_of: int) -> Callable[[], Figures]:
    """Speed that falls at release 1.4, of which one release is disturbed the first few times that it is measured."""

    def made() -> Figures:
        seen: list[int] = []

        def figures(number: int) -> Mapping[str, Any]:
            seen.append(number)
            is_noisy = number == number_of and seen.count(number) <= times
            tok_s = 10.0 if number < 4 else 5.0
            return {
                "metrics": {"decode_tok_s": tok_s},
                "samples": {"decode_tok_s": [tok_s] * 5},
                "noisy": {"decode_tok_s": "others"} if is_noisy else {},
            }

        return figures

    return made


def test_a_noisy_figure_is_measured_again_before_it_counts() -> None:
    answer, asked = searched(noisy(1, 5)())
    assert asked.count("1.5") == 2
    assert (answer.last_good, answer.first_bad, answer.is_exact) == ("1.3", "1.4", True)


def test_a_release_that_stays_noisy_is_skipped() -> None:
    answer, asked = searched(noisy(99, 4)())
    assert asked.count("1.4") == ATTEMPTS
    assert (answer.last_good, answer.first_bad, answer.between) == ("1.3", "1.5", ("1.4",))
    assert [one.why for one in answer.tried if one.why] == [f"too noisy to judge after {ATTEMPTS} measurements"]


@pytest.mark.parametrize("end", [0, 11])
def test_both_ends_are_measured_again_until_the_rule_is_sure(end: int) -> None:
    answer, asked = searched(noisy(1, end)())
    assert (asked.count("1.0"), asked.count("1.11")) == (2, 2)
    assert answer.first_bad == "1.4"
    answer, asked = searched(noisy(99, end)())
    assert len(asked) == 2 * ATTEMPTS
    assert not answer.is_changed
    assert answer.said == "decode_tok_s may have changed from 1.0 to 1.11 and is too noisy to tell: measure on a quiet machine"


def test_an_end_that_cannot_be_measured_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^--good 1\.0: cannot be installed; name a release near it$"):
        searched(needs(100), ["1.0"])
    with pytest.raises(UsageError, match=r"^--bad 1\.11: cannot be installed"):
        searched(needs(100), ["1.11"])
    with pytest.raises(UsageError, match=r"^--good 1\.0: the case does not work with it \(oom: too big\)"):
        searched(lambda _: {"outcome": Outcome.OOM, "why": "too big"})
    unavailable = {"outcome": Outcome.SKIPPED, "verdict": Verdict.UNAVAILABLE, "why": "no package"}
    with pytest.raises(UsageError, match=r"^--bad 1\.11: the case was not tried with it \(skipped: no package\)"):
        searched(lambda number: unavailable if number == 11 else needs(100)(number))


def test_what_is_known_when_it_is_stopped_can_be_told() -> None:
    def stop(number: int) -> Mapping[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return needs(*[100] * 3, 110)(number)

    search = Bisection(RELEASES, ScriptedReleases(stop), LIMITS)
    assert search.answer().said == ""
    with pytest.raises(KeyboardInterrupt):
        search.run()
    found = search.answer()
    assert (found.last_good, found.first_bad, found.is_over, found.is_exact) == ("1.0", "1.5", False, False)


def test_figures_of_another_machine_that_say_nothing_are_not_followed() -> None:
    """As where a bisect goes on elsewhere: loading and speed are not held against another machine's."""

    def figures(number: int) -> Mapping[str, Any]:
        of = builders.machine() if number == 0 else builders.machine(builders.gpu())
        return {"metrics": {"ready_s": 1.0 + number}, "machine": of}

    assert not searched(figures)[0].is_changed


def test_two_neighbors_need_no_third() -> None:
    scripted = ScriptedReleases(needs(100, 110))
    assert Bisection(RELEASES[:2], scripted, LIMITS).run().is_exact
    assert scripted.asked == ["1.0", "1.1"] * 2
