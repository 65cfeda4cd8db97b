"""Models of full size, with synthetic weights: predicted before, then run.

`tox run -e full-size` keeps the results and their page in reports/full-size and writes this section of reports/accuracy.md. It
takes up to an hour, 24 GiB of RAM and 40 GB of disk for one checkpoint at a time, which goes again; what ran before is resumed.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.core.records import Outcome, Result, Verdict
from harness.core.units import format_share
from harness.results import store
from tests.accuracy.chart import Pair
from tests.accuracy.conftest import HEADING, details
from tests.support.reporting import REPORTS, Figure, Section, gathered

RESULTS = REPORTS / "full-size"


class Measured(NamedTuple):
    """Cases of one model, as they are asked for on the command line; with `shards` of a copy in files of at most that size."""

    model: str
    precisions: tuple[str, ...]
    placements: tuple[str, ...]
    options: tuple[str, ...]
    shards: str = ""

    @property
    def words(self) -> list[str]:
        named = [("--precision", self.precisions), ("--placement", self.placements)]
        return [*(word for option, names in named for name in names for word in (option, name)), *self.options]


DEFAULTS = ("--repeats", "3")
# From the disk every token costs seconds: few of them, one round.
FEW = ("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1")
# codegen-16b's one file is larger than this machine's RAM, which Linux does not map: run all the same, to show that it is so.
RUNS = (
    Measured("chatglm-6b", ("fp16", "bf16", "int8", "int4"), ("cpu",), DEFAULTS),
    Measured("chatglm-6b", ("fp16", "bf16"), ("disk",), ("--ram", "8GiB", *FEW)),
    Measured("codegen-6b-mono", ("bf16", "int4"), ("cpu",), DEFAULTS),
    Measured("codegen-6b-mono", ("fp16", "bf16"), ("disk",), ("--ram", "8GiB", *FEW)),
    Measured("stablelm-tuned-alpha-7b", ("fp16",), ("cpu",), FEW),
    Measured("codegen-16b-mono", ("fp16",), ("disk",), ("--run-all", *FEW)),
    Measured("codegen-16b-mono", ("fp16",), ("disk",), FEW, shards="2GB"),
    Measured("codegen-16b-mono", ("int4",), ("cpu",), FEW, shards="2GB"),
    Measured("moss-moon-003-sft", ("fp16",), ("disk",), FEW),
    Measured("moss-moon-003-sft", ("int4",), ("cpu",), FEW),
)


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "accuracy.md", HEADING, "tox run -e full-size")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Run every row of RUNS; the checkpoints of a model go when the next has another one."""
    for (model, shards), rows in itertools.groupby(RUNS, key=lambda row: (row.model, row.shards)):
        where = _in_shards(model, shards, tmp_path_factory.mktemp("shards")) if shards else model
        for row in rows:
            weights = [] if shards else ["--weights", "synthetic"]  # that directory has no others
            status = _run("pytest", "cases", "--model", where, *weights, *row.words, "--results", str(RESULTS), "--resume")
            assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if shards:
            shutil.rmtree(where)
        else:
            _run("harness", "synth", model, "--remove")
    found, problems = store.read(store.file_of(RESULTS))
    assert not problems
    return list({result.id: result for result in found}.values())


def _in_shards(model: str, shards: str, folder: Path) -> str:
    there = folder / f"{model}-in-shards"
    assert _run("harness", "synth", model, str(there), "--shard", shards) == 0
    return str(there)


def _run(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", *words], check=False, cwd=REPORTS.parent).returncode


def _worked(results: list[Result]) -> list[Result]:
    return [result for result in results if result.outcome is Outcome.OK]


def _fills(result: Result) -> bool:
    """Say whether pages of files would fill the RAM: how many of them stay is the kernel's choice, and another each time."""
    assert result.estimate
    tier = result.estimate.tiers["cpu"]
    return tier.capacity_bytes is not None and tier.peak_bytes > 0.9 * tier.capacity_bytes


@pytest.mark.parametrize(
    ("key", "fills", "likely"),
    [
        ("ram_peak_bytes", False, 0.05),
        ("ram_peak_bytes", True, 0.08),
        ("ram_anon_peak_bytes", None, 0.1),  # nf4's heap differs from process to process
    ],
)
def test_ram(results: list[Result], figures: list[Figure], pairs: list[Pair], key: str, fills: bool | None, likely: float) -> None:
    found = []
    for result in _worked(results):
        assert result.estimate
        tier = result.estimate.tiers["cpu"]
        if fills in (None, _fills(result)):
            estimated = tier.anon_bytes if fills is None else tier.peak_bytes
            found.append(Pair(case=result.id, figure=key, estimated=estimated, measured=result.metrics[key]))
    pairs += found
    errors = [abs(pair.estimated / pair.measured - 1) for pair in found]
    within = sum(error <= 0.05 for error in errors)
    near = f"{within} of {len(errors)}, median {format_share(statistics.median(errors))}, most {format_share(max(errors))}"
    what = f"{key} within 5 %" + (", where pages of files fill the RAM" if fills else "")
    figures.append(Figure(what=what, rows=len(errors), found=near, wanted="5 %"))
    assert statistics.median(errors) < likely


def test_the_measured_peak_lies_in_the_interval(results: list[Result], figures: list[Figure]) -> None:
    worked = [(result, result.estimate.tiers["cpu"]) for result in _worked(results) if result.estimate]
    outside = [result.id for result, tier in worked if not tier.low_bytes <= result.metrics["ram_peak_bytes"] <= tier.high_bytes]
    figures.append(Figure(what="RAM peak outside low..high", rows=len(worked), found=", ".join(outside) or "0", wanted="5 %"))
    assert len(outside) * 3 <= len(worked)


def test_no_promise_is_broken(results: list[Result], figures: list[Figure]) -> None:
    broken = [result.id for result in results if result.verdict is Verdict.FITS and result.outcome is not Outcome.OK]
    figures.append(Figure(what="false fits", rows=len(results), found=", ".join(broken) or "0", wanted="0"))
    assert not broken


def test_speed(results: list[Result], figures: list[Figure], pairs: list[Pair]) -> None:
    """What is held against the measurement was said before the case ran, corrected by the cases before it."""
    errors = []
    for result in _worked(results):
        assert result.estimate
        measured, estimated = result.metrics["decode_tok_s"], result.estimate.decode_tok_s.best
        pairs.append(Pair(case=result.id, figure="decode_tok_s", estimated=estimated, measured=measured))
        errors.append(abs(estimated / measured - 1))
    within = f"{sum(error <= 0.3 for error in errors)} of {len(errors)}, median {format_share(statistics.median(errors))}"
    figures.append(Figure(what="decode tokens/s within 30 %", rows=len(errors), found=within, wanted="30 %"))
    assert statistics.median(errors) < 0.3


@pytest.fixture(scope="module")
def pairs(section: Section) -> Iterator[list[Pair]]:
    found: list[Pair] = []
    yield found
    section.notes.extend(["Every case with its code and timeline: [reports/full-size](full-size/index.html).", details(found)])
