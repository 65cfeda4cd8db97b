"""One run from end to end: probe the machine, plan the cases, run them, append the results, render the page."""

from __future__ import annotations

import dataclasses
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from harness.catalog import download
from harness.catalog.resolve import Source
from harness.core import precisions
from harness.core.errors import UsageError
from harness.core.placements import FILE, PLACEMENTS, distinct, named
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Machine, Plan, Result, Verdict, Workload
from harness.core.units import exact_size
from harness.machine import probe
from harness.machine.scratch import Scratch
from harness.machine.signals import Interrupts
from harness.measure.quality import Reference, reference_of
from harness.measure.sampler import Gpus
from harness.planning import calibration, code, feasibility, planner
from harness.planning.calibration import Calibration
from harness.planning.device_map import user_map
from harness.planning.planner import Planner
from harness.report.page import render as page
from harness.results import compare, store
from harness.results.store import Store
from harness.run import forkserver, resume, runner, worker_process
from harness.run.model_set import ModelSet
from harness.run.options import Options
from harness.run.resume import Kept
from harness.run.runner import CaseEnded, CaseModel, LiveLine, Run, RunContext
from harness.run.worker_process import WorkerMain

_RUNNABLE = (Verdict.FITS, Verdict.TIGHT, Verdict.UNKNOWN)


@dataclasses.dataclass
class _Reference:
    """What the cases of a model are compared with. `file` has its predictions: None where the result is an earlier run's."""

    reference: Reference
    case: Case
    file: Path | None


