"""Cases of a first contact: run by the project's own main job, each only once, and kept for the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.core.records import Machine, Outcome, Result
from harness.results import store

ROOT = Path(__file__).parents[2]
# Written offline in seconds, and large enough that its weights are no rounding error beside a context.
MODEL = "codegen-350m-mono"
RUN_S = 280.0


class Contact:
    """Runs cases of one model into one directory. `model` is a directory of weights; None is MODEL with synthetic ones."""

    def __init__(self, directory: Path, machine: Machine, model: str | None = None) -> None:
        self.directory, self.machine = directory, machine
        self.asked = ["--model", model] if model else ["--model", MODEL, "--weights", "synthetic"]
        self._ran: dict[tuple[str, ...], list[Result]] = {}

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
        command = [
            sys.executable,
            "-m",
            "pytest",
            "cases",
            "-q",
            "--results",
            str(self.directory),
            "--repeats",
            "3",
            *self.asked,
            *words,
        ]
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
