"""What disturbs a measurement: CPU and GPU time of others, swapping, throttling, changed clocks; and which rounds it spoils.

The spread of the samples does not show it: one foreign process that takes a core slows every round alike, up to tenfold, because
the threads of a matrix product wait for the slowest. So the system's counters are read before and after each request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import psutil
from msgspec.structs import replace

from harness.core.metrics import phase_title
from harness.core.records import GpuInterference, Interference
from harness.core.units import format_share, format_size
from harness.machine import cgroup
from harness.measure import system_counters
from harness.measure.sampler import Gpus
from harness.measure.system_counters import Cpu, Swap, Used

T = TypeVar("T")

_GLANCE_S = 0.5
_SM_CLOCK = 1  # NVML_CLOCK_SM

# The bits of nvmlDeviceGetCurrentClocksThrottleReasons that slow a card down; idling is none of it.
_THROTTLES: Mapping[int, str] = {
    0x02: "chosen clock",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat, by hardware",
    0x80: "power brake",
}
# Properties of the card as it is set up, which every round has: a laptop's card is at its power cap whenever it works. They are
# kept with the result, disturb nothing, and explain a low clock.
_SET_UP = ("chosen clock", "power cap")

# With a thread on each core the share that others take of one core is the share by which all threads wait, so the limit is in
# shares of one core however many there are. The counters have ticks of 10 ms: against the times of all single processes a window
# was off by at most 0.04 s, whatever its length.
_MOST_CORES, _ERROR_S = 0.05, 0.05
# While a model is read, kernel threads decrypt and decompress for it: only the time of programs counts, which the kernel tells
# apart by looking at each tick, so that the error is greater.
_LOAD_ERROR_S = 0.1
_ROOM = 0.75  # with this share of the CPUs that we may use idle a foreign process runs beside ours and takes nothing from it
_MOST_SWAPPED_PER_S = 1 << 20
_MOST_GPU_SHARE = 0.05
_MOST_CLOCK_CHANGE = 0.10
# A card that comes from rest takes a second or two from 200-350 MHz to its clock. Cards at work stay somewhat below the most that
# NVML names (4090: 2,500 to 2,800 of 3,105), so only much less is a ramp. Not yet verified on a card.
_LEAST_CLOCK_SHARE = 0.6
_ENOUGH = 3  # undisturbed rounds make a median

# The metrics that rest on each phase.
_FIGURES: Mapping[str, Sequence[str]] = {
    "load": ("load_s", "weights_s", "dispatch_s", "ready_s"),
    "cold": ("first_token_s", "ready_s"),
    "warm": ("warm_first_token_s", "prefill_tok_s", "decode_tok_s", "token_p50_s", "token_p95_s", "energy_j"),
}


class _Counted(NamedTuple):
    """The counters at one moment."""

    at_s: float
    cpu: Cpu
    own: Used
    swap: Swap | None
    throttles: int
    withheld_s: float | None


class _Glance(NamedTuple):
    """What holds at one moment: MHz of the fastest CPU, and by card the MHz and the reasons of throttling."""

    cpu_mhz: float | None
    sm_mhz: dict[str, int]
    throttles: dict[str, int]


class InterferenceWatch:
    """Count what others do while a worker answers: `begin` before a request, `end` after its answer.

    What nobody counts, clocks and a card's reasons of throttling, is looked at by `glance`, which may be called from another thread
    as often as wanted. Our own time is that of this process and of the worker with everything that it started. Times of the
    records count from `origin_s` of the monotonic clock.
    """

    def __init__(self, pid: int, *, gpus: Gpus | None = None, origin_s: float = 0.0) -> None:
        self._pid, self._gpus, self._origin_s = pid, gpus, origin_s
        self._cpus = system_counters.usable_cpus()
        self._withheld = cgroup.withheld()
        self._begun_s, self._begun_us = time.monotonic(), 0
        self._before: _Counted | None = None
        self._glances: list[_Glance] = []
        self._glanced_s = 0.0
        self._at_work: Collection[str] | None = None
        # Where a container hides our own id from NVML, whoever is on the card already is a stranger.
        self._strangers = {pid for held in _process_bytes(gpus).values() for pid in held}

    def expect(self, tiers: Collection[str]) -> None:
        """Note which cards are to work: the clock of one that rests says nothing. Before that, all are."""
        self._at_work = tiers

    def begin(self) -> None:
        """Read the counters before a request."""
        self._glances = []
        self._begun_s, self._begun_us = time.monotonic(), time.time_ns() // 1000
        self._before = self._count()

    def glance(self) -> None:
        """Look at the clocks, at most twice a second."""
        now = time.monotonic()
        if now - self._glanced_s >= _GLANCE_S:
            self._glanced_s = now
            self._glances.append(self._look(system_counters.cpu_mhz(self._cpus)))

    def _look(self, cpu_mhz: float | None) -> _Glance:
        sm = self._gpus.ask("nvmlDeviceGetClockInfo", _SM_CLOCK) if self._gpus else {}
        reasons = self._gpus.ask("nvmlDeviceGetCurrentClocksThrottleReasons") if self._gpus else {}
        return _Glance(cpu_mhz, sm, reasons)

    def end(self, phase: str) -> Interference:
        """Read the counters after the answer, and return what others did; what the system does not report is None.

        The cards are looked at once more: a round may be over before the first glance, and their clock counts as it was at the end.
        That of the CPUs falls as soon as they rest, and is the mean of the glances.
        """
        if self._gpus:
            self._glances.append(self._look(None))
        mhz = [glance.cpu_mhz for glance in self._glances if glance.cpu_mhz is not None]
        window = Interference(
            phase=phase,
            start_s=round(self._begun_s - self._origin_s, 4),
            end_s=round(time.monotonic() - self._origin_s, 4),
            cpu_mhz=round(statistics.fmean(mhz)) if mhz else None,
            gpus=self._of_gpus(),
            **_between(self._before, self._count()),
        )
        return replace(window, why=", ".join(said for check in _CHECKS if (said := check([window]))))

    def _count(self) -> _Counted | None:
        """Read the counters; None if the system has none, or the worker is gone."""
        try:
            now, cpu = time.monotonic(), system_counters.cpu(self._cpus)
            worker, mine = system_counters.used(self._pid), psutil.Process().cpu_times()
        except (OSError, psutil.Error):
            return None
        own = Used(worker.all_s + mine.user + mine.system, worker.user_s + mine.user)
        withheld_s = self._withheld() if self._withheld else None
        return _Counted(now, cpu, own, system_counters.swap(), system_counters.cpu_throttles(self._cpus), withheld_s)

    def _of_gpus(self) -> dict[str, GpuInterference]:
        if self._gpus is None:
            return {}
        ours, held = set(system_counters.tree(self._pid)), _process_bytes(self._gpus)
        hidden = not any(ours & pids.keys() for pids in held.values())
        used = self._gpus.ask("nvmlDeviceGetProcessUtilization", self._begun_us)
        most = self._gpus.ask("nvmlDeviceGetMaxClockInfo", _SM_CLOCK)

        def is_foreign(pid: int) -> bool:
            return pid in self._strangers if hidden else pid not in ours

        found = {}
        for tier in self._gpus.tiers:
            works = self._at_work is None or tier in self._at_work
            sm = [glance.sm_mhz[tier] for glance in self._glances if tier in glance.sm_mhz] if works else []
            reasons = [glance.throttles.get(tier, 0) for glance in self._glances]
            found[tier] = GpuInterference(
                others_share=_gpu_share(used[tier], is_foreign) if tier in used else None,
                others_bytes=sum(size for pid, size in held[tier].items() if is_foreign(pid)) if tier in held else None,
                throttles=tuple(word for bit, word in _THROTTLES.items() if any(reason & bit for reason in reasons)),
                sm_mhz=sm[-1] if sm else None,
                sm_most_mhz=most.get(tier),
            )
        return found


def _between(before: _Counted | None, after: _Counted | None) -> dict[str, Any]:
    """Return the fields of a record that follow from the counters at both ends of a window."""
    if before is None or after is None or (wall_s := after.at_s - before.at_s) <= 0:
        return {}
    cpus, idle_s = after.cpu.cpus, after.cpu.idle_s - before.cpu.idle_s
    stolen_s = after.cpu.stolen_s - before.cpu.stolen_s
    own_s, own_user_s = after.own.all_s - before.own.all_s, after.own.user_s - before.own.user_s
    # What is neither idle nor stolen was busy: more exact than adding up user and system, which are sampled.
    seconds = {"own": own_s, "others": cpus * wall_s - idle_s - stolen_s - own_s, "idle": idle_s, "stolen": stolen_s}
    if before.cpu.user_s is not None and after.cpu.user_s is not None:
        seconds["others_user"] = after.cpu.user_s - before.cpu.user_s - own_user_s
    found: dict[str, Any] = {f"{name}_cores": round(max(each, 0.0) / wall_s, 4) for name, each in seconds.items()}
    if before.withheld_s is not None and after.withheld_s is not None:
        found["withheld_cores"] = round((after.withheld_s - before.withheld_s) / wall_s, 4)
        found["allowed_cores"] = cgroup.cores()
    if before.swap and after.swap:
        found["swapped_bytes"] = after.swap.moved_bytes - before.swap.moved_bytes
    return found | {
        "cpus": cpus,
        "swap_used_bytes": after.swap.used_bytes if after.swap else None,
        "cpu_throttles": after.throttles - before.throttles,
    }


def _process_bytes(gpus: Gpus | None) -> dict[str, dict[int, int]]:
    """Return the bytes that each process holds, by tier and process id."""
    found: dict[str, dict[int, int]] = {}
    for call in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for tier, processes in (gpus.ask(call) if gpus else {}).items():
            found.setdefault(tier, {}).update({process.pid: process.usedGpuMemory or 0 for process in processes})
    return found


def _gpu_share(samples: Iterable[Any], is_foreign: Callable[[int], bool]) -> float:
    """Return the share of a card's time that others used, from NVML's samples in per cent, perhaps several a process."""
    by_pid: dict[int, list[int]] = {}
    for sample in samples:
        if is_foreign(sample.pid):
            by_pid.setdefault(sample.pid, []).append(sample.smUtil)
    return round(sum(map(statistics.fmean, by_pid.values())) / 100, 4)


# Judging: what is said of one or several windows of a phase, empty if nothing was too much.


def _others(windows: Sequence[Interference]) -> str:
    known = [window for window in windows if window.others_cores is not None and window.cpus]
    if not known:
        return ""
    cpus = known[0].cpus or 0
    if _mean(known, "idle_cores") >= _ROOM * min(cpus, known[0].allowed_cores or cpus):
        return ""
    loads = known[0].phase == "load" and known[0].others_user_cores is not None
    return _cores(
        "others used", known, "others_user_cores" if loads else "others_cores", _LOAD_ERROR_S if loads else _ERROR_S, cpus
    )


def _stolen(windows: Sequence[Interference]) -> str:
    known = [window for window in windows if window.stolen_cores is not None and window.cpus]
    return _cores("the hypervisor took", known, "stolen_cores", _ERROR_S, known[0].cpus or 0) if known else ""


def _withheld(windows: Sequence[Interference]) -> str:
    known = [window for window in windows if window.withheld_cores is not None and window.allowed_cores]
    return _cores("the CPU quota withheld", known, "withheld_cores", _ERROR_S, known[0].allowed_cores or 0) if known else ""


def _cores(says: str, windows: Sequence[Interference], name: str, error_s: float, cpus: int) -> str:
    cores, wall_s = _mean(windows, name), sum(_seconds(window) for window in windows)
    return f"{says} {cores:.2g} of {cpus} cores" if cores * wall_s > max(_MOST_CORES * wall_s, error_s) else ""


def _mean(windows: Sequence[Interference], name: str) -> float:
    """Return the mean of a field over the time of all windows."""
    parts = [(getattr(window, name) or 0.0, _seconds(window)) for window in windows]
    whole = sum(seconds for _, seconds in parts)
    return sum(value * seconds for value, seconds in parts) / whole if whole else 0.0


def _seconds(window: Interference) -> float:
    return window.end_s - window.start_s


def _swapped(windows: Sequence[Interference]) -> str:
    size = sum(window.swapped_bytes or 0 for window in windows)
    is_much = size > _MOST_SWAPPED_PER_S * max(sum(map(_seconds, windows)), 1.0)
    return f"{format_size(size)} were swapped" if is_much else ""


def _heat(windows: Sequence[Interference]) -> str:
    return "the CPU was throttled for heat" if any(window.cpu_throttles for window in windows) else ""


def _clock(windows: Sequence[Interference]) -> str:
    """Look for a clock of the CPUs that changed from window to window."""
    known = [window.cpu_mhz for window in windows if window.cpu_mhz]
    if not known or min(known) >= (1 - _MOST_CLOCK_CHANGE) * max(known):
        return ""
    return f"the CPU's clock was between {min(known)} and {max(known)} MHz"


def _gpu_clock(windows: Sequence[Interference]) -> str:
    """Look for cards that had not come to their clock by the end of a window, though they are not set up to stay below it."""
    low: dict[str, list[GpuInterference]] = {}
    for window in windows:
        for tier, card in window.gpus.items() if window.phase == "warm" else ():  # while it loads, a card waits for its weights
            far = card.sm_mhz and card.sm_most_mhz and card.sm_mhz < _LEAST_CLOCK_SHARE * card.sm_most_mhz
            if far and not set(_SET_UP) & set(card.throttles):
                low.setdefault(tier, []).append(card)
    slowest = {tier: min(cards, key=lambda card: card.sm_mhz or 0) for tier, cards in sorted(low.items())}
    return ", ".join(f"{tier} ran at {card.sm_mhz} of {card.sm_most_mhz} MHz" for tier, card in slowest.items())


def _gpu_others(windows: Sequence[Interference]) -> str:
    said = []
    for tier in _tiers(windows):
        shares = [window.gpus[tier].others_share or 0.0 for window in windows if tier in window.gpus]
        if (share := statistics.fmean(shares)) > _MOST_GPU_SHARE:
            said.append(f"others used {format_share(share)} of {tier}")
    return ", ".join(said)


def _gpu_throttles(windows: Sequence[Interference]) -> str:
    said = []
    for tier in _tiers(windows):
        reasons = (word for window in windows if tier in window.gpus for word in window.gpus[tier].throttles)
        words = dict.fromkeys(word for word in reasons if word not in _SET_UP)
        if words:
            said.append(f"{tier} was throttled ({', '.join(words)})")
    return ", ".join(said)


def _tiers(windows: Sequence[Interference]) -> list[str]:
    return sorted({tier for window in windows for tier in window.gpus})


_CHECKS: Sequence[Callable[[Sequence[Interference]], str]] = (
    _others,
    _stolen,
    _withheld,
    _swapped,
    _heat,
    _gpu_others,
    _gpu_throttles,
    _gpu_clock,
    _clock,
)


def power_capped(windows: Sequence[Interference]) -> str:
    """Say which cards were at their power cap in how many of the warm rounds; empty if none was."""
    warm = [window for window in windows if window.phase == "warm"]
    hits = {
        tier: sum("power cap" in window.gpus[tier].throttles for window in warm if tier in window.gpus) for tier in _tiers(warm)
    }
    return ", ".join(f"{tier} was at its power cap in {hit} of {len(warm)} warm rounds" for tier, hit in hits.items() if hit)


def advice(cases: Sequence[Sequence[Interference]]) -> str | None:
    """Say of the windows of several cases that other programs took time from them, and what to do; None if from none."""
    hit = [windows for windows in cases if any(_others([window]) for window in windows)]
    if not hit:
        return None
    most = max((window for windows in hit for window in windows), key=lambda window: window.others_cores or 0.0)
    return (
        f"other programs took up to {most.others_cores:.2g} of {most.cpus} cores during {len(hit)} of "
        f"{len(cases)} case{'s' * (len(cases) > 1)}, which can slow a token tenfold: measure again on a quiet machine, "
        "or with a thread fewer, e.g. OMP_NUM_THREADS=1"
    )


def undisturbed(rounds: Sequence[T], windows: Sequence[Interference]) -> list[T]:
    """Return those of the warm rounds whose window says nothing of a disturbance."""
    warm = [window for window in windows if window.phase == "warm"]
    return [done for done, window in zip(rounds, warm, strict=False) if not window.why]


def counted(rounds: Sequence[T], windows: Sequence[Interference], asked: int) -> list[T]:
    """Return the rounds that medians rest on: the undisturbed ones where they are enough, else all of them."""
    quiet = undisturbed(rounds, windows)
    return quiet if len(quiet) >= min(_ENOUGH, asked) else list(rounds)


def noise(windows: Sequence[Interference], *, left_out: int = 0) -> dict[str, str]:
    """Say which metrics were disturbed and how; `left_out` warm rounds do not count in their medians."""
    found: dict[str, str] = {}
    for phase, keys in _FIGURES.items():
        of_phase = [window for window in windows if window.phase == phase]
        if said := _describe(of_phase):
            if phase == "warm" and left_out:
                said += f"; the median is of the other {len(of_phase) - left_out}"
            for key in keys:
                found[key] = f"{found[key]}; {said}" if key in found else said
    return found


def _describe(windows: Sequence[Interference]) -> str:
    """Say of the windows of one phase what disturbed how many of them, or all of them together."""
    said = []
    for check in _CHECKS:
        hit = [window for window in windows if check([window])]
        if hit and windows[0].phase == "warm":
            said.append(f"{check(hit)} in {len(hit)} of {len(windows)} warm rounds")
        elif windows and (text := check(hit or windows)):
            said.append(
                f"{text} during {phase_title(windows[0].phase)}" if windows[0].phase != "warm" else f"{text} over the warm rounds"
            )
    return ", ".join(said)
