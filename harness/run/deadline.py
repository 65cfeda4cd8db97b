"""How long a worker is waited for: a limit for the case as a whole and one for each of its phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
_TICK_S = 1.0
_LATE_S = 0.5  # who comes back this much later than asked was stopped himself


class Deadline:
    """Counts the seconds spent waiting for the worker, and those only.

    What passes between two requests is not the worker's doing. Neither is the time in which this process itself stood still, as
    under SIGSTOP, Ctrl-Z or a frozen container, where the worker may have stood still as well.
    """

    def __init__(self, *, case_s: float, phase_s: float = math.inf) -> None:
        self._limits = {"timeout": case_s, "phase timeout": phase_s}
        self._left = dict(self._limits)

    def begin_phase(self) -> None:
        """Count a new phase from here."""
        self._left["phase timeout"] = self._limits["phase timeout"]

    @property
    def case_left_s(self) -> float:
        """Seconds that the case as a whole still has."""
        return self._left["timeout"]

    @property
    def left_s(self) -> float:
        """Seconds until the first limit is reached, 0 at least."""
        return max(min(self._left.values()), 0.0)

    @property
    def reached(self) -> str:
        """The limit that is reached first: "timeout" is the case's, "phase timeout" the phase's."""
        return min(self._left, key=lambda limit: self._left[limit])

    def limit_s(self, name: str | None) -> float | None:
        """Return the seconds of a limit by its name, None if there is no such limit."""
        return self._limits.get(name or "")

    def wait(self, look: Callable[[float], Sequence[T]]) -> Sequence[T]:
        """Call `look` with seconds to block at most, until it finds something or a limit is reached; return what it found.

        It looks once more after a limit is reached: an answer that came while this process was stopped is there.
        """
        while True:
            tick_s = min(self.left_s, _TICK_S)
            begun_s = time.monotonic()
            found = look(tick_s)
            spent_s = time.monotonic() - begun_s
            self._spend(spent_s if spent_s < tick_s + _LATE_S else tick_s)
            if found or not tick_s:
                return found

    def _spend(self, seconds: float) -> None:
        for limit in self._left:
            self._left[limit] -= seconds
