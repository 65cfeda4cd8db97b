"""Fixtures of the accuracy runs: what a file of tests finds becomes its section of reports/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cli.entry import main
from harness.core.records import Machine, Result
from harness.core.units import GIB
from harness.machine import probe
from harness.planning.calibrating import kept_calibration
from harness.planning.calibration import Calibration
from tests.accuracy import chart, local_runs
from tests.accuracy.chart import Pair
from tests.support.reporting import REPORTS, Figure, Section, gathered, table

HEADING = "How good the estimates are"


@pytest.fixture(scope="session")
def here() -> Machine:
    return probe.probe(measure=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The default model and twelve of random weights."""
    return local_runs.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def runs(models: dict[str, Path], here: Machine, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Every model, run in every way of `local_runs.WAYS`, some of them more than once."""
    return list(local_runs.run_all(models, here, tmp_path_factory.mktemp("scratch")))


@pytest.fixture(scope="session")
def results(runs: list[Result]) -> list[Result]:
    """The first run of every case."""
    return list({one.id: one for one in reversed(runs)}.values())


@pytest.fixture(scope="session")
def calibrated(here: Machine, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """The constants that plans take after `fitmatrix calibrate --measure`, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_WAIT_POLICY", raising=False)  # that of tests
        patch.setenv("FITMATRIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("empty"))
        assert main(["calibrate", "--measure"]) == 0
        return kept_calibration.corrected([], here)


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "accuracy.md", HEADING, "tox run -e accuracy")


@pytest.fixture(scope="module")
def figures(section: Section) -> list[Figure]:
    """A list to add figures to."""
    return section.figures


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, section: Section) -> Iterator[list[Pair]]:
    """Estimated and measured values, case by case: all of one unit: for the chart beside the report, and for the table below."""
    found: list[Pair] = []
    yield found
    if not found or request.config.option.keyword:
        return
    name, unit, scale = ("speed", "tokens/s", 1.0) if "tokens/s" in found[0].figure else ("memory", "GiB", float(GIB))
    section.notes.extend([f"![{name}](accuracy-{name}.svg)", details(found)])
    chart.write(REPORTS / f"accuracy-{name}.svg", found, unit, scale)


def details(found: list[Pair]) -> str:
    """List every case with estimated / measured."""
    figures = list(dict.fromkeys(pair.figure for pair in found))
    by_case: dict[str, dict[str, float]] = {}
    for pair in found:
        by_case.setdefault(pair.case, {})[pair.figure] = pair.estimated / pair.measured
    lines = [
        "Estimated / measured, case by case:",
        "",
        *table(
            ["case", *figures],
            [[case, *(f"{ratios[name]:.2f}" if name in ratios else "" for name in figures)] for case, ratios in by_case.items()],
        ),
    ]
    return "\n".join(lines)
