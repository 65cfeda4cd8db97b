"""Run one case in a worker of its own, watch it, and turn what happened into a result."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import msgspec

from harness.core import redact
from harness.core.errors import WorkerError
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Precision
from harness.core.records import Interference, Machine, Outcome, Phase, Plan, Quality, Result, Verdict
from harness.core.units import MIB, format_size
from harness.machine import cgroup, headroom, probe
from harness.measure import aggregate, interference, quality, verify
from harness.measure import limits as guard
from harness.measure.interference import InterferenceWatch
from harness.measure.limits import Breach, LimitGuard, Limits
from harness.measure.outcome import Evidence, classify
from harness.measure.protocol import (
    Chat,
    Chatting,
    Confine,
    Confined,
    Event,
    Failed,
    Generate,
    GenerateDone,
    Load,
    LoadDone,
    Request,
    Score,
    ScoreDone,
    Share,
    Shared,
)
from harness.measure.sampler import Gpus, Sample, Sampler, oom_kills
from harness.planning import calibration
from harness.planning.code import gpus, loading_program
from harness.run.deadline import Deadline
from harness.run.worker_process import Ended, Worker, WorkerMain

_OTHERS_S = 20.0
_UNCOUNTED_BYTES = 8 * MIB

_SPARE_ROUNDS = 4  # an extra round begins while there is time for so many: it must not end the case

LiveLine = Callable[["Run", Sample], None]


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What all cases of a run share. `worker_main` is the worker's program; tests put a scripted one in its place."""

    run: str
    machine: Machine
    environment: Mapping[str, str]
    scratch: Path
    worker_main: WorkerMain
    timeout_s: float
    phase_timeout_s: float = math.inf
    gpus: Gpus | None = None
    on_sample: LiveLine | None = None

    @property
    def allowed_s(self) -> dict[str, float]:
        """The limits of time by the name of their option; what has none is left out."""
        limits = {"case-timeout": self.timeout_s, "phase-timeout": self.phase_timeout_s}
        return {name: seconds for name, seconds in limits.items() if math.isfinite(seconds)}


@dataclasses.dataclass(frozen=True)
class CaseModel:
    """The model of a case: where its files are, whether its weights are real, and what its predictions are compared with.

    `native` says that `harness.models` has its architecture.
    """

    location: Path
    weights: str = "real"
    tokenizer: bool = True
    fingerprint: str = ""
    gguf_file: str | None = None
    native: bool = False
    code_head: str = ""
    command: str = ""
    reference: quality.Reference | None = None
    reference_file: Path | None = None
    keep_file: Path | None = None


