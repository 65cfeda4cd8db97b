"""RAM, VRAM and energy of a process: exact peaks that the kernel keeps, and a timeline sampled from outside.

On Linux the kernel keeps the peak of resident memory (VmHWM) and lets a process reset it, so a phase's peak is exact.
Elsewhere the peak is the highest sample, and is marked as sampled.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from harness.core.records import Record, Timeline
from harness.machine import nvml
from harness.measure.system_counters import LINUX

_PAGE = mmap.PAGESIZE
_RESET_PEAK = "5"  # proc(5): writing 5 to clear_refs sets the peak of resident memory to its current value


# Lines of smaps, and how they count: pages of a file that were written to are anonymous (libraries' own data).
_SHARED = {"Shared_Clean": 1, "Shared_Dirty": 1, "Anonymous": -1}


class Memory(Record, frozen=True, kw_only=True):
    """Resident memory of a process in bytes; `anon_bytes` is the part the kernel cannot drop."""

    ram_bytes: int
    anon_bytes: int


def memory(pid: int) -> Memory:
    """Read the resident memory of `pid`.

    Elsewhere than on Linux `anon_bytes` is psutil's unique set size, or the whole if the system refuses that.

    Raises:
        ProcessLookupError: no such process.
    """
    if LINUX:
        return _statm(f"/proc/{pid}/statm")
    try:
        process = psutil.Process(pid)
        ram = process.memory_info().rss
        return Memory(ram_bytes=ram, anon_bytes=_unique(process, ram))
    except psutil.NoSuchProcess:
        raise ProcessLookupError(pid) from None


def _unique(process: psutil.Process, otherwise: int) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.AccessDenied:
        return otherwise


def _statm(path: str) -> Memory:
    """Read /proc/PID/statm: resident and shared pages; what is not shared with a file is anonymous (proc(5))."""
    try:
        fields = Path(path).read_bytes().split()
    except FileNotFoundError:
        raise ProcessLookupError(path) from None
    if len(fields) < 3 or fields[0] == b"0":  # a process that has ended and waits to be reaped has no memory
        raise ProcessLookupError(path)
    resident, shared = int(fields[1]), int(fields[2])
    return Memory(ram_bytes=resident * _PAGE, anon_bytes=max(resident - shared, 0) * _PAGE)


def together(parts: Iterable[Memory]) -> Memory:
    """Add up several processes: anonymous memory is each one's own, pages of files count as often as the one that has most of them.

    That is exact for libraries, which all of them map, and too little where each maps another part of a file (`doubled_bytes`).
    """
    listed = list(parts)
    anon = sum(part.anon_bytes for part in listed)
    return Memory(ram_bytes=anon + max(part.ram_bytes - part.anon_bytes for part in listed), anon_bytes=anon)


def doubled_bytes(pids: Iterable[int]) -> int:
    """Return by how much the resident memory of several processes adds up to too much: pages of files that several of them map.

    Of such pages those of the process that has most are kept. proc(5), smaps: "shared" are pages that more than one process maps.
    0 if the system does not report it.
    """
    shared = [_shared_file_bytes(pid) for pid in pids]
    return sum(shared) - max(shared, default=0)


def _shared_file_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    total, of_file, counted = 0, False, 0
    for line in lines:
        name, _, value = line.partition(":")
        if " " in name:  # the first line of a mapping: addresses, rights, offset, device, inode, path
            total, counted = total + max(counted, 0), 0
            of_file = "/" in line
        elif of_file and name in _SHARED:
            counted += _SHARED[name] * int(value.split()[0]) * 1024
    return total + max(counted, 0)


def reset_peak() -> bool:
    """Set this process's peak of resident memory to its current value; return whether the system can."""
    if not LINUX:
        return False
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:  # some containers mount /proc read-only
        return False
    return True


def peak_bytes() -> int:
    """Return this process's peak of resident memory since the last reset, in bytes (Linux: VmHWM)."""
    with Path("/proc/self/status").open() as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise ProcessLookupError("no VmHWM in /proc/self/status")


def disk_read_bytes(pid: int | None = None) -> int | None:
    """Return how many bytes a process, or this one, has had fetched from the disk, page faults included (proc(5), io).

    None if the system does not tell.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/io").read_text().splitlines()
    except OSError:  # another system, a container that hides it, another user's, or it has ended
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


class Gpus:
    """NVML's view of the cards that CUDA sees: memory of one process, and energy. Without NVML every figure is absent."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._library = self._open.enter_context(nvml.lent())
        self._cards = nvml.visible_gpus(self._library)

    def close(self) -> None:
        """Give the library back."""
        self._open.close()

    @property
    def tiers(self) -> list[str]:
        """The names of the cards."""
        return [f"gpu:{index}" for index in range(len(self._cards))]

    def ask(self, call: str, *args: object) -> dict[str, Any]:
        """Return what the cards answer to NVML's `call`, by tier; a card that reports nothing is absent."""
        answers = {tier: nvml.ask(self._library, call, card, *args) for tier, card in zip(self.tiers, self._cards, strict=True)}
        return {tier: answer for tier, answer in answers.items() if answer is not None}

    def process_bytes(self, *pids: int) -> dict[str, int]:
        """Return bytes of device memory that these processes hold, by tier; a card that reports nothing is absent."""
        found: dict[str, int] = {}
        for tier, processes in self.ask("nvmlDeviceGetComputeRunningProcesses").items():
            used = [p.usedGpuMemory for p in processes if p.pid in pids and p.usedGpuMemory is not None]
            if used:
                found[tier] = sum(used)
        return found

    def free_bytes(self) -> dict[str, int]:
        """Return what is free on each card, whoever holds the rest; a card that does not tell is absent."""
        return {tier: int(memory.free) for tier, memory in self.ask("nvmlDeviceGetMemoryInfo").items()}

    def used_bytes(self) -> dict[str, int]:
        """Return what is in use on each card, whoever holds it; a card that does not tell is absent."""
        return {tier: int(memory.used) for tier, memory in self.ask("nvmlDeviceGetMemoryInfo").items()}

    def energy_j(self, tiers: Collection[str]) -> float | None:
        """Return the joules that these cards have used since the driver was loaded; None for none, or if one has no counter."""
        used = self.ask("nvmlDeviceGetTotalEnergyConsumption")
        return float(sum(used[tier] for tier in tiers)) / 1000 if tiers and used.keys() >= {*tiers} else None


