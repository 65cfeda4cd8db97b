"""What a site of many machines costs: time and memory to build it, and how large it is.

Run by `tox run -e bench`; the results are those of tests/data, dealt out to machines, models and versions.
"""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import cycle, islice
from pathlib import Path

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.core.records import Machine, Result, Tier, Timeline, encode_record
from harness.core.units import GIB, format_size
from harness.results import store
from tests.support.builders import GOLDEN
from tests.support.reporting import Figure

MACHINES, RESULTS = 200, 50
LIMIT_S, LIMIT_BYTES, LIMIT_PAGE_BYTES = 10, GIB, 2 << 20
replace = msgspec.structs.replace


def machine(like: Machine, number: int) -> Machine:
    def other(tier: Tier) -> Tier:
        return replace(tier, total_bytes=tier.total_bytes + number % 9 * GIB) if tier.kind == "gpu" and tier.total_bytes else tier

    return replace(like, name=f"{like.name}, number {number}", tiers=tuple(map(other, like.tiers)))


def dealt(number: int, golden: list[Result], chance: random.Random) -> Iterator[Result]:
    """Yield the results of one machine: models and precisions of the golden ones, with a timeline as long as a real one."""
    of_gpu = [result for result in golden if bool(result.machine.gpus) == (number % 4 != 0)]
    for turn, result in enumerate(islice(cycle(of_gpu), RESULTS)):
        case = replace(
            result.case, model=f"{result.case.model}-{number % 20}" if turn < len(of_gpu) else f"other-{number % 30}-{turn % 3}"
        )
        at = datetime(2024, 5, 1, tzinfo=timezone.utc) + timedelta(hours=number, minutes=turn)
        ram = [chance.randrange(GIB) for _ in range(300)]
        yield replace(
            result,
            case=case,
            id=case.id,
            run=f"run-{turn}",
            at=f"{at:%Y-%m-%dT%H:%M:%SZ}",
            machine=machine(result.machine, number),
            timeline=Timeline(t_s=[round(0.1 * i, 3) for i in range(300)], ram_bytes=ram, ram_anon_bytes=ram)
            if result.phases
            else None,
            environment={**result.environment, "torch": f"2.{number % 7}.{turn // 20}"},
        )


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("artifacts"), random.Random(1)
    golden = store.read(GOLDEN)[0]
    for number in range(MACHINES):
        place = folder / f"matrix-{number}"
        place.mkdir()
        (place / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in dealt(number, golden, chance)))
    return folder


def test_two_hundred_machines_of_fifty_results(
    benchmark: BenchmarkFixture, figures: list[Figure], artifacts: Path, tmp_path: Path
) -> None:
    walls: list[float] = []

    def once() -> None:
        command = [sys.executable, "-m", "harness", "publish", str(artifacts), "--to", str(tmp_path / "site")]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        walls.append(time.perf_counter() - begun)
        assert f"({MACHINES * RESULTS:,} results, " in done.stdout
        assert re.search(r"\b0 lines refused", done.stdout)

    benchmark.pedantic(once, rounds=3)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    files = [file for file in (tmp_path / "site").rglob("*") if file.is_file()]
    pages = [file.stat().st_size for file in files if file.suffix == ".html"]
    of = f"{MACHINES} machines x {RESULTS} results"
    figures.append(Figure(what=f"a site of {of}, {os.cpu_count()} cores", found=f"{min(walls):.1f} s", wanted=f"{LIMIT_S} s"))
    figures.append(Figure(what="its largest process", found=format_size(peak), wanted=format_size(LIMIT_BYTES)))
    figures.append(
        Figure(what=f"its largest page of {len(pages)}", found=format_size(max(pages)), wanted=format_size(LIMIT_PAGE_BYTES))
    )
    figures.append(Figure(what="all of it", found=format_size(sum(file.stat().st_size for file in files)), wanted=""))
    assert min(walls) <= LIMIT_S
    assert peak <= LIMIT_BYTES
    assert max(pages) <= LIMIT_PAGE_BYTES