class CaseEnded(Exception):
    """The case came to an end before it could be measured; its result says how."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome, self.why = outcome, why


class Run:
    """One case: load, generate, score, in this order and as far as asked; `finish` gives the result."""

    def __init__(self, plan: Plan, subject: CaseModel, setting: RunContext) -> None:
        if plan.code is None:
            raise ValueError(f"{plan.case.id} has no loading code")
        self.plan, self.subject, self.setting = plan, subject, setting
        self.loaded: LoadDone | None = None
        self.cold: GenerateDone | None = None
        self.warm: list[GenerateDone] = []
        self.scored: ScoreDone | None = None
        self.checks: dict[str, str] = {}
        self.failed: list[str] = []
        self.ended: CaseEnded | None = None
        self._phases: list[Phase] = []
        self._windows: list[Interference] = []
        self._begun_s = time.monotonic()
        self._patience = Deadline(case_s=setting.timeout_s, phase_s=setting.phase_timeout_s)
        self._at = datetime.now(timezone.utc)
        self._oom_kills, self._log, self._traceback = oom_kills(), "", ""
        self._torch_alone = False
        self._directory = TemporaryDirectory(prefix="case-", dir=setting.scratch, ignore_cleanup_errors=True)
        scratch = Path(self._directory.name)
        with contextlib.ExitStack() as undo:
            undo.callback(self._directory.cleanup)
            group = cgroup.group(plan.case.ram_bytes) if plan.case.ram_bytes is not None else None
            if group is not None:
                undo.callback(group.remove)
            self._worker = Worker(setting.worker_main, log=scratch / "log", scratch=scratch, start_s=setting.phase_timeout_s)
            undo.callback(self._worker.kill)
            self._pids: Sequence[int] = (self._worker.pid,)
            if group is not None and not group.add(self._worker.pid):
                group.remove()
                group = None
            self._group = group
            self._guard = LimitGuard(self._limits(), self._worker.end)
            self._others = InterferenceWatch(self._worker.pid, gpus=setting.gpus, origin_s=self._begun_s)
            self._sampler = Sampler(self._worker.pid, gpus=setting.gpus, on_sample=(self._guard, self._watch))
            self._sampler.start()
            undo.pop_all()

    def _limits(self) -> Limits:
        """What the guard watches: the RAM only where no group holds the worker to it."""
        case = self.plan.case
        anon = case.ram_bytes if self._group is None else None
        return Limits(anon_bytes=anon, vram_bytes=case.vram_bytes, floor_bytes=headroom.floor_bytes())

    def _watch(self, sample: Sample) -> None:
        self._others.glance()
        with contextlib.suppress(OSError):  # code of the model may have removed the log
            self._worker.trim_log()
        if self.setting.on_sample:
            self.setting.on_sample(self, sample)

    @property
    def phase(self) -> str:
        """The phase that the worker is in."""
        return self._worker.phase

    @property
    def seconds(self) -> float:
        """Seconds since the case began."""
        return time.monotonic() - self._begun_s

    def load(self) -> LoadDone:
        """Load the model, once; later calls return what the first one found. Raises CaseEnded."""
        if self.loaded is None:
            plan = self.plan
            self._share()
            self._confine()
            request = Load(
                model=str(self.subject.location),
                code=plan.code or "",
                imports=_imports(PRECISIONS[plan.case.precision], self.subject.native),
                tokenizer=self.subject.tokenizer,
                trust_remote_code=plan.trusted,
                gguf_file=self.subject.gguf_file,
            )
            done = self._ask(request)
            assert isinstance(done, LoadDone)
            self.loaded, self.checks = done, verify.checks(plan, done.loaded)
        return self.loaded

    def _share(self) -> None:
        """Have the worker be several processes where its case takes several, and measure those. Raises CaseEnded."""
        ranks = PLACEMENTS[self.plan.case.placement].ranks(len(self.setting.machine.gpus))
        if ranks > 1:
            done = self._ask(Share(ranks=ranks))
            assert isinstance(done, Shared)
            self._pids = done.pids
            self._sampler.follow(done.pids)

    def _confine(self) -> None:
        """Have the worker live within the limits of its case. Raises CaseEnded: it needs more even before it loads."""
        case, group, used = self.plan.case, self._group, gpus(self.plan)
        if group is None and case.vram_bytes is None:
            return
        if group is not None:
            self._forget_files()
        listed_before = self._is_listed()
        context = int(calibration.default()["gpu_context_bytes"].best)
        done = self._ask(Confine(ram=group is not None, vram_bytes=case.vram_bytes, gpus=used, context_bytes=context))
        assert isinstance(done, Confined)
        if case.vram_bytes is not None and used and (listed_before or not self._is_listed()):
            self._torch_alone = True
            self._sampler.ignore_gpus()
        charged_elsewhere = done.file_bytes + done.shared_bytes
        if group is not None and case.ram_bytes is not None and not group.limit(case.ram_bytes - charged_elsewhere):
            held = done.anon_bytes + done.file_bytes
            self._guard.trip(
                Breach(rule=guard.OVER_AT_START, limit_bytes=case.ram_bytes, value_bytes=held, held_bytes=done.anon_bytes)
            )

    def _is_listed(self) -> bool:
        """Say whether NVML lists an id of the worker's. In a container it lists those of the host, perhaps the same of another."""
        return bool(self.setting.gpus and self.setting.gpus.process_bytes(*self._pids))

    def _forget_files(self) -> None:
        """Have the model's files read anew, so that their pages count; others may hold them a little longer. Raises CaseEnded."""
        until_s = time.monotonic() + _OTHERS_S
        while (held := cgroup.forget_files(self.subject.location)) > _UNCOUNTED_BYTES:
            if time.monotonic() > until_s:
                why = f"another process holds {format_size(held)} of the model's files, which --ram could not count: end it first"
                self.ended = CaseEnded(Outcome.SKIPPED, why)
                raise self.ended
            time.sleep(0.2)

    def first_round(self) -> GenerateDone:
        """Generate once, cold; later calls return what the first one found. Raises CaseEnded."""
        self.load()
        if self.cold is None:
            self.cold = self._generate("cold")
        return self.cold

    def round(self) -> GenerateDone:
        """Generate once more, warm. Raises CaseEnded."""
        self.first_round()
        done = self._generate("warm")
        self.warm.append(done)
        return done

    def extra_rounds(self) -> Iterator[float]:
        """Generate on while too few of the warm rounds were undisturbed or their spread is wide; yield the seconds of each round.

        There are at most three times as many rounds as were asked for, and the extra ones take as long as those at most. Raises
        CaseEnded.
        """
        while self._is_unsettled():
            begun_s = time.perf_counter()
            self.round()
            yield time.perf_counter() - begun_s

    def _is_unsettled(self) -> bool:
        load, took = self.plan.case.workload, [done.total_s for done in self.warm]
        asked = load.repeats
        if not asked <= len(took) < load.most_rounds or sum(took[asked:]) + max(took) > sum(took[:asked]):
            return False
        if _SPARE_ROUNDS * max(took) > self._patience.case_left_s:
            return False
        quiet = interference.undisturbed(self.warm, self._windows)
        return len(quiet) < asked or bool(aggregate.noise(aggregate.samples(quiet)))

    def _generate(self, phase: str) -> GenerateDone:
        load = self.plan.case.workload
        energy = self._energy_j()
        done = self._ask(Generate(prompt_tokens=load.prompt_tokens, new_tokens=load.new_tokens, batch=load.batch, phase=phase))
        assert isinstance(done, GenerateDone)
        if not done.token_s:
            raise self._end(ended_by="protocol", note=f"it timed none of {load.new_tokens} tokens")
        if energy is not None and (now := self._energy_j()) is not None:
            done = msgspec.structs.replace(done, energy_j=now - energy)
        return done

    def _energy_j(self) -> float | None:
        return self.setting.gpus.energy_j([f"gpu:{number}" for number in gpus(self.plan)]) if self.setting.gpus else None

    def score(self) -> ScoreDone:
        """Run the quality probe, once. Raises CaseEnded."""
        self.load()
        if self.scored is None:
            keep, reference = self.subject.keep_file, self.subject.reference_file
            request = Score(
                model=self.plan.case.model, keep=str(keep) if keep else None, reference=str(reference) if reference else None
            )
            done = self._ask(request)
            assert isinstance(done, ScoreDone)
            self.scored = done
        return self.scored

    def chat(self, host: str, port: int) -> Chatting:
        """Serve a page to talk to the model, within the workload that was planned for. Raises CaseEnded."""
        self.load()
        load = self.plan.case.workload
        done = self._ask(
            Chat(model=self.plan.case.model, host=host, port=port, prompt_tokens=load.prompt_tokens, new_tokens=load.new_tokens)
        )
        assert isinstance(done, Chatting)
        return done

    def wait(self) -> NoReturn:
        """Wait until the worker ends by itself or is ended for the memory's sake. Raises CaseEnded."""
        try:
            self._worker.wait()
        except Ended as end:
            raise self._end(ended_by=end.ended_by, exit_code=end.exit_code) from None

    def quality(self) -> Quality | None:
        """Judge what the probe found, if it ran."""
        if self.scored is None:
            return None
        subject = self.subject
        return quality.judge(
            self.scored,
            real_weights=subject.weights == "real",
            reference=subject.reference,
            is_reference=subject.keep_file is not None,
        )

    def _ask(self, request: Request) -> Event:
        if self.ended is not None:
            raise self.ended
        self._others.begin()
        try:
            event = self._worker.ask(request, self._patience)
        except Ended as end:
            raise self._end(ended_by=end.ended_by, exit_code=end.exit_code, rank=end.rank, note=end.note) from None
        except WorkerError as error:
            raise self._end(ended_by="protocol", note=str(error)) from None
        if isinstance(event, Failed):
            self._phases += event.phases
            raise self._end(failed=event)
        if isinstance(event, (Confined, Shared, Chatting)):
            return event
        assert isinstance(event, (LoadDone, GenerateDone, ScoreDone))
        self._windows.append(self._others.end(self._worker.phase))
        self._phases += event.phases
        return event

    def _end(
        self,
        *,
        failed: Failed | None = None,
        ended_by: str | None = None,
        exit_code: int | None = None,
        rank: int | None = None,
        note: str | None = None,
    ) -> CaseEnded:
        evidence = Evidence(
            phase=failed.phase if failed else self._worker.phase,
            failed=failed,
            exit_code=exit_code,
            ended_by=ended_by,
            oom_kills=oom_kills() - self._oom_kills,
            breach=self._guard.breach,
            group_kills=self._group.oom_kills if self._group else 0,
            ram_bytes=self.plan.case.ram_bytes,
            limit_s=self._patience.limit_s(ended_by),
            log_tail=self._worker.log_tail(),
            rank=failed.rank if failed else rank,
        )
        outcome, why = classify(evidence)
        self.ended = CaseEnded(outcome, f"{why}: {note}" if note else why)
        self._traceback = failed.traceback if failed else ""
        return self.ended

    def result(self) -> Result:
        """Return what the case has shown so far."""
        metrics = self.metrics()
        return Result(
            **_common(self.plan, self.subject, self.setting, self._at),
            outcome=self.ended.outcome if self.ended else Outcome.OK,
            stage=self._worker.phase if self.ended else "done",
            why=self.ended.why if self.ended else None,
            metrics=metrics,
            samples=aggregate.samples(self.warm) if self.warm else {},
            noisy={key: said for key, said in self._noise().items() if key in metrics},
            interference=self._windows,
            phases=[self._placed(phase) for phase in self._phases],
            timeline=self._sampler.timeline(self._begun_s),
            loaded=self.loaded.loaded if self.loaded else None,
            device_map=self.loaded.loaded.device_map if self.loaded else None,
            quality=self.quality(),
            checks=self.checks,
            log_tail=f"{self._log}\n{self._traceback}".strip(),
            failed=list(self.failed),
        )

    def _counted(self) -> list[GenerateDone]:
        """Return the warm rounds that the medians rest on."""
        return interference.counted(self.warm, self._windows, self.plan.case.workload.repeats)

    def _noise(self) -> dict[str, str]:
        """Say which figures were disturbed or are in doubt, and which spread widely in the rounds that count."""
        rounds = self._counted()
        found = interference.noise(self._windows, left_out=len(self.warm) - len(rounds))
        if self._torch_alone:
            found["vram_peak_bytes"] = "torch alone held --vram: NVML does not list the process"
        spread = aggregate.noise(aggregate.samples(rounds))
        return found | {key: f"{said}; {found[key]}" if key in found else said for key, said in spread.items()}

    def finish(self) -> Result:
        """End the worker, remove its files, and return the result, without what is private."""
        try:
            self._sampler.stop()
            self._worker.stop()
            self._log = self._worker.log_tail()
        finally:
            if self._group is not None:
                self._group.remove()
            self._directory.cleanup()
        return redact.clean(self.result(), self.subject.location)

    def _placed(self, phase: Phase) -> Phase:
        """Complete a phase from the samples where the system keeps no exact peak, and count its time from the case's begin."""
        return Phase(
            name=phase.name,
            start_s=round(phase.start_s - self._begun_s, 4),
            end_s=round(phase.end_s - self._begun_s, 4),
            ram_peak_bytes=self._sampled(phase).ram_bytes if phase.sampled else phase.ram_peak_bytes,
            ram_anon_bytes=max(self._sampled(phase).anon_bytes, phase.ram_anon_bytes or 0),
            sampled=phase.sampled,
            disk_read_bytes=phase.disk_read_bytes,
            vram_peak_bytes=phase.vram_peak_bytes,
            vram_reserved_bytes=phase.vram_reserved_bytes,
        )

    def _sampled(self, phase: Phase) -> Sample:
        top = self._sampler.peak(phase.start_s, phase.end_s)
        anon = phase.ram_anon_bytes or 0
        return top or Sample(at_s=phase.end_s, ram_bytes=anon, anon_bytes=anon, vram_bytes={})

    def metrics(self) -> dict[str, float]:
        """Return the metrics of what was measured so far, by the keys of METRICS."""
        found = aggregate.of_load(self.loaded) if self.loaded else {}
        asked = self.plan.case.workload.repeats
        found |= aggregate.of_rounds(self.cold, self._counted(), asked=asked) | aggregate.of_phases(
            [self._placed(phase) for phase in self._phases]
        )
        found |= aggregate.ready(found) | aggregate.rereads(self._phases, self.plan.case.workload.new_tokens)
        counted = [self._sampled(phase) for phase in self._phases if phase.name in aggregate.GENERATING]
        process = [size for sample in counted for size in sample.vram_bytes.values()]
        if process:
            found["vram_process_peak_bytes"] = max(process)
        if self.scored:
            found |= quality.metrics_of(self.scored, real_weights=self.subject.weights == "real")
        return found