class Sample(Record, frozen=True, kw_only=True):
    """What the sampler saw at one moment of the monotonic clock, or the maxima of the `span_s` that began there.

    `vram_bytes` is what NVML says of the process; `grown_bytes`, where it says nothing, is by how much more of each card was in use
    than when the sampler was made, whoever holds it.
    """

    at_s: float
    span_s: float = 0.0
    ram_bytes: int
    anon_bytes: int
    vram_bytes: dict[str, int]
    grown_bytes: dict[str, int] = {}


class Sampler:
    """Sample a process, or several as one, from a thread of the parent, and keep a bounded timeline.

    Every `interval_s` costs one short read of /proc. When `most` (an even number) samples are kept, each two neighbors become
    one that holds their maxima, and the interval of the timeline doubles; the peaks stay those of all samples.
    """

    def __init__(
        self,
        pid: int,
        *,
        gpus: Gpus | None = None,
        interval_s: float = 0.05,
        most: int = 600,
        on_sample: Sequence[Callable[[Sample], None]] = (),
    ) -> None:
        self._pids: Sequence[int] = (pid,)
        self._gpus, self._interval_s, self._most = gpus, interval_s, most
        self._used_before = gpus.used_bytes() if gpus else {}
        self._on_sample = on_sample
        self._samples: list[Sample] = []
        self._stride, self._taken = 1, 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sampler of {pid}", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self) -> None:
        """End sampling; safe to call twice."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def follow(self, pids: Sequence[int]) -> None:
        """Sample these processes from now on."""
        self._pids = pids

    def ignore_gpus(self) -> None:
        """Sample RAM alone from now on: what NVML lists under the id of this process is another's, or nothing."""
        self._gpus = None

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                sample = self._read()
            except ProcessLookupError:
                return
            self._keep(sample)
            for call in self._on_sample:
                call(sample)

    def _read(self) -> Sample:
        now, pids = time.monotonic(), self._pids
        used = together(memory(pid) for pid in pids)
        gpus = self._gpus
        vram = gpus.process_bytes(*pids) if gpus else {}
        in_use = gpus.used_bytes() if gpus and not vram else {}
        grown = {tier: max(size - self._used_before.get(tier, size), 0) for tier, size in in_use.items()}
        return Sample(at_s=now, ram_bytes=used.ram_bytes, anon_bytes=used.anon_bytes, vram_bytes=vram, grown_bytes=grown)

    def _keep(self, sample: Sample) -> None:
        with self._lock:
            begins = self._taken % self._stride == 0
            if begins and len(self._samples) == self._most:
                pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
                self._samples = [_maxima(first, second) for first, second in pairs]
                self._stride *= 2
            if begins:
                self._samples.append(sample)
            else:
                self._samples[-1] = _maxima(self._samples[-1], sample)
            self._taken += 1

    def peak(self, start_s: float, end_s: float) -> Sample | None:
        """Return the maxima of the samples between two moments, or None if there is none.

        Once a long timeline is thinned, a sample that only reaches into that time counts as well: a peak of a neighbor may be
        counted twice, but none is missed.
        """
        with self._lock:
            inside = [sample for sample in self._samples if sample.at_s <= end_s and start_s <= sample.at_s + sample.span_s]
        top: Sample | None = None
        for sample in inside:
            top = sample if top is None else _maxima(top, sample)
        return top

    def timeline(self, origin_s: float) -> Timeline:
        """Return the samples as columns, with times relative to `origin_s`."""
        with self._lock:
            samples = list(self._samples)
        tiers = sorted({tier for sample in samples for tier in sample.vram_bytes})
        return Timeline(
            t_s=[round(sample.at_s - origin_s, 3) for sample in samples],
            ram_bytes=[sample.ram_bytes for sample in samples],
            ram_anon_bytes=[sample.anon_bytes for sample in samples],
            vram_bytes={tier: [sample.vram_bytes.get(tier, 0) for sample in samples] for tier in tiers},
        )


def _maxima(first: Sample, second: Sample) -> Sample:
    return Sample(
        at_s=first.at_s,
        span_s=second.at_s + second.span_s - first.at_s,
        ram_bytes=max(first.ram_bytes, second.ram_bytes),
        anon_bytes=max(first.anon_bytes, second.anon_bytes),
        vram_bytes=_highest(first.vram_bytes, second.vram_bytes),
        grown_bytes=_highest(first.grown_bytes, second.grown_bytes),
    )


def _highest(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {tier: max(first.get(tier, 0), second.get(tier, 0)) for tier in first.keys() | second.keys()}


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot (0 if it does not say)."""
    try:
        text = Path("/proc/vmstat").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)
