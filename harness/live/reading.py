"""What is read of a process and of the machine at one moment: figures as the system gives them, nothing judged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from msgspec.structs import replace

from harness.core.records import Record
from harness.live.subject import Subject
from harness.machine import cgroup, headroom
from harness.machine.scratch import scratch_place
from harness.measure import beacon, sampler
from harness.measure.beacon import Announced, Beat
from harness.measure.sampler import Gpus, Memory

_RECEIVED = 1  # NVML_PCIE_UTIL_RX_BYTES (nvml.h)


class GpuReading(Record, frozen=True, kw_only=True):
    """A card, in bytes; `process_bytes` is None where NVML does not list the process, `link_bytes_per_s` where it does not tell."""

    total_bytes: int
    used_bytes: int
    process_bytes: int | None = None
    link_bytes_per_s: float | None = None


class RamReading(Record, frozen=True, kw_only=True):
    """The RAM of the machine, or of the container where that has less: what can be had, and pages of files that can be dropped."""

    total_bytes: int
    available_bytes: int
    cached_bytes: int = 0
    floor_bytes: int = 0  #: what a run leaves to the machine


class DiskReading(Record, frozen=True, kw_only=True):
    """The file system that temporary files go to, which is where weights are offloaded to."""

    total_bytes: int
    free_bytes: int


class Reading(Record, frozen=True, kw_only=True):
    """One moment, `at_s` of the monotonic clock. What there is not, or may not be read, is None.

    `is_case`: the process is a worker of ours. `read_bytes` is what it has had fetched from the disk; `gone` are cards that
    answered before and do not now.
    """

    at_s: float
    clock: str
    ram: RamReading
    disk: DiskReading | None = None
    gpus: dict[str, GpuReading] = {}
    gone: tuple[str, ...] = ()
    pid: int | None = None
    program: str = ""
    is_case: bool = False
    others: int = 0
    memory: Memory | None = None
    read_bytes: int | None = None
    beat: Beat | None = None


class Sensors:
    """The figures of this machine, read again and again; NVML stays open meanwhile."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._left_in_container, self._floor_bytes = cgroup.watch(), headroom.floor_bytes()
        self._allowed = cgroup.memory()[0]
        self._place = scratch_place()
        self._seen: dict[str, GpuReading] = {}
        self._program: tuple[int, str] = (0, "")
        self._announced: tuple[Path | None, float, Announced | None] = (None, 0.0, None)

    def read(self, subject: Subject | None) -> Reading:
        """Read the machine and, where there is one, the process and what it tells; one that has just ended has no memory."""
        cards = self._cards(subject)
        self._seen |= cards
        now = Reading(
            at_s=time.monotonic(),
            clock=datetime.now().astimezone().isoformat(timespec="seconds"),
            ram=self._ram(),
            disk=self._disk(),
            gpus=cards,
            gone=tuple(name for name in self._seen if name not in cards),
        )
        if subject is None:
            return now
        if self._program[0] != subject.pid:
            self._program = (subject.pid, _program(subject.pid))
        return _with_process(now, subject, self._program[1])

    def announced(self, subject: Subject | None) -> Announced | None:
        """Return what a case of ours says that it is; read again when it says more."""
        folder = subject.folder if subject else None
        if folder is None:
            return None
        try:
            changed_s = (folder / beacon.ANNOUNCED).stat().st_mtime
        except OSError:  # it has not said anything yet, or has just ended
            return None
        if self._announced[:2] != (folder, changed_s):
            self._announced = (folder, changed_s, beacon.announced(folder))
        return self._announced[2]

    def _cards(self, subject: Subject | None) -> dict[str, GpuReading]:
        held = self._gpus.process_bytes(*subject.pids) if subject else {}
        links = self._gpus.ask("nvmlDeviceGetPcieThroughput", _RECEIVED)
        return {
            name: GpuReading(
                total_bytes=int(memory.total),
                used_bytes=int(memory.used),
                process_bytes=held.get(name),
                link_bytes_per_s=links[name] * 1024.0 if name in links else None,
            )
            for name, memory in self._gpus.ask("nvmlDeviceGetMemoryInfo").items()
        }

    def _ram(self) -> RamReading:
        found, left = psutil.virtual_memory(), self._left_in_container()
        return RamReading(
            total_bytes=min(found.total, self._allowed or found.total),
            available_bytes=found.available if left is None else min(found.available, left),
            cached_bytes=getattr(found, "cached", 0) + getattr(found, "buffers", 0),
            floor_bytes=self._floor_bytes,
        )

    def _disk(self) -> DiskReading | None:
        with suppress(OSError):
            found = psutil.disk_usage(str(self._place))
            return DiskReading(total_bytes=found.total, free_bytes=found.free)
        return None


@contextmanager
def sensors() -> Iterator[Sensors]:
    """Yield this machine to be read, and give NVML back afterward."""
    gpus = Gpus()
    try:
        yield Sensors(gpus)
    finally:
        gpus.close()


def _with_process(now: Reading, subject: Subject, program: str) -> Reading:
    parts = []
    for pid in subject.pids:
        with suppress(OSError):  # it has just ended, or the system hides what is another user's
            parts.append(sampler.memory(pid))
    read = [size for pid in subject.pids if (size := sampler.disk_read_bytes(pid)) is not None]
    return replace(
        now,
        pid=subject.pid,
        program=program,
        is_case=subject.folder is not None,
        others=subject.others,
        memory=sampler.together(parts) if parts else None,
        read_bytes=sum(read) if read else None,
        beat=beacon.last_beat(subject.folder) if subject.folder else None,
    )


def _program(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
