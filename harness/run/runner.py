"""Run one case: its phases in order, as far as asked, in a worker of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import msgspec

from harness.checkpoint import adapter
from harness.core.attention import KV_FORMS
from harness.core.errors import WorkerError
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Precision
from harness.core.records import Plan, Quality, Result, Workload
from harness.measure import verify
from harness.measure.outcome import classify
from harness.measure.protocol import (
    MOST_ROUND_TOKENS,
    Chat,
    Chatting,
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
    Shared,
)
from harness.planning.calibration import gpu_context
from harness.planning.code import gpus
from harness.run.case_result import (
    CaseEnded,
    CaseModel,
    Measured,
    RunContext,
    announcement,
    is_unsettled,
    metrics_of,
    quality_of,
    result_of,
)
from harness.run.confinement import ConfinedWorker
from harness.run.worker_process import Ended

# A card comes to its clock within a second or two, and its counter of energy moves every 20 to 100 ms: a round on one is as many
# generations as take this long.
_GPU_ROUND_S = 1.0
_SPARE_ROUNDS = 4  # an extra round begins only while there is time for this many, so that it cannot end the case


class Run:
    """One case: load, generate, score, in this order and as far as asked; `finish` gives the result."""

    def __init__(self, plan: Plan, model: CaseModel, context: RunContext) -> None:
        if plan.code is None:
            raise ValueError(f"{plan.case.id} has no loading code")
        self.plan, self.model, self.context = plan, model, context
        self.measured = Measured(begun_s=time.monotonic(), context_bytes=gpu_context(context.machine).best)
        self.ended: CaseEnded | None = None
        self._worker = ConfinedWorker(plan.case, context, self.measured.begun_s)
        on_sample = context.on_sample
        self._worker.start_sampling((lambda sample: on_sample(self, sample)) if on_sample else None)

    @property
    def phase(self) -> str:
        """The phase that the worker is in."""
        return self._worker.phase

    @property
    def seconds(self) -> float:
        """Seconds since the case began."""
        return time.monotonic() - self.measured.begun_s

    @property
    def checks(self) -> dict[str, str]:
        """The checks of what was loaded: "ok", or what is wrong."""
        return self.measured.checks

    @property
    def warm(self) -> list[GenerateDone]:
        """The warm rounds so far."""
        return self.measured.warm

    def load(self) -> LoadDone:
        """Load the model, once; later calls return what the first one found. Raises CaseEnded."""
        if self.measured.loaded is None:
            plan = self.plan
            self._confine()
            self._worker.announce(announcement(plan, self.model, self.context))
            request = Load(
                model=str(self.model.location),
                code=plan.code or "",
                imports=_imports(PRECISIONS[plan.case.precision], self.model),
                tokenizer=self.model.tokenizer,
                trust_remote_code=plan.trusted,
                gguf_file=self.model.gguf_file,
                cache=dict(KV_FORMS[plan.case.kv].arguments),
                adapter=str(self.model.adapter) if self.model.adapter else None,
            )
            done = self._ask(request)
            assert isinstance(done, LoadDone)
            self._worker.announce(announcement(plan, self.model, self.context, done.loaded))
            self.measured.loaded, self.measured.checks = done, verify.checks(plan, done.loaded)
        return self.measured.loaded

    def _confine(self) -> None:
        """Have the worker be as many processes as its case takes, within the limits of its case. Raises CaseEnded."""
        try:
            ranks = PLACEMENTS[self.plan.case.placement].ranks(len(self.context.machine.gpus))
            if ranks > 1:
                self._worker.share(self._ask, ranks)
            self._worker.confine(self._ask, self.model.location, gpus(self.plan), expandable=self.plan.expandable_segments)
        except CaseEnded as ended:
            self.ended, self.measured.stage = ended, self.phase
            raise
        finally:
            self.measured.vram_by_torch = self._worker.vram_by_torch

    def first_round(self) -> GenerateDone:
        """Generate once, cold; later calls return what the first one found. Raises CaseEnded."""
        self.load()
        if self.measured.cold is None:
            self.measured.cold = self._generate("cold")
        return self.measured.cold

    def round(self) -> GenerateDone:
        """Generate once more, warm. Raises CaseEnded."""
        self.first_round()
        times = _generations(self.plan, self.warm[-1]) if self.warm else 1
        done = self._generate("warm", times)
        if (
            not self.warm and (times := _generations(self.plan, done)) > 1
        ):  # too short: it has warmed the card up, and does not count
            del self.measured.windows[-1:], self.measured.phases[-len(done.phases) :]
            done = self._generate("warm", times)
        self.warm.append(done)
        return done

    def extra_rounds(self) -> Iterator[float]:
        """Generate on while too few of the warm rounds were undisturbed or their spread is wide; yield the seconds of each round.

        There are at most three times as many rounds as were asked for, and the extra ones take as long as those at most. Raises
        CaseEnded.
        """
        workload = self.plan.case.workload
        while _is_time_for_more(workload, self.warm, self._worker.deadline.case_left_s) and is_unsettled(workload, self.measured):
            begun_s = time.perf_counter()
            self.round()
            yield time.perf_counter() - begun_s

    def _generate(self, phase: str, times: int = 1) -> GenerateDone:
        asked = self.plan.case.workload
        energy_j = self._worker.energy_j(used := gpus(self.plan))
        each = {"prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens, "batch": asked.batch}
        done = self._ask(Generate(**each, phase=phase, times=times))
        assert isinstance(done, GenerateDone)
        if not done.token_s:
            note = f"it timed none of {asked.new_tokens} tokens"
            raise self._end(Ended(exit_code=None, ended_by="protocol", note=note))
        if energy_j is not None and (now_j := self._worker.energy_j(used)) is not None:
            done = msgspec.structs.replace(done, energy_j=now_j - energy_j)
        return done

    def score(self) -> ScoreDone:
        """Run the quality probe, once. Raises CaseEnded."""
        self.load()
        if self.measured.scored is None:
            keep, reference = self.model.keep_file, self.model.reference_file
            request = Score(
                model=self.plan.case.model, keep=str(keep) if keep else None, reference=str(reference) if reference else None
            )
            done = self._ask(request)
            assert isinstance(done, ScoreDone)
            self.measured.scored = done
        return self.measured.scored

    def chat(self, host: str, port: int) -> Chatting:
        """Serve a page to talk to the model, within the workload that was planned for. Raises CaseEnded."""
        self.load()
        asked, expected = self.plan.case.workload, self.plan.estimate
        done = self._ask(
            Chat(
                model=self.plan.case.model,
                host=host,
                port=port,
                prompt_tokens=asked.prompt_tokens,
                new_tokens=asked.new_tokens,
                case=self.plan.case.id,
                planned_bytes={name: tier.needed_high_bytes for name, tier in expected.tiers.items()} if expected else {},
            )
        )
        assert isinstance(done, Chatting)
        return done

    def wait(self) -> NoReturn:
        """Wait until the worker ends by itself, or is ended because memory runs out. Raises CaseEnded."""
        try:
            self._worker.wait()
        except Ended as end:
            raise self._end(end) from None

    def _ask(self, request: Request) -> Event:
        if self.ended is not None:
            raise self.ended
        try:
            event = self._worker.ask(request)
        except Ended as end:
            raise self._end(end) from None
        except WorkerError as error:
            raise self._end(Ended(exit_code=None, ended_by="protocol", note=str(error))) from None
        if isinstance(event, Failed):
            self.measured.phases += event.phases
            raise self._end(event)
        if isinstance(event, (Confined, Shared, Chatting)):
            return event
        assert isinstance(event, (LoadDone, GenerateDone, ScoreDone))
        self.measured.windows.append(self._worker.interference())
        self.measured.phases += event.phases
        return event

    def _end(self, cause: Failed | Ended) -> CaseEnded:
        """Say how the case ended: in a failure that the worker reports, or with its process."""
        outcome, why = classify(self._worker.evidence(cause))
        note = cause.note if isinstance(cause, Ended) else None
        self.ended = CaseEnded(outcome, f"{why}: {note}" if note else why)
        self.measured.stage = self.phase
        self.measured.traceback = cause.traceback if isinstance(cause, Failed) else ""
        return self.ended

    def quality(self) -> Quality | None:
        """Judge what the probe found, None if it did not run."""
        return quality_of(self.model, self.measured)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of what was measured so far, by the keys of METRICS."""
        return metrics_of(self.plan.case.workload, self.model, self.measured, self._worker.sampler)

    def result(self) -> Result:
        """Return what the case has shown so far."""
        return result_of(self.plan, self.model, self.context, self.measured, self._worker.sampler, self.ended)

    def finish(self) -> Result:
        """End the worker, remove its files, and return the result, without what is private."""
        self.measured.log = self._worker.stop()
        return self.model.cleaned(self.result())


def _imports(precision: Precision, model: CaseModel) -> tuple[str, ...]:
    """List what is imported before loading; our own architectures read what is packed without another package."""
    needs = () if model.native and precision.requires_checkpoint is not None else precision.needs
    return (*needs, *["harness.models"] * model.native, *[adapter.MODULE] * (model.adapter is not None))


def _is_time_for_more(workload: Workload, warm: Sequence[GenerateDone], left_s: float) -> bool:
    """Say whether the rounds that were asked for are done, and there is time for another."""
    took, asked = [done.total_s for done in warm], workload.repeats
    if not asked <= len(took) < workload.most_rounds or sum(took[asked:]) + max(took) > sum(took[:asked]):
        return False
    return _SPARE_ROUNDS * max(took) <= left_s


def _generations(plan: Plan, last: GenerateDone) -> int:
    """Return how many generations make a round: several on a GPU that is quick, which nothing is that reads the disk."""
    tiers = plan.estimate.tiers if plan.estimate else {}
    if not gpus(plan) or "disk" in tiers:
        return 1
    most = MOST_ROUND_TOKENS // plan.case.workload.new_tokens
    return max(1, min(most, math.ceil(_GPU_ROUND_S * len(last.generations) / last.total_s)))