def _imports(precision: Precision, native: bool) -> tuple[str, ...]:
    """List what is imported before loading; our own architectures read what is packed without another package."""
    needs = () if native and precision.requires_checkpoint is not None else precision.needs
    return (*needs, "harness.models") if native else needs


def not_run(plan: Plan, subject: CaseModel, setting: RunContext) -> Result:
    """Return the result of a case that is not run, from its plan."""
    outcome = Outcome.UNSUPPORTED if plan.verdict is Verdict.INVALID else Outcome.SKIPPED
    common = _common(plan, subject, setting, datetime.now(timezone.utc))
    return redact.clean(Result(**common, outcome=outcome, stage="plan", why=plan.why), subject.location)


def _common(plan: Plan, subject: CaseModel, setting: RunContext, at: datetime) -> dict[str, Any]:
    return {
        "id": plan.case.id,
        "run": setting.run,
        "at": at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "case": plan.case,
        "weights": subject.weights,
        "machine": probe.limited(setting.machine, plan.case),
        "verdict": plan.verdict,
        "estimate": plan.estimate,
        "code": loading_program(subject.code_head, plan) if plan.code else None,
        "command": subject.command or None,
        "environment": dict(setting.environment),
        "remote_code": plan.remote_code if plan.trusted else [],
        "fingerprint": subject.fingerprint,
        "allowed_s": setting.allowed_s,
    }
