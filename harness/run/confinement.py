"""A worker within the limits of its case: its control group, the guard, the processes that share its model, and its samples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from msgspec.structs import replace

from harness.core.records import Case, Interference, Outcome
from harness.core.units import MIB, format_size
from harness.machine import cgroup, headroom
from harness.measure import beacon
from harness.measure.beacon import Announced
from harness.measure.interference import InterferenceWatch
from harness.measure.limits import OVER_AT_START, Breach, LimitGuard, Limits
from harness.measure.outcome import Evidence
from harness.measure.protocol import Confine, Confined, Event, Failed, Request, Share, Shared
from harness.measure.sampler import Sample, Sampler, oom_kills
from harness.planning import calibration
from harness.run.case_result import CaseEnded, RunContext
from harness.run.deadline import Deadline
from harness.run.worker_process import Ended, Worker

_OTHERS_S = 20.0
_UNCOUNTED_BYTES = 8 * MIB
_VRAM_BACK_S, _VRAM_ROUNDING_BYTES = 10.0, 64 * MIB

Ask = Callable[[Request], Event]


class ConfinedWorker:
    """The worker of a case, started; `start_sampling` begins to watch it, `share` and `confine` come before it loads."""

    def __init__(self, case: Case, context: RunContext, begun_s: float) -> None:
        """Start the worker, in a control group if RAM is limited and a group can be made; nothing is left if that fails."""
        self._case, self._gpus = case, context.gpus
        self._context_bytes = calibration.gpu_context(context.machine).best
        self.deadline = Deadline(case_s=context.timeout_s, phase_s=context.phase_timeout_s)
        self.vram_by_torch = False
        self._uncounted_bytes = 0  #: of the worker's RAM, what its control group is not charged for
        self._free_before = context.gpus.free_bytes() if context.gpus else {}
        self._oom_kills = oom_kills()
        self._directory = TemporaryDirectory(prefix=beacon.CASE, dir=context.scratch, ignore_cleanup_errors=True)
        scratch = Path(self._directory.name)
        with contextlib.ExitStack() as undo:
            undo.callback(self._directory.cleanup)
            group = cgroup.group(case.ram_bytes) if case.ram_bytes is not None else None
            if group is not None:
                undo.callback(group.remove)
            self._worker = Worker(context.worker_main, log=scratch / beacon.LOG, scratch=scratch, start_s=context.phase_timeout_s)
            undo.callback(self._worker.kill)
            self._pids: Sequence[int] = (self._worker.pid,)
            if group is not None and not group.add(self._worker.pid):
                group.remove()
                group = None
            self._group = group
            self._guard = LimitGuard(self._limits(), self._worker.end)
            self._watch = InterferenceWatch(self._worker.pid, gpus=context.gpus, origin_s=begun_s)
            self._on_sample: Callable[[Sample], None] | None = None
            self.sampler = Sampler(self._worker.pid, gpus=context.gpus, on_sample=(self._guard, self._see))
            undo.pop_all()

    def _limits(self) -> Limits:
        """What the guard watches: RAM only if no group limits the worker."""
        anon = self._case.ram_bytes if self._group is None else None
        return Limits(anon_bytes=anon, vram_bytes=self._case.vram_bytes, floor_bytes=headroom.floor_bytes())

    def start_sampling(self, on_sample: Callable[[Sample], None] | None) -> None:
        """Begin to sample; `on_sample` is called with every sample, from a thread of its own. The worker ends if that fails."""
        self._on_sample = on_sample
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            undo.callback(self._worker.kill)
            self.sampler.start()
            undo.pop_all()

    def _see(self, sample: Sample) -> None:
        self._watch.glance()
        with contextlib.suppress(OSError):  # code of the model may have removed the log
            self._worker.trim_log()
        if self._on_sample:
            self._on_sample(sample)

    @property
    def pid(self) -> int:
        """The id of the worker's process; with several, of the one that leads them."""
        return self._worker.pid

    @property
    def phase(self) -> str:
        """The phase that the worker is in."""
        return self._worker.phase

    def announce(self, what: Announced) -> None:
        """Leave beside the worker's files what it does, for who watches it."""
        beacon.announce(Path(self._directory.name), replace(what, uncounted_bytes=self._uncounted_bytes))

    def ask(self, request: Request) -> Event:
        """Send a request and wait for its answer. Raises what `Worker.ask` raises."""
        self._watch.begin()
        return self._worker.ask(request, self.deadline)

    def interference(self) -> Interference:
        """Return what others did since the last request was sent."""
        return self._watch.end(self._worker.phase)

    def wait(self) -> NoReturn:
        """Wait until the worker ends. Raises Ended."""
        self._worker.wait()

    def share(self, ask: Ask, ranks: int) -> None:
        """Have the worker start the processes that share its model, and measure all of them. Raises CaseEnded."""
        done = ask(Share(ranks=ranks))
        assert isinstance(done, Shared)
        self._pids = done.pids
        self.sampler.follow(done.pids)

    def confine(self, ask: Ask, files: Path, gpus: tuple[int, ...], *, expandable: bool = False) -> None:
        """Have the worker obey the limits of its case, if it has any; `files` are the model's, `gpus` the numbers of those it uses.

        `expandable`: have torch's allocator use expandable segments, as the case's code does by itself, but too late here.

        Raises:
            CaseEnded: it needs more even before it loads, or others keep the model's files in memory, which could not be counted.
        """
        case, group = self._case, self._group
        self._watch.expect({f"gpu:{number}" for number in gpus})
        self._worker.uses_gpu = bool(gpus)
        if group is None and case.vram_bytes is None and not expandable:
            return
        if group is not None:
            _forget_files(files)
        listed_before = self._is_listed()
        context = int(self._context_bytes)
        limits = Confine(ram=group is not None, vram_bytes=case.vram_bytes, gpus=gpus, context_bytes=context)
        done = ask(replace(limits, expandable_segments=expandable))
        assert isinstance(done, Confined)
        if case.vram_bytes is not None and gpus and (listed_before or not self._is_listed()):
            self.vram_by_torch = True
            self.sampler.ignore_gpus()
        self._uncounted_bytes = done.file_bytes if group is not None else 0
        charged_elsewhere = done.file_bytes + done.shared_bytes
        if group is not None and case.ram_bytes is not None and not group.limit(case.ram_bytes - charged_elsewhere):
            used = done.anon_bytes + done.file_bytes
            self._guard.trip(Breach(rule=OVER_AT_START, limit_bytes=case.ram_bytes, value_bytes=used, held_bytes=done.anon_bytes))

    def _is_listed(self) -> bool:
        """Say whether NVML lists an id of the worker's. In a container it lists those of the host, perhaps the same of another."""
        return bool(self._gpus and self._gpus.process_bytes(*self._pids))

    def energy_j(self, gpus: Sequence[int]) -> float | None:
        """Return the joules that these GPUs have taken so far, None if they do not count them."""
        return self._gpus.energy_j([f"gpu:{number}" for number in gpus]) if self._gpus else None

    def evidence(self, cause: Failed | Ended) -> Evidence:
        """Collect what is known of the end of the case: the worker's own report, or how its process ended."""
        failed, ended = (cause, None) if isinstance(cause, Failed) else (None, cause)
        ended_by = ended.ended_by if ended else None
        return Evidence(
            phase=failed.phase if failed else self._worker.phase,
            failed=failed,
            exit_code=ended.exit_code if ended else None,
            ended_by=ended_by,
            oom_kills=oom_kills() - self._oom_kills,
            breach=self._guard.breach,
            group_kills=self._group.oom_kills if self._group else 0,
            ram_bytes=self._case.ram_bytes,
            limit_s=self.deadline.limit_s(ended_by),
            log_tail=self._worker.log_tail(),
            rank=cause.rank,
        )

    def stop(self) -> str:
        """End the worker, remove its files and its group, and return the last of what it printed."""
        try:
            self.sampler.stop()
            self._worker.stop()
            self._await_vram()
            return self._worker.log_tail()
        finally:
            self._release()

    def _await_vram(self) -> None:
        """Wait until the cards have as much free as when the case began: the driver takes it back after a process has ended."""
        until_s = time.monotonic() + _VRAM_BACK_S
        while self._worker.uses_gpu and self._gpus and not _is_back(self._free_before, self._gpus.free_bytes()):
            if time.monotonic() > until_s:  # somebody else has it by now; the next case's plan stands, and its figures tell
                return
            time.sleep(0.1)

    def _release(self) -> None:
        if self._group is not None:
            self._group.remove()
        self._directory.cleanup()


def _is_back(before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Say whether every card has as much free as before, or nearly; one that does not tell has."""
    return all(now.get(tier, size) >= size - _VRAM_ROUNDING_BYTES for tier, size in before.items())


def _forget_files(files: Path) -> None:
    """Have the model's files read anew, so that their pages count; others may keep them a little longer.

    Raises:
        CaseEnded: another process keeps them in memory.
    """
    until_s = time.monotonic() + _OTHERS_S
    while (kept_bytes := cgroup.forget_files(files)) > _UNCOUNTED_BYTES:
        if time.monotonic() > until_s:
            size = format_size(kept_bytes)
            why = f"another process keeps {size} of the model's files in memory, which --ram could not count: end it first"
            raise CaseEnded(Outcome.SKIPPED, why)
        time.sleep(0.2)
