"""One case of a run as records: what it is run with, what it has shown so far, and the result that follows from both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from harness.core import redact
from harness.core.records import Interference, Loaded, Machine, Outcome, Phase, Plan, Quality, Result, Verdict, Workload
from harness.core.units import format_size
from harness.machine import probe
from harness.measure import aggregate, interference, quality
from harness.measure.beacon import NO_OUTLOOK, Announced, Outlook
from harness.measure.protocol import GenerateDone, LoadDone, ScoreDone
from harness.measure.sampler import Gpus, Sample, Sampler
from harness.planning.code import loading_program
from harness.results.needed import completed
from harness.run.worker_process import WorkerMain

LiveLine = Callable[["Running", Sample], None]


@dataclass(frozen=True)
class RunContext:
    """What all cases of a run share."""

    run: str  #: the id of the run
    machine: Machine
    environment: Mapping[str, str]  #: package -> version
    scratch: Path  #: the directory for temporary files
    worker_main: WorkerMain  #: the worker's program; tests pass a scripted one
    timeout_s: float  #: the limit of a case
    phase_timeout_s: float = math.inf  #: the limit of each phase of a case
    gpus: Gpus | None = None
    on_sample: LiveLine | None = None
    results: Path | None = None  #: the folder that results go to

    @property
    def allowed_s(self) -> dict[str, float]:
        """The time limits by the name of their option; one that is not set is left out."""
        limits = {"case-timeout": self.timeout_s, "phase-timeout": self.phase_timeout_s}
        return {name: seconds for name, seconds in limits.items() if math.isfinite(seconds)}


@dataclass(frozen=True)
class CaseModel:
    """The model of a case: where its files are, what its weights are, and what its predictions are compared with."""

    location: Path
    weights: str = "real"  #: "real" or "synthetic"
    tokenizer: bool = True  #: a tokenizer is among the files
    fingerprint: str = ""
    files_bytes: int | None = None  #: of the files that hold its weights
    gguf_file: str | None = None
    adapter: Path | None = None  #: the directory of what is loaded on top
    native: bool = False  #: `harness.models` has its architecture
    code_head: str = ""  #: the lines of the printed program that locate the model
    command: str = ""  #: the command that repeats the case
    typed: str = ""  #: how a command names the model
    reference: quality.Reference | None = None
    reference_file: Path | None = None  #: the predictions of the reference
    outlook: Outlook = NO_OUTLOOK  #: what its plan says to who watches
    keep_file: Path | None = None  #: where to write the predictions of this case, if it is the reference

    @property
    def real_weights(self) -> bool:
        """Whether the weights are the model's own, so that its answers mean something."""
        return self.weights == "real"

    def cleaned(self, result: Result) -> Result:
        """Return a result without what is private, the directories of the model among it."""
        found = redact.clean(result, self.location)
        return redact.clean(found, self.adapter) if self.adapter else found