class Session:
    """All state of a run. The plugin asks it, and it asks everything else.

    `added` counts the results of this run, which are on the disk; `kept` are those of earlier runs that stand for a case.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.models = ModelSet(options.model, synthetic=options.weights == "synthetic", trust=self.trust)
        self.device_map = user_map.asked(options.device_map, self._named)
        self.added = 0
        self.kept: dict[Case, Result] = {}
        self.store = Store(options.results)
        self.html = options.html or options.results / "index.html"
        self.on_sample: LiveLine | None = None
        self.worker_main: WorkerMain | None = None
        self.page: Path | None = None
        self.current: Run | None = None
        self.interrupts = Interrupts()
        self.interrupted = False
        self.run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self._plans: dict[str, Plan] = {}
        self._standards: dict[str, _Reference] = {}
        self._earlier: dict[tuple[Case, str], Result] = {}
        self._again: list[str] = []
        self._baseline: list[Result] = []
        self._last: Result | None = None
        self._reloaded: list[str] = []

    @property
    def trust(self) -> bool:
        """Whether code that comes with a model may run."""
        return bool(self.options.trust_remote_code)

    @cached_property
    def machine(self) -> Machine:
        """This machine, probed once."""
        return probe.probe(scratch=self._scratch.path)

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch()

    @cached_property
    def setting(self) -> RunContext:
        """What all cases share."""
        gpus = Gpus() if self.machine.gpus else None
        return RunContext(
            run=self.run_id,
            machine=self.machine,
            environment=probe.versions(),
            scratch=self._scratch.path,
            worker_main=self.worker_main or worker_process.torch_worker,
            timeout_s=self.options.case_timeout,
            phase_timeout_s=self.options.phase_timeout,
            gpus=gpus,
            on_sample=self.on_sample,
        )

    def cases(self) -> list[Case]:
        """Return model x precision x placement x size of GPU in the order they run: the widest precision first, as reference."""
        load = Workload(
            prompt_tokens=self.options.prompt_tokens,
            new_tokens=self.options.new_tokens,
            batch=self.options.batch,
            repeats=self.options.repeats,
        )
        return [
            Case(model=name, precision=precision, placement=placement, workload=load, vram_bytes=vram, ram_bytes=self.options.ram)
            for name in self.models.sources
            for precision in self._precisions(name)
            for placement in self._placements
            for vram in (("gpu" in PLACEMENTS[placement].devices and self.options.vram) or (None,))
        ]

    @cached_property
    def _placements(self) -> list[str]:
        """The placements asked for; unless the user named them, without those that are the same as another here."""
        return named(self._named, self.device_map is not None) or distinct(PLACEMENTS, len(self.machine.gpus))

    @property
    def _named(self) -> Sequence[str] | None:
        """The placements that the user named."""
        return self.options.placement if "placement" in self.options.origin else None

    def _precisions(self, model: str) -> list[str]:
        """Return the precisions asked for; unless the user named them, the usual ones, or what a quantized checkpoint is."""
        if "precision" in self.options.origin:
            return _in_order(self.options.precision, PRECISIONS)
        return precisions.defaults(download.stored_as(self.models.sources[model]))

    def prepare(self, cases: Sequence[Case]) -> None:
        """Have everything at hand that the cases need, before the first is measured: store, models, worker.

        Raises:
            UsageError, CheckpointError, StoreError: something is missing; nothing was measured.
        """
        if self.options.baseline is not None:
            self._baseline = store.read(store.file_of(self.options.baseline))[0]
        to_come = sum(map(store.most_bytes, cases))
        self.store.prepare(to_come)
        _prepare_page(self.html, page.most_bytes(len(cases), self.store.path.stat().st_size))
        runnable = sorted({case.model for case in cases if self._may_run(case)})
        self.models.fetch(runnable)
        if self.options.resume:
            self._earlier = resume.newest(self.store.read()[0], self.machine)
        for name in runnable:
            spec = self.models.spec(name)
            if self.device_map is not None:
                user_map.check_map(self.device_map, spec.skeleton, len(self.machine.gpus), model=name)
        forkserver.live_in(self._scratch.path)
        if self.worker_main is None and any(self._why_again(case) for case in cases if case.model in runnable):
            forkserver.warm_up(self.models.modeling_modules(runnable))

    def _may_run(self, case: Case) -> bool:
        """Say whether a model is worth fetching for a case; whether what is stored packed needs a package, the files will tell."""
        return feasibility.gate(case, self.machine, here=PRECISIONS[case.precision].requires_checkpoint is None) is None

    def plan(self, case: Case) -> Plan:
        """Plan one case, and with the first of a model all that share its limits: what is too big names one that fits."""
        if not self.models.fetched(case.model):
            return feasibility.decide(case, probe.limited(self.machine, case), None)
        if case.id not in self._plans:
            here, spec = probe.limited(self.machine, case), self.models.spec(case.model)
            cases = [one for one in self.cases() if _limits(one) == _limits(case)]
            planner = Planner(spec, here, constants=self._calibration, trust=self.trust, device_map=self.device_map)
            made = map(_not_measured, planner.plans(cases or [case]))
            self._plans |= {one.case.id: one for one in made}
        return self._plans[case.id]

    @cached_property
    def _calibration(self) -> Calibration:
        """The constants, corrected by what earlier runs on this machine left in the store."""
        return calibration.correct(self.store.read()[0], self.machine)

    def subject(self, case: Case) -> CaseModel:
        """Return the model of a case and what its predictions are compared with."""
        source = self.models.sources[case.model]
        standard = self._standards.get(case.model)
        spec = self.models.spec(case.model) if self.models.fetched(case.model) else None
        return CaseModel(
            location=self.models.location(case.model),
            weights=self._weights(case),
            tokenizer=spec.tokenizer if spec else False,
            gguf_file=spec.gguf_file if spec else None,
            native=spec.native if spec else False,
            fingerprint=self.models.fingerprint(case.model),
            code_head=code.code_head(source, case.placement),
            command=self._command(case),
            reference=standard.reference if standard else None,
            reference_file=standard.file if standard else None,
            keep_file=None if standard else self._predictions_file(case.model),
        )

    def _weights(self, case: Case) -> str:
        return "synthetic" if self.models.is_synthetic(case.model) else "real"

    def _predictions_file(self, model: str) -> Path:
        return self._scratch.path / f"reference-{list(self.models.sources).index(model)}.npy"

    def _command(self, case: Case) -> str:
        model = _sayable(self.models.sources[case.model])
        words = ["pytest", "cases/", "--model", model, "--precision", case.precision, "--placement", case.placement]
        words += ["--device-map", _from_here(self.options.device_map)] if case.placement == FILE else []
        limits = (("--vram", case.vram_bytes), ("--ram", case.ram_bytes))
        words += [word for flag, size in limits if size is not None for word in (flag, exact_size(size))]
        return f"{shlex.join(words)} {self.options.command()}".strip()

    def start(self, decided: Plan) -> Run | Kept | None:
        """Start a case; or keep what an earlier run showed of it; or record why it is not run and return None."""
        case, again = decided.case, self._why_again(decided.case)
        if again is None:
            return self._keep(self._earlier[case, self._weights(case)])
        decided = self._held_against_disk(decided)
        asked = self.options.run_all and decided.code is not None
        if decided.verdict in _RUNNABLE or asked:
            self._have_predictions(case.model)
            self._again.append(again)
            self.current = Run(decided, self.subject(case), self.setting)
            return self.current
        found = runner.not_run(decided, self.subject(case), self.setting)
        if resume.finds_the_same(self._earlier.get((case, found.weights)), found):
            self._last = found
        else:
            self._record(found)
        return None

    def _held_against_disk(self, decided: Plan) -> Plan:
        """Plan again what is free for offloaded weights by now: models were fetched since the probe, and others write as well."""
        short = planner.short_of_disk(decided.estimate, shutil.disk_usage(self._scratch.path).free)
        if short is None or decided.verdict not in _RUNNABLE:
            return decided
        return msgspec.structs.replace(decided, verdict=Verdict.TOO_BIG, why=short)

    def _why_again(self, case: Case) -> str | None:
        """Say why a case must run although an earlier run may have measured it; None where its result is kept."""
        earlier, standard = self._earlier.get((case, self._weights(case))), self._standards.get(case.model)
        if earlier is None:
            return resume.NEW
        now = runner.not_run(self.plan(case), self.subject(case), self.setting)
        lesser = resume.judged_by_a_lesser(earlier, standard.case, self.cases()) if standard else None
        return resume.why_again(earlier, now, run_all=self.options.run_all) or lesser

    def _keep(self, earlier: Result) -> Kept:
        case, reference = earlier.case, reference_of(earlier)
        self.kept[case] = self._last = earlier
        if reference is not None and earlier.quality is not None and earlier.quality.reference is None:
            self._standards.setdefault(case.model, _Reference(reference, case, file=None))
        return Kept(earlier)

    def _have_predictions(self, model: str) -> None:
        """Load a kept reference once more, for its predictions only: they are large, and gone with the run that made them."""
        standard = self._standards.get(model)
        if standard is None or standard.file is not None:
            return
        file, decided = self._predictions_file(model), self.plan(standard.case)
        if decided.code is None:  # it cannot be loaded here any more
            del self._standards[model]
            return
        subject = dataclasses.replace(self.subject(standard.case), reference=None, reference_file=None, keep_file=file)
        run = Run(decided, subject, self.setting)
        try:
            run.score()
            standard.file = file
            self._reloaded.append(standard.case.id)
        except CaseEnded:
            del self._standards[model]
        finally:
            run.finish()

    def finish(self, run: Run) -> Result:
        """End a case and append its result; one that the user interrupted leaves none, so that an older result stays the newest."""
        with self.interrupts.held():  # what was measured is kept, whatever comes meanwhile
            self.current = None
            result = run.finish()
            if self.interrupted:
                return result
            file, reference = run.subject.keep_file, reference_of(result)
            if file is not None and reference is not None:
                self._standards[result.case.model] = _Reference(reference, result.case, file)
            self._record(result)
        return result

    def failed(self, case: Case, test: str) -> None:
        """Take note that a test of the case that runs has failed."""
        if self.current is not None and self.current.plan.case == case and test not in self.current.failed:
            self.current.failed.append(test)

    def promised(self, case: Case) -> bool:
        """Say whether the plan said that a case fits; of a kept one, the plan of its time."""
        kept = self.kept.get(case)
        return (kept.verdict if kept else self.plan(case).verdict) is Verdict.FITS

    def shown(self, case: Case) -> Result | None:
        """Return what the case of this moment has shown so far, None before it began."""
        if self.current is not None and self.current.plan.case == case:
            return self.current.result()
        return self._last if self._last is not None and self._last.case == case else None

    def against_baseline(self, case: Case) -> tuple[str, ...] | None:
        """Say what got worse since the baseline, a sentence each; None where the baseline has no such case."""
        now = self.shown(case)
        found = compare.compare(self._baseline, [now], self.options.gate).pairs[:1] if now else ()
        if not found or found[0].before is None:
            return None
        return compare.Comparison(pairs=found).failures

    def resumed(self) -> str | None:
        """Say what was kept and why the rest was run; None without --resume."""
        return resume.summary(len(self.kept), self._again, self._reloaded) if self.options.resume else None

    def _record(self, result: Result) -> None:
        self.store.append(result)
        self._last, self.added = result, self.added + 1

    def render(self) -> Path | None:
        """Write the page from everything in the store, if this run came to any case."""
        if self._last is None:
            return None
        results, problems = self.store.read()
        page.write(self.html, page.render(results, problems=[str(problem) for problem in problems]))
        self.page = self.html
        return self.page

    def close(self) -> None:
        """End what still runs, and remove what the run left on the disk."""
        if "setting" in self.__dict__ and self.setting.gpus is not None:
            self.setting.gpus.close()
        if "_scratch" in self.__dict__:
            forkserver.cool_down(self._scratch.path)
            self._scratch.remove()


def _limits(case: Case) -> tuple[str, int | None, int | None]:
    return case.model, case.vram_bytes, case.ram_bytes


def _sayable(source: Source) -> str:
    """Write the model for a command: a directory as seen from here, or by its name alone where that would name others."""
    place = Path(source.location) / (source.file or "")
    return source.name if source.kind != "directory" else _from_here(place, source.name)


def _from_here(place: Path, otherwise: str | None = None) -> str:
    """Write a path as seen from here; by its name alone, or as `otherwise` says, where that would name others."""
    place = place.absolute()
    if not place.is_relative_to(Path.cwd()):
        return place.name if otherwise is None else otherwise
    return f"./{place.relative_to(Path.cwd())}"


def _not_measured(one: Plan) -> Plan:
    """Hold back what takes several processes where a worker cannot be forked into them."""
    parallel = PLACEMENTS[one.case.placement].parallel
    if not parallel or forkserver.METHOD == "forkserver" or one.verdict not in (*_RUNNABLE, Verdict.TOO_BIG):
        return one
    why = "processes that share a model are measured on Linux alone: run the code that fitmatrix plan --code prints, by torchrun"
    return msgspec.structs.replace(one, verdict=Verdict.UNAVAILABLE, why=why, code=None)


def _in_order(names: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    return [name for name in table if name in names]


def _prepare_page(path: Path, need_bytes: int) -> None:
    """Make the page's directory before anything is measured, and see that the page has room there.

    Raises:
        UsageError, StoreError: the page could not be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--html {path}: its directory cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise UsageError(f"--html {path} is a directory; name a file, such as {path / 'index.html'}")
    store.check_room(path.parent, need_bytes, "the page", "--html")
