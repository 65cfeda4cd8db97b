"""What disturbs a measurement: what is counted between two moments, what of it is too much, and which figures it spoils."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.core.metrics import METRICS
from harness.core.records import GpuInterference, Interference
from harness.core.units import MIB
from harness.machine import cgroup
from harness.measure import interference, system_counters
from harness.measure.interference import InterferenceWatch, noise, power_capped
from harness.measure.sampler import Gpus
from harness.measure.system_counters import Cpu, Swap, Used
from tests.machine.test_probe import Nvml
from tests.support import scripted

BURN = "while True: pass"


class System:
    """Stands in for the system's counters; a test moves them on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.cpus = 1000.0, 2
        self.idle_s = self.stolen_s = self.user_s = self.own_s = 0.0
        self.moved_bytes = self.throttles = 0
        self.withheld_s: float | None = None
        self.allowed = 2
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(system_counters, "cpu", lambda _: Cpu(self.cpus, self.idle_s, self.stolen_s, self.user_s))
        monkeypatch.setattr(system_counters, "used", lambda _: Used(self.own_s, self.own_s))
        monkeypatch.setattr(system_counters, "swap", lambda: Swap(3 * MIB, self.moved_bytes))
        monkeypatch.setattr(system_counters, "cpu_throttles", lambda _: self.throttles)
        monkeypatch.setattr(cgroup, "withheld", lambda: None if self.withheld_s is None else lambda: self.withheld_s)
        monkeypatch.setattr(cgroup, "cores", lambda: self.allowed)
        monkeypatch.setattr(psutil.Process, "cpu_times", lambda _: SimpleNamespace(user=0.0, system=0.0))

    def window(
        self,
        seconds: float = 10.0,
        *,
        own: float = 1.9,
        others: float = 0.0,
        stolen: float = 0.0,
        kernel: float = 0.0,
        phase: str = "warm",
        **changes: float,
    ) -> Interference:
        """Let time go by, in which so many cores were used, `kernel` those of kernel threads."""
        watch = InterferenceWatch(os.getpid())
        watch.begin()
        self.now_s += seconds
        self.own_s += own * seconds
        self.user_s += (own + others) * seconds
        self.stolen_s += stolen * seconds
        self.idle_s += (self.cpus - own - others - stolen - kernel) * seconds
        for name, more in changes.items():
            setattr(self, name, getattr(self, name) + more)
        return watch.end(phase)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


# What is counted


def test_a_window_tells_who_used_the_cpus(system: System) -> None:
    found = system.window(4.0, own=1.0, others=0.5, stolen=0.25, moved_bytes=100)
    assert (found.phase, found.cpus, found.end_s - found.start_s) == ("warm", 2, 4.0)
    cores = found.own_cores, found.others_cores, found.others_user_cores, found.stolen_cores, found.idle_cores
    assert cores == pytest.approx((1.0, 0.5, 0.5, 0.25, 0.25))
    assert (found.swapped_bytes, found.swap_used_bytes) == (100, 3 * MIB)


def test_ticks_make_no_time_negative(system: System) -> None:
    assert system.window(own=2.1).others_cores == 0.0


def test_times_count_from_the_origin(system: System) -> None:
    watch = InterferenceWatch(os.getpid(), origin_s=system.now_s - 5)
    watch.begin()
    system.now_s += 2
    found = watch.end("load")
    assert (found.start_s, found.end_s) == (5.0, 7.0)


def test_a_system_that_counts_nothing_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_counters, "cpu", scripted.no_counters)
    watch = InterferenceWatch(os.getpid())
    watch.begin()
    found = watch.end("warm")
    assert (found.cpus, found.others_cores, found.swapped_bytes, found.why) == (None, None, None, "")
    assert noise([found]) == {}


def test_a_worker_that_is_gone_is_no_error() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    watch = InterferenceWatch(gone.pid)
    watch.begin()
    gone.wait()
    assert watch.end("warm").others_cores is None


