"""A matrix over simulated nodes of Ray: what the engine costs, and that kills lose nothing and count nothing twice.

Run by `tox run -e fleet`. FLEET_NODES, FLEET_MODELS and FLEET_KILLS say how much: each model has 10 cases, a contract has a shard
for each node, or for each model where there are fewer of those, and a node that measures holds some 250 MiB. FLEET_MODELS may be a
list: 100,1000.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.core.records import Outcome, Result
from harness.core.units import format_size
from harness.fleet.collect import Amiss, Collected, collect
from harness.fleet.contract import parse_utc, read_contract
from harness.fleet.receipt import find_receipts, read_receipt
from harness.results import store
from tests.support import ray_runs, small_models
from tests.support.reporting import Figure, gathered
from tests.support.scripted_cluster import WAYS, alone

pytest.importorskip("ray", reason="needs ray, the extra fleet")

MODELS = [int(models) for models in os.environ.get("FLEET_MODELS", "10").split(",")]
NODES, KILLS = int(os.environ.get("FLEET_NODES", "5")), int(os.environ.get("FLEET_KILLS", "20"))
PLACEMENTS = ("cpu", "auto")
MACHINES, GROWING = 50, (100, 300, 1000)  # of the driver alone: machines that are scripted, shards of 10 cases that they share
ROUNDS, QUIET = 9, 3  # tried at most, and how many are enough
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
_TAKEN = re.compile(r"^\S+ (taken|given back) by process (\d+)")


@pytest.fixture
def costs(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "costs"):
        yield section.figures


@pytest.fixture
def growth(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "driver"):
        yield section.figures


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "kills"):
        yield section.figures


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fr-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "f"


@pytest.fixture
def alike(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "alike"):
        yield section.figures


class Nodes:
    """A cluster of nodes on this machine, each with a lease of its own."""

    def __init__(self, path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray.cluster_utils import Cluster

        for name, value in ray_runs.environment(path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
        self.nodes: list[Any] = []
        self.grow(count)

    def add(self, *, wait: bool = True) -> Any:
        return self.cluster.add_node(num_cpus=0, resources={"machine": 1}, object_store_memory=80_000_000, wait=wait)

    def grow(self, count: int) -> None:
        """Add nodes side by side, until there are so many."""
        self.nodes += [self.add(wait=False) for _ in range(count - len(self.nodes))]
        self.cluster.wait_for_nodes(timeout=30 + 10 * count)

    @property
    def address(self) -> str:
        return str(self.cluster.address)


def planned(path: Path, models: int, shards: int, *words: str, **behaviors: str) -> int:
    """Plan a fleet over so many models in ten ways each, in so many shards; return how many cases there are."""
    names = [f"m{number}" for number in range(models)]
    ray_runs.folder(path, names, [f"node-{number}" for number in range(shards)], **behaviors)
    ray_runs.plan(path, names, PRECISIONS, "--placement", "auto", *words)
    return len(names) * len(PRECISIONS) * len(PLACEMENTS)


def held(path: Path, folder: str = "fleet/results") -> Collected:
    agreed = read_contract(path / "fleet")
    found = collect(agreed, find_receipts([path / folder]), datetime.now(timezone.utc))
    assert sorted([*found.counted, *found.missing]) == sorted(one.key for one in agreed.terms.cases)
    return found


def overlaps(path: Path) -> tuple[int, int]:
    """Count the times that a lease was taken while another process that still lived had it, and how often leases were taken."""
    wrong = taken = 0
    for log in path.glob("*.lease.log"):
        holder = ""
        for line in log.read_text(encoding="utf-8").splitlines():
            found = _TAKEN.match(line)
            assert found, line
            if found[1] == "taken":
                taken += 1
                holder = found[2]
            else:
                wrong += holder != found[2]  # given back by another than took it last: two had it
    return wrong, taken


def ours(path: Path) -> list[psutil.Process]:
    """Return the processes that run in a folder's temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(path / "tmp")) or "shard.json" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_what_the_engine_costs(place: Path, costs: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one node, where everything that is not measuring is the engine's; then on many at once, which share the cores of this."""
    one = min([*MODELS, 10])
    few = planned(place, one, one)
    many = {models: planned(place.with_name(f"f{models}"), models, min(models, NODES)) for models in MODELS}
    nodes = Nodes(place, 1, monkeypatch)
    try:
        one_s, _ = _over_ray(place, nodes, "one")
        nodes.grow(NODES)
        found = {models: _over_ray(place.with_name(f"f{models}"), nodes, "all") for models in MODELS}
    finally:
        nodes.cluster.shutdown()
    overhead = (one_s - _measuring_s(place / "one")) / few
    what = "the engine's own time a case on one node, starts of Ray and pytest in it"
    costs.append(Figure(what=what, rows=few, found=f"{overhead:.2f} s", wanted="1 s"))
    costs.append(Figure(what="time a case on one node", rows=few, found=f"{one_s / few:.2f} s", wanted=""))
    for models, (seconds, rss) in found.items():
        cases, counted = many[models], _counted(place.with_name(f"f{models}"))
        rows = (
            (f"time a case over {NODES} nodes of this machine", f"{seconds / cases:.3f} s", "1 s"),
            (f"cases collected from {NODES} nodes", str(counted), "all"),
            ("the driver's resident memory at most", format_size(rss), "500 MiB"),
        )
        costs += [Figure(what=what, rows=cases, found=told, wanted=wanted) for what, told, wanted in rows]
    least, most = min(MODELS), max(MODELS)
    grows = found[most][0] / many[most] / (found[least][0] / many[least])
    if most > least:
        costs.append(Figure(what="time a case, most cases / fewest", found=f"{grows:.2f}", wanted="at most 1"))
    assert overhead <= 1
    assert grows <= 2
    assert max(rss for _, rss in found.values()) <= 500 << 20


def _counted(path: Path) -> int:
    """Return how many cases have a result that counts, once none is missing."""
    found = held(path, "all")
    assert not found.missing
    return len(found.counted)


def test_the_driver_s_share_grows_as_the_cases_do(place: Path, growth: list[Figure]) -> None:
    """The driver alone, over machines that are scripted: what it takes of the processor to hand out, keep and collect."""
    found = [alone(place.with_name(str(models)), models, MACHINES) for models in GROWING]
    for models, (seconds, rss) in zip(GROWING, found, strict=True):
        cases = models * len(WAYS)
        what = f"processor time a case of the driver alone, over {MACHINES} scripted machines"
        growth.append(Figure(what=what, rows=cases, found=f"{seconds / cases * 1e3:.2f} ms", wanted=""))
        growth.append(Figure(what="its resident memory at the end", rows=cases, found=format_size(rss), wanted="500 MiB"))
    each = [seconds / models for models, (seconds, _) in zip(GROWING, found, strict=True)]
    growth.append(Figure(what="time a case, most cases / fewest", found=f"{each[-1] / each[0]:.2f}", wanted="below 2"))
    assert each[-1] / each[0] < 2
    assert max(rss for _, rss in found) <= 500 << 20


def _measuring_s(folder: Path) -> float:
    """Return the seconds that runs took by their receipts, from the first word of each to its last."""
    receipts = [read_receipt(path) for path in find_receipts([folder])]
    return sum((parse_utc(one.ended_at or one.heard_at) - parse_utc(one.started_at)).total_seconds() for one in receipts)


def _over_ray(path: Path, nodes: Nodes, folder: str) -> tuple[float, int]:
    """Measure a contract anew over a cluster; return the seconds and the most that the driver held."""
    started, most = time.monotonic(), 0
    words = ["run", "fleet", "--ray", nodes.address, "--without-token", "--results", folder]
    with (path / f"{folder}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", "fleet", *words], cwd=path, env=ray_runs.environment(path), stdout=log, stderr=log
        )
        while process.poll() is None:
            try:
                most = max(most, psutil.Process(process.pid).memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.2)
    assert process.wait() == 0, (path / f"{folder}.log").read_text()
    return time.monotonic() - started, most


def test_kills_lose_nothing_and_count_nothing_twice(place: Path, kills: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers, runs, actors, nodes and the driver, at random moments; then what is left runs through."""
    chance = random.Random(19)
    planned(place, MODELS[0], MODELS[0], "--attempts", "100", **dict.fromkeys(PRECISIONS, "brisk"))
    nodes = Nodes(place, 3, monkeypatch)
    killed: dict[str, int] = defaultdict(int)
    command = ["run", "fleet", "--ray", nodes.address, "--without-token"]
    try:
        process = ray_runs.start(place, *command)
        while sum(killed.values()) < KILLS:
            time.sleep(chance.uniform(0.5, 4))
            if process.poll() is not None:
                ray_runs.finish(process)
                if not held(place).missing:
                    break
                process = ray_runs.start(place, *command)
                continue
            what = chance.choice(("worker", "run", "actor", "driver", "node"))
            if what == "node" and ours(place):
                nodes.cluster.remove_node(nodes.nodes.pop(0), allow_graceful=False)
                nodes.nodes.append(nodes.add())
            elif what == "node" or not _kill(what, process.pid, place):
                continue
            killed[what] += 1
        if process.poll() is None:
            process.kill()
        ray_runs.finish(process)
        status, said = ray_runs.finish(ray_runs.start(place, *command), timeout_s=900)
        assert status == 0, said
    finally:
        nodes.cluster.shutdown()
    found = held(place)
    deadline = time.monotonic() + 30
    while (left := ours(place)) and time.monotonic() < deadline:
        time.sleep(0.5)
    wrong, taken = overlaps(place)
    kinds = {one.kind for one in found.findings}
    files = [one.name for one in (place / "tmp").iterdir() if one.name.startswith("fitmatrix-")]
    told = ", ".join(f"{count} {what}" for what, count in sorted(killed.items()))
    kills += [
        Figure(what=f"kills ({told})", found=str(sum(killed.values())), wanted=str(KILLS)),
        Figure(
            what="cases with one counted result",
            found=f"{len(found.counted)} of {len(found.counted) + len(found.missing)}",
            wanted="all",
        ),
        Figure(what="overlaps by the log of the leases", rows=taken, found=str(wrong), wanted="0"),
        Figure(what="processes left", found=str(len(left)), wanted="0"),
        Figure(what="folders left that the next run does not remove", found=str(_left_behind(place)), wanted="0"),
    ]
    assert not found.missing
    assert kinds <= {Amiss.TWICE, Amiss.ENDED}
    assert (wrong, left) == (0, [])
    assert len(files) <= sum(killed.values())


