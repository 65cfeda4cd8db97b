"""Emulated RAM limits: the verdict of the plan against what happens, and the smallest RAM that works.

A case works under a limit if it ends well without rereading its weights for every token (`run.min_ram`). Synthetic models are
made for the run and deleted; it takes eight minutes on a quiet machine, 3.5 GB of disk and 5 GB of memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.catalog import download, resolve
from harness.core.options import DEFAULT_MODEL
from harness.core.precisions import DEFAULT_PRECISIONS
from harness.core.records import Outcome, Result, Verdict
from harness.core.units import MIB, format_share, format_size
from harness.machine import cgroup
from harness.run.min_ram import failed, measure, prove
from harness.run.options import Options
from harness.run.session import Session
from tests.support.reporting import Figure, Section, table

pytestmark = pytest.mark.skipif(not cgroup.is_allowed(), reason="no control group can be made here")

HERE = Path(__file__).parent
SYNTHETIC = ("qwen2", "llama")
SIZES_MIB = (410, 720, 1230, 1840, 2870, 4096)
PROVED = ("fp32", "bf16", "int8")
WORK = {"prompt_tokens": "16", "new_tokens": "2", "repeats": "1", "case_timeout": "120"}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session with the default model and the synthetic ones, in RAM; all their files are removed at the end.

    The default model is copied: pages of a file that another process maps would not count.
    """
    folder = tmp_path_factory.mktemp("limits")
    shutil.copytree(download.fetch(resolve.resolve(DEFAULT_MODEL)), folder / DEFAULT_MODEL)
    for name in SYNTHETIC:
        subprocess.run([sys.executable, HERE.parent / "accuracy/synthetic.py", folder, name], check=True, capture_output=True)
    models = [str(folder / name) for name in (DEFAULT_MODEL, *SYNTHETIC)]
    given = {
        "model": models,
        "precision": list(DEFAULT_PRECISIONS),
        "placement": ["cpu"],
        "results": str(folder / "results"),
        **WORK,
    }
    one = Session(Options(given=given))
    one.prepare(one.cases())
    yield one
    one.close()
    shutil.rmtree(folder)


def _row(result: Result) -> list[str]:
    assert result.estimate is not None
    tier = result.estimate.tiers["cpu"]
    needs = f"{format_size(tier.needed_bytes)} to {format_size(tier.needed_high_bytes)}"
    return [result.id, result.verdict.value.replace("_", " "), needs, failed(result) or "works"]


def test_the_verdict_agrees_with_what_happens(session: Session, figures: list[Figure], section: Section) -> None:
    cases = [replace(case, ram_bytes=size * MIB) for case in session.cases() for size in SIZES_MIB]
    results = []
    for case in cases:
        results.append(measure(session, case))
        print(" | ".join(_row(results[-1])), flush=True)
    wrong = [result for result in results if result.verdict.is_good != (failed(result) is None)]
    broken = [result for result in results if result.verdict is Verdict.FITS and failed(result) is not None]
    ends = {result.outcome for result in results}
    agrees = format_share(1 - len(wrong) / len(results))
    tight = sum(result.verdict is Verdict.TIGHT for result in results)
    figures.append(
        Figure(what="verdict agrees with what happens (tight counts as fits)", rows=len(results), found=agrees, wanted="95 %")
    )
    figures.append(Figure(what="  of these, tight", rows=len(results), found=format_share(tight / len(results)), wanted="few"))
    figures.append(Figure(what='false "fits"', rows=len(results), found=str(len(broken)), wanted="0"))
    if wrong:
        section.notes.append(
            "\n".join(table(["disagrees", "verdict", "needs", "what happened"], [_row(result) for result in wrong]))
        )
    assert not broken
    assert len(wrong) <= 0.05 * len(results)
    assert ends <= {Outcome.OK, Outcome.OOM, Outcome.TIMEOUT}


@pytest.mark.parametrize("precision", PROVED)
def test_the_smallest_ram_that_works_is_found(session: Session, figures: list[Figure], precision: str) -> None:
    case = next(one for one in session.cases() if (one.model, one.precision) == (DEFAULT_MODEL, precision))
    found = prove(session, case, tried=lambda result: print(" | ".join(_row(result)), flush=True))
    assert found.works_bytes is not None
    assert found.fails_bytes is not None
    share = found.works_bytes / found.fails_bytes - 1
    off = format_share(found.estimate_bytes / found.works_bytes - 1)
    what = f"smallest RAM of {case.precision}, bisected to"
    figures.append(
        Figure(what=what, rows=found.runs, found=f"{format_share(share)}: {format_size(found.works_bytes)}", wanted="5 %")
    )
    figures.append(Figure(what="  estimate of it, off by", found=f"{off}: {format_size(found.estimate_bytes)}", wanted="10 %"))
    assert share <= 0.05
    assert found.works_bytes <= found.estimate_high_bytes


def test_no_group_is_left(session: Session) -> None:
    del session
    assert not [left for folder, _ in cgroup._parents(cgroup.ROOT) for left in folder.glob(f"fitmatrix-{os.getpid()}-*")]
