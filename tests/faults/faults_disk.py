"""A disk that fills during a run: what it does not take is kept, tried again, and else lies where the run says.

The disk is a small file system in memory, mounted for the test, that another program fills and clears at moments drawn by lot.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from harness.core.units import MIB
from harness.results import store
from tests.support import runs
from tests.support.reporting import Figure

RUNS, CASES, SEED = 20, 6, 20261129
DISK = 24 * MIB


@pytest.fixture
def disk() -> Iterator[Path]:
    with TemporaryDirectory(prefix="d") as name:
        place = Path(name) / "disk"
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], capture_output=True, check=False)
        if made.returncode != 0:
            pytest.skip("no file system may be mounted here")
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def fill_and_clear(disk: Path, lot: random.Random, ended: threading.Event, stays_full: bool) -> None:
    while not ended.wait(lot.uniform(0.3, 1.5)):
        fill(disk)
        if stays_full:
            return
        ended.wait(lot.uniform(0.3, 1.5))
        (disk / "ballast").unlink(missing_ok=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_nothing_that_was_measured_is_lost(disk: Path, figures: list[Figure]) -> None:
    lot, lost, tracebacks, ends = random.Random(SEED), [], [], Counter[str]()
    models = [f"m{number}" for number in range(CASES)]
    with TemporaryDirectory(prefix="r") as name:
        folder, temporary = runs.folder(Path(name) / "p", models), Path(name) / "t"
        for number in range(RUNS):
            results, ended = disk / str(number), threading.Event()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            (disk / "ballast").unlink(missing_ok=True)
            run = runs.start(folder, models, "-p", "no:cacheprovider", "--results", str(results), env={"TMPDIR": str(temporary)})
            filler = threading.Thread(target=fill_and_clear, args=(disk, lot, ended, number % 4 == 3))
            filler.start()
            output = run.communicate(timeout=300)[0]
            ended.set()
            filler.join()
            places = [results / store.NAME, *temporary.glob("fitmatrix-rescued-*/results.jsonl")]
            kept = {one.id for place in places if place.exists() for one in store.read(place)[0]}
            measured = [
                case for case in (f"{model}/bf16/cpu" for model in models) if re.search(rf"^{case} +\S+ +works", output, re.M)
            ]
            lost += [f"run {number}: {case}: {output[-800:]}" for case in measured if case not in kept]
            tracebacks += [output[-1500:]] if "Traceback" in output or "INTERNALERROR" in output else []
            ends[
                "written late" if "could not be written at once" in output else "elsewhere" if "rescued" in output else "as usual"
            ] += 1
            shutil.rmtree(results, ignore_errors=True)
    figures += [
        Figure(what="results lost, of runs on a disk that fills", rows=RUNS * CASES, found=str(len(lost)), wanted="0"),
        Figure(what="tracebacks", rows=RUNS, found=str(len(tracebacks)), wanted="0"),
        Figure(what="how the runs ended", rows=RUNS, found=", ".join(f"{count} {how}" for how, count in ends.items()), wanted=""),
    ]
    assert not lost + tracebacks, "\n\n".join(lost + tracebacks)