def test_a_case_over_ray_is_as_by_pytest_alone(place: Path, alike: list[Figure]) -> None:
    """Rounds of a run over Ray between two by pytest alone; those count in which these two agree within 5 %."""
    ray_runs.folder(place, [], ["one"])
    (place / "cases/conftest.py").unlink()  # its workers are scripted
    small_models.save("llama", place / "mid", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
    small_models.write_letters(place / "mid", 1500)
    way = ("--precision", "bf16", "--placement", "cpu", "--new-tokens", "48", "--repeats", "7")
    status, said = ray_runs.finish(ray_runs.start(place, "plan", "--model", str(place / "mid"), *way))
    assert status == 0, said
    rounds, quiet = [], []
    before = _by_pytest(place, "pytest-0", *way)
    for number in range(1, ROUNDS + 1):
        status, said = ray_runs.finish(ray_runs.start(place, "run", "fleet", "--to", f"ray-{number}", "--results", f"all-{number}"))
        assert status == 0, said
        one = (before, _only_result(place / f"ray-{number}"), before := _by_pytest(place, f"pytest-{number}", *way))
        rounds.append(one)
        if _drift(one, "decode_tok_s") <= 0.05:
            quiet.append(one)
        if len(quiet) == QUIET:
            break
    for _, over_ray, by_pytest in rounds:
        assert over_ray.loaded is not None
        assert by_pytest.loaded is not None
        assert over_ray.loaded.threads == by_pytest.loaded.threads
    ratios = {}
    for key, what, wanted in (("ram_needed_bytes", "RAM needed", 0.02), ("decode_tok_s", "tokens/s", 0.05)):
        used = rounds if key == "ram_needed_bytes" else quiet or rounds
        ratios[key] = statistics.median(_against(one, key) for one in used)
        told = f"{ratios[key]:.3f} (by pytest twice: {statistics.median(_drift(one, key) for one in used):.1%} apart)"
        what = f"{what} over Ray / by pytest alone, median of {len(used)} of {len(rounds)} rounds"
        alike.append(Figure(what=what, found=told, wanted=f"within {wanted:.0%}"))
    loaded = rounds[0][1].loaded
    alike.append(Figure(what="threads of torch over Ray and by pytest", found=f"{loaded and loaded.threads}", wanted="equal"))
    assert abs(ratios["ram_needed_bytes"] - 1) <= 0.02
    if not quiet:
        pytest.skip("pytest alone did not repeat its own figure in any round: the report has it, and it says nothing of Ray")
    assert abs(ratios["decode_tok_s"] - 1) <= 0.05


def _against(one: tuple[Result, Result, Result], key: str) -> float:
    """Return a figure over Ray, as a share of the mean of those by pytest before and after it."""
    before, over_ray, after = (result.metrics[key] for result in one)
    return over_ray / ((before + after) / 2)


def _drift(one: tuple[Result, Result, Result], key: str) -> float:
    """Return by how much a figure by pytest changed from before the run over Ray to after it."""
    return abs(one[2].metrics[key] / one[0].metrics[key] - 1)


def _by_pytest(path: Path, folder: str, *way: str) -> Result:
    """Measure the model of a folder by pytest alone, with the options of a shard's run."""
    words = ["-p", "harness.plugin", "-p", "no:cacheprovider", "-o", "markers=stage(n): the order", "cases"]
    command = [sys.executable, "-m", "pytest", *words, "--model", str(path / "mid"), *way, "--results", folder]
    done = subprocess.run(command, cwd=path, env=ray_runs.environment(path), capture_output=True, text=True, check=False)
    assert (path / folder / "results.jsonl").is_file(), done.stdout + done.stderr
    return _only_result(path / folder)


def _only_result(folder: Path) -> Result:
    (found,) = store.read(folder / store.NAME)[0]
    assert found.outcome is Outcome.OK, found.why
    return found


def _kill(what: str, driver: int, path: Path) -> bool:
    """Kill a process of a kind with SIGKILL; say whether there was one."""
    if what == "driver":
        is_measuring = bool(ours(path))
        if is_measuring:
            psutil.Process(driver).kill()
        return is_measuring
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            is_run = "shard.json" in words and process.cwd().startswith(str(path))
            if what == "run" and is_run:
                process.kill()
                return True
            if what == "actor" and words and words[0].startswith("ray::HeldMachine"):
                process.kill()
                return True
            if what == "worker" and is_run and (below := process.children(recursive=True)):
                below[-1].kill()
                return True
        except psutil.Error:
            continue
    return False


def _left_behind(path: Path) -> int:
    """Count the folders of runs that are left once another run has swept."""
    from harness.machine.scratch import sweep

    sweep(path / "tmp")
    return sum(one.name.startswith("fitmatrix-") for one in (path / "tmp").iterdir())