class CaseEnded(Exception):
    """The case came to an end before it could be measured; its result says how."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome, self.why = outcome, why


@dataclass
class Measured:
    """What a case has shown so far."""

    at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))  #: when the case began
    begun_s: float = 0.0  #: the same on the monotonic clock, which phases and samples are timed by
    loaded: LoadDone | None = None
    cold: GenerateDone | None = None
    warm: list[GenerateDone] = field(default_factory=list)
    scored: ScoreDone | None = None
    checks: dict[str, str] = field(default_factory=dict)  #: check of what was loaded -> "ok" or what is wrong
    failed: list[str] = field(default_factory=list)  #: names of the tests that failed
    phases: list[Phase] = field(default_factory=list)
    windows: list[Interference] = field(default_factory=list)  #: one for each request that was measured
    vram_by_torch: bool = False  #: NVML does not list the worker, so torch alone enforces --vram
    context_bytes: float = 0.0  #: what a CUDA context takes here
    stage: str = "done"  #: the phase that the case ended in
    log: str = ""
    traceback: str = ""


class Running(Protocol):
    """What a line below a case says of it while it runs."""

    plan: Plan
    measured: Measured

    @property
    def phase(self) -> str:
        """The phase that its worker is in."""

    @property
    def seconds(self) -> float:
        """Seconds since it began."""


def result_of(
    plan: Plan, model: CaseModel, context: RunContext, measured: Measured, sampler: Sampler, ended: CaseEnded | None
) -> Result:
    """Return the result of a case from what it has shown so far."""
    metrics = metrics_of(plan.case.workload, model, measured, sampler)
    doubts = noise(plan.case.workload, measured) | _unlisted(measured, sampler)
    loaded = measured.loaded.loaded if measured.loaded else None
    found = Result(
        **_common(plan, model, context, measured.at),
        outcome=ended.outcome if ended else Outcome.OK,
        stage=measured.stage,
        why=ended.why if ended else None,
        metrics=metrics,
        samples=aggregate.samples(measured.warm) if measured.warm else {},
        noisy={key: why for key, why in doubts.items() if key in metrics},
        interference=measured.windows,
        phases=[_completed(phase, measured.begun_s, sampler) for phase in measured.phases],
        timeline=sampler.timeline(measured.begun_s),
        loaded=loaded,
        device_map=loaded.device_map if loaded else None,
        quality=quality_of(model, measured),
        checks=measured.checks,
        log_tail=f"{measured.log}\n{measured.traceback}".strip(),
        failed=list(measured.failed),
    )
    return completed(found)


def announcement(plan: Plan, model: CaseModel, context: RunContext, loaded: Loaded | None = None) -> Announced:
    """Return what is told of a case to who watches it, before it is loaded and after."""
    case = plan.case
    limits = {"cpu": case.ram_bytes, **dict.fromkeys([gpu.name for gpu in context.machine.gpus], case.vram_bytes)}
    planned = {path: str(tier) for path, tier in plan.device_map.items()} if isinstance(plan.device_map, dict) else {}
    return Announced(
        case=case.id,
        typed=model.typed,
        workload=case.workload,
        tiers=plan.estimate.tiers if plan.estimate else {},
        outlook=model.outlook,
        limits_bytes={name: size for name, size in limits.items() if size is not None},
        weights_bytes=loaded.tier_bytes if loaded else {},
        device_map=loaded.device_map if loaded else planned,
        results=str(context.results.absolute()) if context.results else None,
    )


def not_run(plan: Plan, model: CaseModel, context: RunContext, stage: str = "plan") -> Result:
    """Return the result of a case that is not run, from its plan."""
    outcome = Outcome.UNSUPPORTED if plan.verdict is Verdict.INVALID else Outcome.SKIPPED
    common = _common(plan, model, context, datetime.now(timezone.utc))
    return model.cleaned(Result(**common, outcome=outcome, stage=stage, why=plan.why))


def _common(plan: Plan, model: CaseModel, context: RunContext, at: datetime) -> dict[str, Any]:
    return {
        "id": plan.case.id,
        "run": context.run,
        "at": at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "case": plan.case,
        "weights": model.weights,
        "machine": probe.limited(context.machine, plan.case),
        "verdict": plan.verdict,
        "estimate": plan.estimate,
        "code": loading_program(model.code_head, plan, in_order=context.machine.gpus_differ) if plan.code else None,
        "command": model.command or None,
        "environment": dict(context.environment),
        "remote_code": plan.remote_code if plan.trusted else [],
        "fingerprint": model.fingerprint,
        "files_bytes": model.files_bytes,
        "allowed_s": context.allowed_s,
    }


def metrics_of(workload: Workload, model: CaseModel, measured: Measured, sampler: Sampler) -> dict[str, float]:
    """Return the metrics of what was measured so far, by the keys of METRICS."""
    phases = [_completed(phase, measured.begun_s, sampler) for phase in measured.phases]
    found = aggregate.of_load(measured.loaded) if measured.loaded else {}
    found |= aggregate.of_rounds(measured.cold, _counted(workload, measured), asked=workload.repeats)
    found |= aggregate.of_phases(phases)
    found |= aggregate.ready(found) | aggregate.rereads(measured.phases, workload.new_tokens)
    if process := _process_vram(measured, sampler):
        found["vram_process_peak_bytes"] = process.peak_bytes
    if measured.scored:
        found |= quality.metrics_of(measured.scored, real_weights=model.real_weights)
    return found


class _ProcessVram(NamedTuple):
    peak_bytes: int
    doubt: str = ""  #: how it was had, where NVML does not say it of the process


def _process_vram(measured: Measured, sampler: Sampler) -> _ProcessVram | None:
    """Return the peak of what the process held on a card, as nvidia-smi shows it: its CUDA context included.

    In a container without the host's ids NVML does not list it: then it is what the card had in use beyond the case's start, and
    where that is not told either, what torch reserved and the context that is usual.
    """
    phases = [phase for phase in measured.phases if phase.name in aggregate.GENERATING]
    samples = [_peak(phase, sampler) for phase in phases]
    if listed := [size for sample in samples for size in sample.vram_bytes.values()]:
        return _ProcessVram(max(listed))
    reserved = [item for phase in phases for item in phase.vram_reserved_bytes.items()]
    if not reserved:
        return None
    used = {tier for tier, _ in reserved}
    if grown := [size for sample in samples for tier, size in sample.grown_bytes.items() if tier in used]:
        return _ProcessVram(max(grown), "NVML does not list the process: what the card had in use beyond the start of the case")
    context = int(measured.context_bytes)
    return _ProcessVram(
        max(size for _, size in reserved) + context,
        f"NVML does not list the process: what torch reserved and {format_size(context)} for a CUDA context",
    )


def _unlisted(measured: Measured, sampler: Sampler) -> dict[str, str]:
    process = _process_vram(measured, sampler)
    return {"vram_process_peak_bytes": process.doubt} if process and process.doubt else {}


def quality_of(model: CaseModel, measured: Measured) -> Quality | None:
    """Judge what the probe found, None if it did not run."""
    if measured.scored is None:
        return None
    return quality.judge(
        measured.scored,
        real_weights=model.real_weights,
        reference=model.reference,
        is_reference=model.keep_file is not None,
    )


def noise(workload: Workload, measured: Measured) -> dict[str, str]:
    """Say which figures were disturbed or are in doubt, and which spread widely in the rounds that count."""
    rounds = _counted(workload, measured)
    found = interference.noise(measured.windows, left_out=len(measured.warm) - len(rounds))
    if measured.vram_by_torch:
        found["vram_peak_bytes"] = "only torch enforced --vram: NVML does not list the process"
    spread = aggregate.noise(aggregate.samples(rounds))
    return found | {key: f"{why}; {found[key]}" if key in found else why for key, why in spread.items()}


def is_unsettled(workload: Workload, measured: Measured) -> bool:
    """Say whether too few of the warm rounds were undisturbed, or their spread is wide."""
    quiet = interference.undisturbed(measured.warm, measured.windows)
    return len(quiet) < workload.repeats or bool(aggregate.noise(aggregate.samples(quiet)))


def _counted(workload: Workload, measured: Measured) -> list[GenerateDone]:
    """Return the warm rounds that the medians rest on."""
    return interference.counted(measured.warm, measured.windows, workload.repeats)


def _completed(phase: Phase, begun_s: float, sampler: Sampler) -> Phase:
    """Complete a phase from the samples if the system keeps no exact peak, and count its time from the begin of the case."""
    peak = _peak(phase, sampler)
    return Phase(
        name=phase.name,
        start_s=round(phase.start_s - begun_s, 4),
        end_s=round(phase.end_s - begun_s, 4),
        ram_peak_bytes=peak.ram_bytes if phase.sampled else phase.ram_peak_bytes,
        ram_anon_bytes=max(peak.anon_bytes, phase.ram_anon_bytes or 0),
        sampled=phase.sampled,
        disk_read_bytes=phase.disk_read_bytes,
        vram_peak_bytes=phase.vram_peak_bytes,
        vram_reserved_bytes=phase.vram_reserved_bytes,
    )


def _peak(phase: Phase, sampler: Sampler) -> Sample:
    """Return the highest of the samples of a phase, or what the worker itself saw if there is none."""
    anon = phase.ram_anon_bytes or 0
    fallback = Sample(at_s=phase.end_s, ram_bytes=anon, anon_bytes=anon, vram_bytes={})
    return sampler.peak(phase.start_s, phase.end_s) or fallback
