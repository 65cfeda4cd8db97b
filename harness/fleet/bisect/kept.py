"""What a bisect measured, kept in a directory for each release, so that one that was broken off goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from harness.core.errors import UsageError
from harness.core.records import Record, Result
from harness.fleet import pytest_run
from harness.fleet.bisect.overlay import NotInstallable, overlay
from harness.fleet.bisect.search import Unmeasured
from harness.machine import atomic
from harness.machine.scratch import Scratch
from harness.results import store

QUESTION = "bisect.json"
_SAID_BYTES = 300


class BisectQuestion(Record, frozen=True, kw_only=True):
    """What is asked: a package, the options of `pytest cases/` that name the case, and the versions of all other packages."""

    schema: int = 1
    package: str
    words: tuple[str, ...]
    versions: dict[str, str]


class Measurements:
    """Measures a case with releases of a package, and keeps every result below a directory."""

    def __init__(self, question: BisectQuestion, folder: Path, cases: Mapping[str, str], wheels: Path | None = None) -> None:
        """Take the test files to run by name; `wheels` is where the releases are, None for the index.

        Raises:
            UsageError: the directory has results of another question.
            OSError: it cannot be written.
        """
        self._question, self._folder, self._cases, self._wheels = question, folder, cases, wheels
        place = folder / QUESTION
        try:
            earlier = msgspec.json.decode(place.read_bytes(), type=BisectQuestion) if place.exists() else question
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UsageError(f"{place}: is no bisect of this version; name another directory with --results") from None
        if earlier != question:
            raise UsageError(f"{folder} has {_differs(earlier, question)}; name another directory with --results")
        atomic.write_bytes(place, msgspec.json.encode(question) + b"\n")

    def measure(self, release: str, attempt: int) -> Result:
        """Return the result of the case with a release: the one of this attempt, from 0, that is kept, else the next.

        Raises:
            Unmeasured: it cannot be installed, or pytest brought no result of it.
            UsageError, OSError: nothing can be measured here.
        """
        place = self._folder / f"{self._question.package}-{release}"
        if len(found := self._kept(place, release)) <= attempt:
            self._run(place, release)
            found = self._kept(place, release)
        if len(found) <= attempt:
            raise Unmeasured(f"pytest brought no result of it: {_last_line(place / pytest_run.RUN_LOG)}")
        return found[attempt]

    def _run(self, place: Path, release: str) -> None:
        """Measure once more in an environment of its own, and append what came, however it ended."""
        try:
            with overlay(self._question.package, release, self._wheels) as python, Scratch() as folder:
                pytest_run.lay_out(folder, self._cases)
                try:
                    with pytest_run.measuring(python, folder, self._question.words, _environment()) as process:
                        process.wait()
                finally:
                    _keep(folder, place)
        except NotInstallable as error:
            raise Unmeasured(f"cannot be installed ({_short(str(error))})") from None

    def _kept(self, place: Path, release: str) -> list[Result]:
        """Return the results that are kept of a release, oldest first. Raises Unmeasured: another release ran."""
        results = store.read(place / store.NAME)[0] if (place / store.NAME).exists() else []
        for one in results:
            if (ran := one.environment.get(self._question.package, release)) != release:
                raise Unmeasured(f"the run had {self._question.package} {ran}: something on its path comes first")
        return results


def _environment() -> dict[str, str]:
    """Return the environment of a run: ours without PYTHONPATH, which would come before the release under test."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _keep(folder: Path, place: Path) -> None:
    """Add the results of a run to those of its release, whole or not at all, with the log beside them."""
    place.mkdir(parents=True, exist_ok=True)
    made = folder / pytest_run.RUN_RESULTS / store.NAME
    if made.exists():
        earlier = (place / store.NAME).read_bytes() if (place / store.NAME).exists() else b""
        atomic.write_bytes(place / store.NAME, earlier + made.read_bytes())
    if (folder / pytest_run.RUN_LOG).exists():
        (place / pytest_run.RUN_LOG).write_bytes((folder / pytest_run.RUN_LOG).read_bytes())


def _differs(earlier: BisectQuestion, now: BisectQuestion) -> str:
    """Say in what an earlier question was another one."""
    if earlier.package != now.package:
        return f"a bisect of {earlier.package}"
    if earlier.words != now.words:
        return f"a bisect of {' '.join(earlier.words)}"
    names: Sequence[str] = sorted(earlier.versions.keys() | now.versions.keys())
    name = next(one for one in names if earlier.versions.get(one) != now.versions.get(one))
    return f"results with {name} {earlier.versions.get(name, 'absent')}, and here is {now.versions.get(name, 'none')}"


def _last_line(log: Path) -> str:
    lines = (
        [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    wrong = [line for line in lines if line.startswith(("ERROR", "E  "))]
    return _short((wrong or lines or ["it said nothing"])[-1])


def _short(text: str) -> str:
    return text if len(text) <= _SAID_BYTES else f"{text[:_SAID_BYTES]} ..."
