"""What a site of many machines costs: time and memory to build it, and how large it is.

Run by `tox run -e bench`; the results are those of tests/data, dealt out to machines, models and versions.
"""

from __future__ import annotations

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

from harness.core.records import Machine, Result, Tier, Timeline, encode_record
from harness.core.units import GIB, MIB, format_size
from harness.results import store
from tests.support.builders import GOLDEN
from tests.support.reporting import Figure

MACHINES, RESULTS = 2_000, 50
# Of all processes, so that neighbors count little: a minute on two cores, and five seconds.
AIM_S, AIM_MORE_S = 120, 5
# What holds so far, where neighbors take half of each core.
LIMIT_S, LIMIT_MORE_S = 400, 10
LIMIT_BYTES, LIMIT_PAGE_BYTES = GIB, MIB
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


def save(folder: Path, number: int, golden: list[Result], chance: random.Random) -> None:
    place = folder / f"matrix-{number}"
    place.mkdir()
    (place / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in dealt(number, golden, chance)))


def publish(artifacts: Path, site: Path, results: int) -> tuple[float, float]:
    """Build the site as a user does; return the seconds that all of its processes computed, and those that passed."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "harness", "publish", str(artifacts), "--to", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"({results:,} results, " in done.stdout
    assert re.search(r"\b0 lines refused", done.stdout)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - began


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("fresh_cache")
def test_two_thousand_machines_of_fifty_results_and_one_more(figures: list[Figure], tmp_path: Path) -> None:
    artifacts, site, chance = tmp_path / "artifacts", tmp_path / "site", random.Random(1)
    golden = store.read(GOLDEN)[0]
    artifacts.mkdir()
    for number in range(MACHINES):
        save(artifacts, number, golden, chance)
    whole, whole_wall = publish(artifacts, site, MACHINES * RESULTS)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    save(artifacts, MACHINES, golden, chance)
    more, more_wall = publish(artifacts, site, (MACHINES + 1) * RESULTS)
    nothing, _ = publish(artifacts, site, (MACHINES + 1) * RESULTS)
    files = [file for file in site.rglob("*") if file.is_file()]
    pages = [file.stat().st_size for file in files if file.suffix == ".html"]
    data = [file.stat().st_size for file in files if file.suffix == ".json"]
    rows = [
        (f"a site of {MACHINES:,} machines x {RESULTS} results, processor time", f"{whole:.0f} s", f"{AIM_S} s"),
        ("the same, from begin to end", f"{whole_wall:.0f} s", f"{AIM_S / 2:.0f} s"),
        ("one machine more, processor time", f"{more:.1f} s", f"{AIM_MORE_S} s"),
        ("the same, from begin to end", f"{more_wall:.1f} s", f"{AIM_MORE_S} s"),
        ("the same again, with nothing new", f"{nothing:.1f} s", ""),
        ("the largest process", format_size(peak), format_size(LIMIT_BYTES)),
        (f"the largest page of {len(pages):,}", format_size(max(pages)), format_size(LIMIT_PAGE_BYTES)),
        ("the largest file of data beside a page", format_size(max(data)), ""),
        ("all of it", format_size(sum(file.stat().st_size for file in files)), ""),
    ]
    figures.extend(Figure(what=what, found=found, wanted=wanted) for what, found, wanted in rows)
    assert whole <= LIMIT_S
    assert more <= LIMIT_MORE_S
    assert peak <= LIMIT_BYTES
    assert max(pages) <= LIMIT_PAGE_BYTES
