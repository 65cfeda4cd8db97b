"""Cases of a first contact: run by the project's own main job, each only once, and kept for the report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.core.placements import PLACEMENTS, distinct
from harness.core.records import Machine, Outcome, Result
from harness.results import store

ROOT = Path(__file__).parents[2]
# Written offline in seconds, and large enough that its weights are no rounding error beside a context.
MODEL = "codegen-350m-mono"
RUN_S = 280.0
OPTIONS = ("--repeats", "3")


class Contact:
    """Runs cases of one model into one directory.

    `model` is a directory of weights; None is MODEL with synthetic ones. `options` are those of every case.
    """

    def __init__(self, directory: Path, machine: Machine, model: str | None = None, options: Sequence[str] = OPTIONS) -> None:
        self.directory, self.machine, self.options = directory, machine, options
        self.asked = ["--model", model] if model else ["--model", MODEL, "--weights", "synthetic"]
        self.wanted: set[tuple[str, str]] = set()  #: precision and placement of what will be asked for
        self._ran: dict[tuple[str, ...], list[Result]] = {}
        self._together: dict[tuple[str, str], Result] = {}

    def cases(self, *words: str) -> list[Result]:
        """Run cases once, and return their results.

        Raises:
            AssertionError: the run left no result; its output is the message.
        """
        if words not in self._ran:
            before = len(self._read())
            done = self.run(*words)
            found = self._read()[before:]
            assert found, f"pytest cases {' '.join(words)} left no result: {done}"
            self._ran[words] = found
        return self._ran[words]

    def together(self, precision: str, placement: str) -> Result:
        """Return the result of a case, which runs with all that will be asked for in this precision.

        Raises:
            AssertionError: the run left none.
        """
        if (precision, placement) not in self._together:
            differ = distinct(PLACEMENTS, len(self.machine.gpus))
            asked = [name for name in differ if name == placement or (precision, name) in self.wanted]
            new = [name for name in asked if (precision, name) not in self._together]
            found = self.cases("--precision", precision, *(word for name in new for word in ("--placement", name)))
            self._together |= {(precision, result.case.placement): result for result in found}
        left = [f"{one}/{other}" for one, other in self._together]
        assert (precision, placement) in self._together, f"the run left no result of {precision}/{placement}, only of {left}"
        return self._together[precision, placement]

    def case(self, precision: str, placement: str, *words: str) -> Result:
        """Run one case, and return its result."""
        return self.cases("--precision", precision, "--placement", placement, *words)[0]

    def location(self) -> str:
        """Return the directory of the weights, which a case has written if they are synthetic."""
        from harness.run.model_set import ModelSet

        models = ModelSet((self.asked[1],), synthetic="synthetic" in self.asked, trust=False)
        models.fetch(list(models.sources), lambda _: None)
        return str(models.location(next(iter(models.sources))))

    def run(self, *words: str) -> str:
        """Run the main job, and return what it printed last."""
        asked = ["--results", str(self.directory), *self.options, *self.asked, *words]
        command = [sys.executable, "-m", "pytest", "cases", "-q", *asked]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_S, check=False)
        except subprocess.TimeoutExpired:
            return f"not done after {RUN_S:.0f} s"
        return (done.stdout + done.stderr)[-3000:]

    def _read(self) -> list[Result]:
        found, problems = store.Store(self.directory).read() if (self.directory / store.NAME).exists() else ([], [])
        assert not problems, problems
        return found


def explain(result: Result) -> str:
    """Say in a line how a case ended, and what its log says."""
    return f"{result.id}: {result.outcome.value} while {result.stage}: {result.why}\n{result.log_tail[-1500:]}"


def ended_well(result: Result) -> Result:
    """Return a result that is ok.

    Raises:
        AssertionError: it is not, and why.
    """
    assert result.outcome is Outcome.OK, explain(result)
    return result
