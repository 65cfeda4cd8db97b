"""The search: which neighbors among releases differ, where the first is good and the last is bad, by the rule of the gate.

One figure is followed, the first that surely changed between the two ends unless the user names one. A release is bad if it
differs from the good end as the bad end does. What cannot be told, for the release does not install, its case ends otherwise, or
its figures stay too noisy, is skipped; then the answer may be a range.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Outcome, Record, Result
from harness.results.compare import RULES, Call, Change, Pair, compare, sentence

END = "end"  #: the figure that is how the case ends, its answers included
ATTEMPTS = 3  # measurements of a release at most, where the rule finds its figure too noisy to judge or cannot tell how noisy

_ENOUGH = 2  # times that a change must be seen of a figure without samples, such as memory
_SURE = (Call.WORSE, Call.BETTER)

_FIGURES = (END, *(key for rule in RULES.values() for key in rule.keys))


def known_figure(name: str | None) -> str | None:
    """Return a figure that can be followed, or None, as it was given. Raises UsageError: there is none of this name."""
    if name is not None and name not in _FIGURES:
        raise UsageError(f"--figure {name}: {did_you_mean(name, _FIGURES)}")
    return name


class Unmeasured(Exception):
    """A release has no result; the text is why."""


class Side(str, Enum):
    """What a release is like."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "skipped"


class TriedRelease(Record, frozen=True, kw_only=True):
    """One release: its side, the figure that was followed, its change against the good end, and why it was skipped."""

    release: str
    side: Side
    value: float | None = None
    change: float | None = None
    why: str = ""


class BisectAnswer(Record, frozen=True, kw_only=True):
    """What is known so far: the figure that is followed, if one is by now, whether it surely changed, and others that did.

    Between `last_good` and `first_bad` stand only releases that were skipped, once `is_over`.
    """

    figure: str | None
    is_changed: bool
    also: tuple[str, ...]
    said: str
    tried: tuple[TriedRelease, ...]
    last_good: str
    first_bad: str
    between: tuple[str, ...]
    is_over: bool

    @property
    def is_exact(self) -> bool:
        """Whether the change lies between two releases that follow each other."""
        return self.is_changed and self.is_over and not self.between