@pytest.mark.parametrize("linux", [pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc")), False])
def test_a_process_that_is_not_ours_is_seen(monkeypatch: pytest.MonkeyPatch, linux: bool) -> None:
    """With the real counters: a burner beside our own tree; it gets a part of a core whatever else runs here."""
    monkeypatch.setattr(system_counters, "LINUX", linux)
    watch, ours = InterferenceWatch(os.getpid()), subprocess.Popen([sys.executable, "-c", BURN])
    watch = InterferenceWatch(ours.pid)
    with ours, subprocess.Popen([sys.executable, "-c", BURN]) as burner:
        watch.begin()
        before = sum(psutil.Process(burner.pid).cpu_times()[:2])
        while sum(psutil.Process(burner.pid).cpu_times()[:2]) - before < 0.3:
            time.sleep(0.05)
        found = watch.end("warm")
        burner.kill()
        ours.kill()
    assert found.others_cores is not None
    assert found.own_cores is not None
    assert found.others_cores * (found.end_s - found.start_s) > 0.25
    assert found.own_cores > 0
    if (os.cpu_count() or 1) <= 2:  # else there is room for it
        assert found.why.startswith("others used ")


# What is too much


@pytest.mark.parametrize(
    ("seconds", "others", "is_much"),
    [(10.0, 0.04, False), (10.0, 0.06, True), (0.2, 0.2, False), (0.2, 0.3, True), (0.5, 1.0, True)],
    ids=["4 %", "6 %", "ticks of a short round", "more than ticks", "a core"],
)
def test_others_may_use_a_twentieth_of_one_core(system: System, seconds: float, others: float, is_much: bool) -> None:
    found = system.window(seconds, own=2 - others, others=others)
    assert found.why == (f"others used {others:.2g} of 2 cores" if is_much else "")


def test_the_limit_does_not_grow_with_the_machine(system: System) -> None:
    """With a thread on each core, all wait for the one that shares its core."""
    system.cpus = 64
    assert system.window(own=60.0, others=0.1).why == "others used 0.1 of 64 cores"


@pytest.mark.parametrize(("own", "others", "is_much"), [(1.0, 1.0, False), (1.0, 5.0, True), (8.0, 1.0, True)])
def test_where_most_cpus_idle_others_are_not_in_the_way(system: System, own: float, others: float, is_much: bool) -> None:
    system.cpus = 16
    assert bool(system.window(own=own, others=others).why) is is_much


def test_what_kernel_threads_do_for_a_load_is_not_foreign(system: System) -> None:
    assert system.window(phase="load", own=1.0, kernel=0.9).why == ""
    assert system.window(phase="warm", own=1.0, kernel=0.9).why == "others used 0.9 of 2 cores"
    assert system.window(phase="load", own=1.0, others=0.9).why == "others used 0.9 of 2 cores"


def test_a_hypervisor_s_part_is_told(system: System) -> None:
    assert system.window(own=1.4, stolen=0.6).why == "the hypervisor took 0.6 of 2 cores"


@pytest.mark.parametrize(("moved", "why"), [(9 * MIB, ""), (20 * MIB, "20.0 MiB were swapped")])
def test_swapping_is_told(system: System, moved: int, why: str) -> None:
    assert system.window(moved_bytes=moved).why == why


@pytest.mark.parametrize(("seconds", "why"), [(0.4, ""), (9, "the CPU quota withheld 0.9 of 2 cores")])
def test_a_quota_s_part_is_told(system: System, seconds: float, why: str) -> None:
    system.withheld_s, system.cpus = 5.0, 32
    assert system.window(withheld_s=seconds).why == why


def test_within_a_quota_others_may_use_what_it_does_not_allow(system: System) -> None:
    system.withheld_s, system.cpus = 0.0, 32
    assert system.window(own=1.9, others=20.0).why == ""
    assert system.window(own=1.9, others=29.0).why == "others used 29 of 32 cores"


def test_heat_is_told(system: System) -> None:
    found = system.window(throttles=2)
    assert (found.cpu_throttles, found.why) == (2, "the CPU was throttled for heat")


# Cards, through a stub of NVML


def held(pid: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


def busy(pid: int, share: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, smUtil=share)


Install = Callable[..., Gpus]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put cards into this machine."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(system_counters, "cpu", scripted.no_counters)

    def installed(*cards: dict[str, Any]) -> Gpus:
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(*cards))
        return Gpus()

    return installed


def on_gpu(gpus: Gpus, during: Callable[[], object] = lambda: None) -> Interference:
    watch = InterferenceWatch(os.getpid(), gpus=gpus)
    watch.begin()
    during()
    watch.glance()
    return watch.end("warm")


def test_others_on_a_card_are_told_from_us(install: Install) -> None:
    card: dict[str, Any] = {}
    gpus = install(card, {})

    def during() -> None:
        card["nvmlDeviceGetComputeRunningProcesses"] = [held(os.getpid(), 100), held(1, 30)]
        card["nvmlDeviceGetGraphicsRunningProcesses"] = [held(2, 4)]
        card["nvmlDeviceGetProcessUtilization"] = [busy(os.getpid(), 60), busy(1, 20), busy(1, 30), busy(2, 5)]

    found = on_gpu(gpus, during)
    assert found.gpus["gpu:0"] == GpuInterference(others_share=0.3, others_bytes=34)
    assert found.gpus["gpu:1"] == GpuInterference()
    assert found.why == "others used 30.0 % of gpu:0"


def test_memory_alone_disturbs_no_speed(install: Install) -> None:
    found = on_gpu(install({"nvmlDeviceGetComputeRunningProcesses": [held(1, 30), held(os.getpid(), 5)]}))
    assert (found.gpus["gpu:0"].others_bytes, found.why) == (30, "")


def test_in_a_container_that_hides_our_id_only_those_before_us_are_others(install: Install) -> None:
    """NVML then tells ids of the host, and ours cannot be known among them."""
    card: dict[str, Any] = {"nvmlDeviceGetComputeRunningProcesses": [held(1, 30)]}
    gpus = install(card)

    def during() -> None:
        card["nvmlDeviceGetComputeRunningProcesses"] = [held(1, 30), held(4_000_001, 100)]
        card["nvmlDeviceGetProcessUtilization"] = [busy(1, 2), busy(4_000_001, 90)]

    assert on_gpu(gpus, during).gpus["gpu:0"] == GpuInterference(others_share=0.02, others_bytes=30)


@pytest.mark.parametrize(
    ("reasons", "why"),
    [
        (0x0, ""),
        (0x1 | 0x2 | 0x10 | 0x100, ""),
        (0x4, ""),
        (0x4 | 0x20, "gpu:0 was throttled (heat)"),
        (0x8 | 0x40, "gpu:0 was throttled (hardware slowdown, heat, by hardware)"),
        (0x20, "gpu:0 was throttled (heat)"),
        (0x80, "gpu:0 was throttled (power brake)"),
    ],
)
def test_a_throttled_card_is_told_with_its_reasons(install: Install, reasons: int, why: str) -> None:
    assert on_gpu(install({"nvmlDeviceGetCurrentClocksThrottleReasons": reasons})).why == why


def test_a_card_s_clock_stands_beside_its_highest(install: Install) -> None:
    found = on_gpu(install({"nvmlDeviceGetClockInfo": 1500, "nvmlDeviceGetMaxClockInfo": 1980})).gpus["gpu:0"]
    assert (found.sm_mhz, found.sm_most_mhz) == (1500, 1980)


@pytest.mark.parametrize(
    ("mhz", "reasons", "why"),
    [
        (1980, 0x0, ""),
        (1500, 0x0, ""),  # a boost below the most is usual
        (345, 0x1, "gpu:0 ran at 345 of 1980 MHz"),
        (800, 0x4, ""),  # at its power cap
        (800, 0x2, ""),  # nvidia-smi --lock-gpu-clocks
    ],
)
def test_a_card_that_has_not_come_to_its_clock(install: Install, mhz: int, reasons: int, why: str) -> None:
    card = {"nvmlDeviceGetClockInfo": mhz, "nvmlDeviceGetMaxClockInfo": 1980}
    assert on_gpu(install({**card, "nvmlDeviceGetCurrentClocksThrottleReasons": reasons})).why == why


def test_the_clock_of_a_card_that_has_nothing_to_do_says_nothing(install: Install) -> None:
    """Beside a case on the CPU, or on the other card; and while a model is read."""
    watch = InterferenceWatch(os.getpid(), gpus=install({"nvmlDeviceGetClockInfo": 210, "nvmlDeviceGetMaxClockInfo": 1980}))
    watch.begin()
    assert watch.end("load").why == ""
    assert watch.end("warm").why != ""
    watch.expect(())
    assert (watch.end("warm").why, watch.end("warm").gpus["gpu:0"].sm_mhz) == ("", None)


def test_a_card_s_clock_counts_as_it_is_at_the_end_of_a_round(install: Install) -> None:
    """A round may be over before the first glance, and begins on a card at rest."""
    card: dict[str, Any] = {"nvmlDeviceGetClockInfo": 345, "nvmlDeviceGetMaxClockInfo": 1980}
    gpus = install(card)

    def during() -> None:
        card["nvmlDeviceGetClockInfo"] = 1965

    assert on_gpu(gpus, during).gpus["gpu:0"].sm_mhz == 1965


def test_a_power_cap_is_said_and_no_round_is_left_out_for_it() -> None:
    capped = GpuInterference(throttles=("power cap",), sm_mhz=900, sm_most_mhz=1980)
    windows = [window("load", gpus={"gpu:0": capped}), window(gpus={"gpu:0": capped}), window(gpus={"gpu:0": GpuInterference()})]
    assert noise(windows) == {}
    assert interference.undisturbed("ab", windows) == ["a", "b"]
    assert power_capped(windows) == "gpu:0 was at its power cap in 1 of 2 warm rounds"
    assert power_capped(windows[:1]) == ""


def test_a_clock_that_comes_up_over_the_rounds_leaves_the_first_out() -> None:
    clocks = [GpuInterference(sm_mhz=mhz, sm_most_mhz=2805) for mhz in (1410, 2400, 2805)]
    windows = [window(gpus={"gpu:0": card}, why="ramp" if number == 0 else "") for number, card in enumerate(clocks)]
    assert noise(windows, left_out=1)["decode_tok_s"].startswith("gpu:0 ran at 1410 of 2805 MHz in 1 of 3 warm rounds")


def test_clocks_are_looked_at_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    monkeypatch.setattr(system_counters, "cpu_mhz", lambda _: 3000.0 + 0 * next(looks))
    watch = InterferenceWatch(os.getpid())
    watch.begin()
    for _ in range(1000):
        watch.glance()
    assert next(looks) <= 5
    assert watch.end("warm").cpu_mhz == 3000


# Which figures it spoils


def window(phase: str = "warm", others: float = 0.0, why: str | None = None, **changes: Any) -> Interference:
    found: dict[str, Any] = {"start_s": 0.0, "end_s": 1.0, "cpus": 2, "others_cores": others, "idle_cores": 0.0}
    found["why"] = ("busy" if others > 0.05 else "") if why is None else why
    return Interference(phase=phase, **found | changes)


def test_what_others_took_is_summed_up_with_a_way_out() -> None:
    quiet, busy = [window(), window()], [window(others=0.3), window(others=0.98)]
    assert interference.advice([]) is None
    assert interference.advice([quiet, quiet]) is None
    told = interference.advice([quiet, busy, [window(others=0.5)]])
    assert told is not None
    assert told.startswith("other programs took up to 0.98 of 2 cores during 2 of 3 cases, ")
    assert told.endswith(" e.g. OMP_NUM_THREADS=1")


def test_quiet_windows_spoil_nothing() -> None:
    assert noise([window(phase) for phase in ("load", "cold", "warm", "warm", "score")]) == {}


def test_each_phase_spoils_its_figures() -> None:
    assert noise([window("load", 1.0)]).keys() == {"load_s", "weights_s", "dispatch_s", "ready_s"}
    assert noise([window("cold", 0.5)]).keys() == {"first_token_s", "ready_s"}
    assert "decode_tok_s" in noise([window("warm", 0.5)])
    assert noise([window("score", 0.5)]) == {}
    assert noise([window(phase, 1.0) for phase in ("load", "cold", "warm")]).keys() <= METRICS.keys()


def test_what_rests_on_two_phases_tells_of_both() -> None:
    said = noise([window("load", 1.0), window("cold", 0.5)])["ready_s"]
    assert said == "others used 1 of 2 cores during loading; others used 0.5 of 2 cores during cold round"


def test_it_says_how_many_rounds_and_what_became_of_them() -> None:
    windows = [window(), window(others=0.8), window(others=1.0), window()]
    said = noise(windows, left_out=2)["decode_tok_s"]
    assert said == "others used 0.9 of 2 cores in 2 of 4 warm rounds; the median is of the other 2"


def test_little_in_each_round_may_be_much_in_all() -> None:
    rounds = [window(others=0.08, why="", end_s=0.3) for _ in range(5)]
    assert noise(rounds[:1]) == {}
    assert noise(rounds)["decode_tok_s"] == "others used 0.08 of 2 cores over the warm rounds"


def test_a_clock_that_changed_between_rounds_is_told() -> None:
    assert noise([window(cpu_mhz=4000), window(cpu_mhz=3700)]) == {}
    said = noise([window(cpu_mhz=4500), window(), window(cpu_mhz=3100)])["decode_tok_s"]
    assert said == "the CPU's clock was between 3100 and 4500 MHz over the warm rounds"
    gpus = [{"gpu:0": GpuInterference(sm_mhz=mhz, sm_most_mhz=1980)} for mhz in (1965, 1500)]
    assert noise([window(gpus=each) for each in gpus]) == {}


@pytest.mark.parametrize(
    ("whys", "asked", "counted"),
    [
        (["", "", "", "", ""], 5, "abcde"),
        (["", "x", "", "x", ""], 5, "ace"),
        (["", "x", "", "x", "x"], 5, "abcde"),
        (["x", "", "x"], 1, "b"),
        (["x"], 1, "a"),
    ],
    ids=["quiet", "enough", "too few", "one was asked for", "none"],
)
def test_disturbed_rounds_do_not_count_where_there_are_enough_others(whys: list[str], asked: int, counted: str) -> None:
    windows = [window("load", why="x"), window("cold"), *(window(why=why) for why in whys)]
    assert interference.counted("abcde"[: len(whys)], windows, asked) == [*counted]
