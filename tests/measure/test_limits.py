"""The guard: what passes its own limit is ended, and so is what would take the machine's last memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from harness.core.records import Outcome, Result
from harness.core.units import GIB, MIB
from harness.machine import cgroup, headroom
from harness.measure.limits import RULES, Breach, LimitGuard, Limits, judge_limits
from harness.measure.sampler import Sample
from harness.planning import feasibility
from harness.run.case_result import CaseEnded, CaseModel, RunContext
from harness.run.runner import Run
from tests.support import builders, scripted

SAMPLE = Sample(at_s=1.0, ram_bytes=3 * GIB, anon_bytes=2 * GIB, vram_bytes={"gpu:0": GIB, "gpu:1": 5 * GIB})


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


# The limits, what is available, and the rule that is broken with its limit and value.
@pytest.mark.parametrize(
    ("limits", "available", "broken"),
    [
        (Limits(), 0, None),
        (Limits(anon_bytes=2 * GIB, vram_bytes=5 * GIB, floor_bytes=GIB), GIB, None),
        (Limits(anon_bytes=2 * GIB - 1), GIB, ("ram-limit", 2 * GIB - 1, 2 * GIB)),
        (Limits(vram_bytes=4 * GIB), GIB, ("vram-limit", 4 * GIB, 5 * GIB)),
        (Limits(floor_bytes=GIB), GIB - 1, ("machine-memory", GIB, GIB - 1)),
        (Limits(anon_bytes=GIB, floor_bytes=GIB), 0, ("ram-limit", GIB, 2 * GIB)),
    ],
)
def test_the_first_rule_that_is_broken(limits: Limits, available: int, broken: tuple[str, int, int] | None) -> None:
    expected = None if broken is None else Breach(rule=broken[0], limit_bytes=broken[1], value_bytes=broken[2], held_bytes=2 * GIB)
    assert judge_limits(SAMPLE, limits, lambda: available) == expected


def test_no_gpu_breaks_no_limit_on_vram() -> None:
    assert judge_limits(replace(SAMPLE, vram_bytes={}), Limits(vram_bytes=1), lambda: GIB) is None


def test_a_case_is_ended_once() -> None:
    ended: list[str] = []
    guarding = LimitGuard(Limits(anon_bytes=GIB), ended.append)
    for _ in range(3):
        guarding(SAMPLE)
    assert ended == ["ram-limit"]
    assert guarding.breach is not None


def test_every_rule_is_broken_here() -> None:
    assert {rule.name for rule in RULES} == {"ram-limit", "vram-limit", "machine-memory"}


def test_the_floor_leaves_most_of_a_machine_to_use() -> None:
    total = psutil.virtual_memory().total
    assert min(256 * MIB, total // 8) <= headroom.floor_bytes() <= total // 8
    assert [headroom.floor_of(size) for size in (GIB, 8 * GIB, 100 * GIB)] == [128 * MIB, 256 * MIB, 2 * GIB]
    assert 0 < headroom.available()() <= total


def run(scratch: Path, behavior: str, ram_bytes: int | None = None) -> Result:
    """Run a scripted case to its end, as far as it comes."""
    decided = feasibility.decide(replace(builders.case(), ram_bytes=ram_bytes), builders.machine(), None)
    setting = RunContext(
        run="20261124T080000Z-abc123",
        machine=builders.machine(),
        environment={},
        scratch=scratch,
        worker_main=scripted.worker(behavior),
        timeout_s=60,
    )
    (scratch / "tiny").mkdir()
    case = Run(decided, CaseModel(location=scratch / "tiny"), setting)
    with contextlib.suppress(CaseEnded):
        case.load()
        case.first_round()
    result = case.finish()
    assert not scripted.workers()
    assert [path.name for path in scratch.iterdir()] == ["tiny"]
    return result


def test_without_a_group_the_guard_holds_a_case_to_its_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "group", lambda _: None)
    result = run(tmp_path, "hoard_and_hang", 300 * MIB)
    assert (result.outcome, result.stage) == (Outcome.OOM, "load")
    assert result.why is not None
    assert "that cannot be dropped, and --ram allows 300 MiB" in result.why
    assert result.machine.tiers[0].limit_bytes == 300 * MIB
    assert result.timeline is not None
    assert max(result.timeline.ram_anon_bytes) < GIB


@pytest.mark.skipif(not cgroup.is_allowed(), reason="no control group can be made here")
def test_in_a_group_the_kernel_holds_a_case_to_its_ram(tmp_path: Path) -> None:
    result = run(tmp_path, "hoard_and_hang", 300 * MIB)
    assert (result.outcome, result.why) == (Outcome.OOM, "out of memory during loading: it needed more than --ram 300MiB allows")
    assert result.id.endswith("cpu@ram300MiB")
    folder = next(cgroup._parents(cgroup.ROOT))[0]
    assert not list(folder.glob(f"fitmatrix-{os.getpid()}-*"))


def test_what_fits_its_limit_runs(tmp_path: Path) -> None:
    assert run(tmp_path, "ok", GIB).outcome is Outcome.OK


def test_the_machine_s_last_memory_ends_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = headroom.available()()
    monkeypatch.setattr(headroom, "floor_bytes", lambda: before - 200 * MIB)
    result = run(tmp_path, "hoard_and_hang")
    assert result.outcome is Outcome.OOM
    assert result.why is not None
    assert "it was ended when the machine had only" in result.why