class Bisection:
    """A search over releases in order; `measure` shows the case with one of them, each time that it is counted."""

    def __init__(
        self,
        releases: Sequence[str],
        measure: Callable[[str, int], Result],
        limits: Mapping[str, float],
        figure: str | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take at least two releases, and a figure that `known_figure` has passed."""
        self._releases, self._measure, self._limits, self._tell = [*releases], measure, limits, tell
        self._asked = self.figure = figure
        self._is_worse = True
        self._changed: list[str] = []
        self._said = ""
        self._tried: dict[str, TriedRelease] = {}
        self._results: dict[str, Result] = {}
        self._low, self._high = 0, len(self._releases) - 1

    def run(self) -> BisectAnswer:
        """Measure both ends, then the middle of what is left, until the change is found or nothing can be told.

        Raises:
            UsageError: an end cannot be measured, or the case does not work with the good one.
            KeyboardInterrupt: `answer` tells what is known.
        """
        if self._ends_differ():
            while (index := self._middle()) is not None:
                left = self._high - self._low - 1
                self._tell(f"{left} left between {self._releases[self._low]} and {self._releases[self._high]}, {_steps(left)}")
                self._place(index, self._try(self._releases[index]))
        return self.answer()

    def answer(self) -> BisectAnswer:
        """Return what is known by now."""
        return BisectAnswer(
            figure=self.figure,
            is_changed=bool(self._changed),
            also=tuple(key for key in self._changed if key != self.figure),
            said=self._said,
            tried=tuple(self._tried[one] for one in self._releases if one in self._tried),
            last_good=self._releases[self._low],
            first_bad=self._releases[self._high],
            between=tuple(self._releases[self._low + 1 : self._high]),
            is_over=bool(self._said) and (not self._changed or self._middle() is None),
        )

    def _ends_differ(self) -> bool:
        """Measure the ends until the rule is sure of a change, or that there is none; note which figures changed."""
        good, bad = self._releases[0], self._releases[-1]
        seen: Counter[tuple[str, Call]] = Counter()
        calls: dict[str, Call] = {}
        for attempt in range(ATTEMPTS):
            self._end(good, attempt)
            self._end(bad, attempt)
            calls = self._calls(bad)
            seen.update(calls.items())
            self._changed = [
                key for key, call in calls.items() if call in _SURE and (seen[key, call] == _ENOUGH or self._shows_noise(bad, key))
            ]
            first = self._asked or next((key for key, call in calls.items() if call is not Call.SAME), None)
            if first in self._changed or calls.get(str(first), Call.SAME) is Call.SAME:
                break
        if self._asked not in (None, *self._changed):
            self._changed = []
        self.figure = self._asked or next(iter(self._changed), None)
        self._is_worse = self.figure is None or calls.get(self.figure) is not Call.BETTER
        self._said = self._say(calls)
        for release, side in ((good, Side.GOOD), (bad, Side.BAD if self._changed else Side.GOOD)):
            self._note(release, side)
        return bool(self._changed)

    def _end(self, release: str, attempt: int) -> None:
        flag = "--good" if release == self._releases[0] else "--bad"
        try:
            self._results[release] = found = self._measure(release, attempt)
        except Unmeasured as error:
            raise UsageError(f"{flag} {release}: {error}; name a release near it") from None
        if flag == "--good" and found.outcome is not Outcome.OK:
            raise UsageError(
                f"--good {release}: the case does not work with it ({_end_of(found)}); name a release with which it does"
            )
        if found.outcome is Outcome.SKIPPED:
            raise UsageError(f"--bad {release}: the case was not tried with it ({_end_of(found)}); name a release near it")

    def _say(self, calls: Mapping[str, Call]) -> str:
        """Say how the ends differ, or why nothing can be searched."""
        good, bad = self._releases[0], self._releases[-1]
        if self.figure is not None and self._changed:
            pair = self._pair(good, bad)
            change = self._change(pair, self.figure)
            return sentence(change) if change is not None else str(pair.said)
        noisy = [key for key, call in calls.items() if call is not Call.SAME and self._asked in (None, key)]
        if noisy:
            return f"{', '.join(noisy)} may have changed from {good} to {bad} and is too noisy to tell: measure on a quiet machine"
        what = "nothing" if self._asked is None else self._asked if self._asked in calls else f"there is no {self._asked}: nothing"
        verb = "did not change" if what == self._asked else "changed"
        return f"{what} {verb} from {good} to {bad} by the gate's rule"

    def _middle(self) -> int | None:
        """Return the release nearest to the middle of what is left that was not tried, None if all were."""
        middle = (self._low + self._high) / 2
        left = [index for index in range(self._low + 1, self._high) if self._releases[index] not in self._tried]
        return min(left, key=lambda index: abs(index - middle), default=None)

    def _place(self, index: int, side: Side) -> None:
        if side is Side.GOOD:
            self._low = index
        elif side is Side.BAD:
            self._high = index

    def _try(self, release: str) -> Side:
        """Measure a release until the rule is sure of it; say its side."""
        seen: list[Side | None] = []
        while len(seen) < ATTEMPTS:
            try:
                self._results[release] = self._measure(release, len(seen))
            except Unmeasured as error:
                return self._note(release, Side.SKIPPED, str(error))
            side, why = self._side(release)
            seen.append(side)
            is_agreed = set(seen) <= {side, None} and (side is not Side.BAD or self._shows_noise(release, self.figure))
            if side is not None and (is_agreed or seen.count(side) == _ENOUGH):
                return self._note(release, side, why)
        return self._note(release, Side.SKIPPED, f"too noisy to judge after {ATTEMPTS} measurements")

    def _shows_noise(self, release: str, figure: str | None) -> bool:
        """Say whether one measurement tells how sure a change is: how a case ends is, and a figure with samples has an interval."""
        change = self._change(self._pair(self._releases[0], release), str(figure))
        return figure == END or change is None or change.low is not None

    def _side(self, release: str) -> tuple[Side | None, str]:
        """Say what a release is like, and why it is skipped; None: its figure is too noisy to tell."""
        found, end = self._results[release], self._results[self._releases[-1]]
        if self.figure == END:
            is_failed = self._pair(self._releases[0], release).failed
            if is_failed and found.outcome is end.outcome:
                return Side.BAD, ""
            is_good = not is_failed and found.outcome is Outcome.OK
            return (Side.GOOD, "") if is_good else (Side.SKIPPED, f"ends otherwise: {_end_of(found)}")
        change = self._change_of(release)
        if change is None:
            return Side.SKIPPED, f"shows no {self.figure}: {_end_of(found)}"
        if change.call in (Call.UNSURE, Call.UNJUDGED):
            return None, ""
        return (Side.BAD if change.call is Call.WORSE else Side.GOOD), ""

    def _note(self, release: str, side: Side, why: str = "") -> Side:
        value = change = None
        if self.figure not in (None, END) and release in self._results:
            found, good = (self._results[one].metrics.get(str(self.figure)) for one in (release, self._releases[0]))
            value, change = found, found / good - 1 if found is not None and good else None
        self._tried[release] = TriedRelease(release=release, side=side, value=value, change=change, why=why)
        self._tell(f"{release}: {side.value}{f' ({why})' if why else ''}")
        return side

    def _pair(self, before: str, after: str) -> Pair:
        return compare([self._results[before]], [self._results[after]], self._limits).pairs[0]

    def _calls(self, bad: str) -> dict[str, Call]:
        """Return what the rule says of each figure of the bad end against the good one; the first is how the case ends."""
        pair = self._pair(self._releases[0], bad)
        calls = {END: Call.WORSE} if pair.failed else {}
        return calls | {change.key: change.call for change in pair.changes if change.gated}

    @staticmethod
    def _change(pair: Pair, figure: str) -> Change | None:
        return next((one for one in pair.changes if one.key == figure and one.gated), None)

    def _change_of(self, release: str) -> Change | None:
        """Return the change of the figure toward what is worse: for one that got better, from the release to the good end."""
        before, after = (self._releases[0], release) if self._is_worse else (release, self._releases[0])
        return self._change(self._pair(before, after), str(self.figure))


def _end_of(result: Result) -> str:
    return f"{result.outcome.value}: {result.why}" if result.why else result.outcome.value


def _steps(left: int) -> str:
    steps = math.ceil(math.log2(left + 1))
    return f"about {steps} step{'' if steps == 1 else 's'}"
