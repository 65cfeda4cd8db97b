"""Architectures as small random models, all in one run, in bf16 and int8: right, or refused in a sentence.

`tox run -e strangers` makes them below build/strangers and goes on from there if it was interrupted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness.core.records import Outcome, Result
from harness.core.units import MIB
from harness.measure.verify import OK
from harness.results import store
from tests.strangers import architectures
from tests.support.reporting import REPORTS, Figure, Section, gathered, table

HERE = REPORTS.parent / "build" / "strangers"
PRECISIONS = ("bf16", "int8")
RUN = ("--placement", "cpu", "--repeats", "1", "--prompt-tokens", "64", "--new-tokens", "8", "--resume")
LEAST = 40


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "strangers.md", "Models of strangers", "tox run -e strangers")


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    """Run them all in one run; return the newest result of each case by architecture."""
    models = []
    for name in architectures.names():
        folder = HERE / "models" / name.replace(" ", "-")
        if not (folder / "tokenizer.json").is_file():
            architectures.save(name, folder)
        models += ["--model", str(folder)]
    asked = [word for precision in PRECISIONS for word in ("--precision", precision)]
    command = [sys.executable, "-m", "pytest", "cases", *models, *asked, *RUN, "--results", str(HERE / "results")]
    done = subprocess.run(command, check=False, cwd=REPORTS.parent)
    assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    found, problems = store.read(store.file_of(HERE / "results"))
    assert not problems
    newest = {(result.case.model, result.case.precision): result for result in found}
    of = {name: name.replace(" ", "-") for name in architectures.names()}
    return {name: [newest[folder, precision] for precision in PRECISIONS] for name, folder in of.items()}


def fault(result: Result) -> str | None:
    """Say what is wrong with a result: of what ran, a check or its memory; of what did not, that no plan refused it."""
    if result.outcome is not Outcome.OK:
        refused = result.stage == "plan" and result.why and "Error" not in result.why
        return None if refused else f"{result.outcome.value}: {result.why}"
    wrong = [said for said in result.checks.values() if said != OK]
    assert result.estimate is not None
    tier, peak = result.estimate.tiers["cpu"], result.metrics["ram_peak_bytes"]
    if not tier.low_bytes <= peak <= tier.high_bytes:
        wrong.append(f"peak {peak / MIB:.0f} MiB, planned {tier.low_bytes / MIB:.0f} to {tier.high_bytes / MIB:.0f}")
    return "; ".join([*wrong, *result.failed]) or None


def told(result: Result) -> str:
    """Write what became of a case."""
    if said := fault(result):
        return f"WRONG: {said}"
    if result.outcome is not Outcome.OK or result.estimate is None:
        return f"refused: {str(result.why).removeprefix('<model>/')}"
    tier, peak = result.estimate.tiers["cpu"], result.metrics["ram_peak_bytes"]
    return f"right, {peak / MIB:.0f} MiB in {tier.low_bytes / MIB:.0f}..{tier.high_bytes / MIB:.0f}"


def test_every_architecture_is_right_or_refused_in_a_sentence(results: dict[str, list[Result]], section: Section) -> None:
    runs = [result for ours in results.values() for result in ours]
    right = [name for name, ours in results.items() if any(one.outcome is Outcome.OK for one in ours) and not any(map(fault, ours))]
    refused = [name for name, ours in results.items() if all(one.outcome is not Outcome.OK for one in ours)]
    measured = [result for result in runs if result.outcome is Outcome.OK]
    wrong = {result.id: said for result in runs if (said := fault(result))}
    section.figures.extend(
        [
            Figure(what="architectures that run right", rows=len(results), found=str(len(right)), wanted=str(LEAST)),
            Figure(what="architectures refused in a sentence", rows=len(results), found=str(len(refused)), wanted=""),
            Figure(what="cases wrong, or outside low..high", rows=len(runs), found=str(len(wrong)), wanted="0"),
            Figure(what="cases measured", rows=len(runs), found=str(len(measured)), wanted=""),
        ]
    )
    rows = [[name, *(told(result).replace("|", "/") for result in ours)] for name, ours in results.items()]
    section.notes.append("\n".join(table(["architecture", *PRECISIONS], rows)))
    assert not wrong
    assert len(right) >= LEAST
