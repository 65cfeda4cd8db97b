"""One run from end to end: probe the machine, plan the cases, run them, append the results, render the page."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from harness.core.errors import StoreError, UsageError
from harness.core.progress import show_progress
from harness.core.records import Case, Interference, Machine, Plan, Record, Result
from harness.machine import accelerators, probe
from harness.machine.scratch import Scratch
from harness.machine.signals import Interrupts
from harness.measure import interference
from harness.measure.sampler import Gpus
from harness.planning import code
from harness.planning.calibrating import kept_calibration
from harness.report.page import render as page
from harness.results import compare, selection, store
from harness.results.store import Store
from harness.run import case_result, cases, forkserver, resume, worker_process
from harness.run.case_result import CaseModel, LiveLine, RunContext
from harness.run.cases import RUNNABLE, CaseMatrix
from harness.run.model_set import ModelSet
from harness.run.options import Options
from harness.run.references import References
from harness.run.resume import Kept
from harness.run.runner import Run
from harness.run.worker_process import WorkerMain

LEAST_LIMIT_S = 600.0  # a run that gives its cases less has no minute to calibrate


class CaseSubset(Record, frozen=True, kw_only=True):
    """What a run measures of the cases that its options name; results from before `since` are none of it."""

    cases: frozenset[Case]
    since: str


class Session:
    """All state of a run. The plugin asks it, and it asks everything else."""

    def __init__(self, options: Options, subset: CaseSubset | None = None) -> None:
        self.options, self._subset = options, subset
        self.models = ModelSet(options.model, synthetic=options.weights == "synthetic", trust=bool(options.trust_remote_code))
        self.added = 0  #: results of this run, which are on the disk
        self.kept: dict[Case, Result] = {}  #: results of earlier runs that stand for a case
        self.store = Store(options.results)
        self._matrix = CaseMatrix(options, self.models, lambda: self.machine, self.store, cases.asked_map(options))
        self.html = options.html or options.results / "index.html"
        self.on_sample: LiveLine | None = None
        self.on_result: Callable[[Result], None] | None = None  #: hears of each result that is on the disk
        self.worker_main: WorkerMain | None = None
        self.page: Path | None = None
        self.problems: list[StoreError] = []  #: lines of the store that cannot be read, once the page is written
        self.current: Run | None = None
        self.interrupts = Interrupts()
        self.interrupted = False
        self.run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self._references = References(list(self.models.sources), lambda: self._scratch.path)
        self._earlier: dict[tuple[Case, str], Result] = {}
        self._untraced: list[str] = []  #: why the memory of some cases is not from a trace
        self._again: list[str] = []  #: why each of the others ran
        self._baseline: list[Result] = []
        self._unread: list[str] = []
        self._windows: list[Sequence[Interference]] = []  #: of each case that was run
        self._last: Result | None = None
        self._recorded = 0  # results of this run, on the disk or not

    @cached_property
    def machine(self) -> Machine:
        """This machine as torch can use it, probed and asked once."""
        return accelerators.usable(probe.probe(scratch=self._scratch.path))

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch()

    @cached_property
    def context(self) -> RunContext:
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
            results=self.options.results,
        )

    def cases(self) -> list[Case]:
        """Return model x precision x placement x size of GPU in the order they run: the widest precision first, as reference."""
        cases = self._matrix.cases()
        return [case for case in cases if case in self._subset.cases] if self._subset else cases

    def plan(self, case: Case) -> Plan:
        """Plan a case; before its model is fetched, only what no model could do here is known."""
        return self._matrix.plan(case)

    def prepare(self, asked: Sequence[Case], tell: Callable[[str], None] | None = None) -> None:
        """Have everything at hand that the cases need, before the first is measured: store, models, worker.

        With `tell`, which hears of it, this machine is calibrated first if nothing was kept of it.

        Raises:
            UsageError, CheckpointError, StoreError: something is missing; nothing was measured.
        """
        if self.options.baseline is not None:
            self._baseline = store.read_telling(store.file_of(self.options.baseline), self._unread.append)
            if not self._baseline:
                raise UsageError(
                    f"--baseline {self.options.baseline}: has no results to compare with; name others, or leave it out"
                )
        to_come = sum(map(store.most_bytes, asked))
        self.store.prepare(to_come)
        _prepare_page(self.html, page.most_bytes(len(asked), self.store.path.stat().st_size))
        runnable = sorted({self._matrix.files_of(case) for case in asked if self._matrix.may_run(case)})
        self.models.fetch(runnable, self._matrix.check_model)
        runnable = [name for name in runnable if name not in self.models.faults]
        whole = self._subset is None and self.worker_main is None
        if tell is not None and whole and runnable and may_calibrate(self.options):
            kept_calibration.calibrate_once(self.machine, tell)
        if self.options.resume:
            since = self._subset.since if self._subset else ""
            known = store.read_telling(self.store.path, self._unread.append)
            self._earlier = selection.last_on(self.machine, [one for one in known if one.at >= since])
        if self.worker_main is None and self.machine.gpus:
            with show_progress() as report:  # the run has torch anyway, and is held against its plans
                self._untraced = self._matrix.trace([case for case in asked if self._matrix.files_of(case) in runnable], report)
        forkserver.live_in(self._scratch.path)
        forkserver.hide_gpus(self.machine.gpu_problem is not None)
        if self.worker_main is None and any(self._why_again(case) for case in asked if self._matrix.files_of(case) in runnable):
            forkserver.warm_up(self.models.modeling_modules(runnable))

    def notices(self) -> list[str]:
        """Return what is to be said of this machine, of the plans and of earlier results once, before the first case."""
        said = (self.machine.gpu_problem, accelerators.ram_fallback(self.machine), accelerators.overruled_order(self.machine))
        by_formulas = (f"activations are computed by formulas: {why}" for why in self._untraced)
        return [sentence for sentence in (*said, *by_formulas, *self._unread) if sentence]

    def case_model(self, case: Case) -> CaseModel:
        """Return the model of a case and what its predictions are compared with."""
        source, reference, files = self.models.sources[case.model], self._references.of(case.model), self._matrix.files_of(case)
        spec = self.models.spec(files) if self.models.fetched(files) else None
        return CaseModel(
            location=self.models.location(files),
            weights=self.models.weights(files),
            tokenizer=spec.tokenizer if spec else False,
            gguf_file=spec.gguf_file if spec else None,
            adapter=Path(source.location) if source.base else None,
            native=spec.native if spec else False,
            fingerprint=self.models.fingerprint(files),
            files_bytes=spec.checkpoint_bytes if spec else None,
            code_head=code.code_head(source, case.placement, self.models.form_of(files)),
            command=cases.command_of(case, source, self.options),
            typed=cases.typed(source),
            reference=reference.reference if reference else None,
            reference_file=reference.file if reference else None,
            outlook=self._matrix.outlook(case),
            keep_file=None if reference else self._references.file_for(case.model),
        )

    def start(self, decided: Plan) -> Run | Kept | None:
        """Start a case; or keep what an earlier run showed of it; or record why it is not run and return None."""
        case, again = decided.case, self._why_again(decided.case)
        if again is None:
            self.kept[case] = self._last = earlier = self._earlier[case, self.models.weights(self._matrix.files_of(case))]
            self._references.keep(earlier)
            return Kept(earlier)
        decided = cases.with_free_disk(decided, shutil.disk_usage(self._scratch.path).free)
        if decided.verdict in RUNNABLE or (self.options.run_all and decided.code is not None):
            self._references.load_predictions(case.model, lambda one: (self.plan(one), self.case_model(one)), self.context)
            self._again.append(again)
            self.current = Run(decided, self.case_model(case), self.context)
            return self.current
        found = case_result.not_run(decided, self.case_model(case), self.context)
        if resume.finds_the_same(self._earlier.get((case, found.weights)), found):
            self._last = found
        else:
            self._record(found)
        return None

    def _why_again(self, case: Case) -> str | None:
        """Say why a case must run although an earlier run may have measured it; None if its result is kept."""
        earlier = self._earlier.get((case, self.models.weights(self._matrix.files_of(case))))
        reference = self._references.of(case.model)
        if earlier is None:
            return resume.NEW
        now = case_result.not_run(self.plan(case), self.case_model(case), self.context)
        lesser = resume.judged_by_a_lesser(earlier, reference.case, self.cases()) if reference else None
        return resume.why_again(earlier, now, run_all=self.options.run_all) or lesser

    def finish(self, run: Run) -> Result:
        """End a case and append its result; one that the user interrupted leaves none, so that an older result stays the newest."""
        with self.interrupts.deferred():  # what was measured is kept, whatever comes meanwhile
            self.current = None
            result = run.finish()
            if self.interrupted:
                return result
            self._references.add(result, run.model.keep_file)
            self._record(result)
        return result

    def failed(self, case: Case, test: str) -> None:
        """Take note that a test of the case that runs has failed."""
        if self.current is not None and self.current.plan.case == case and test not in self.current.measured.failed:
            self.current.measured.failed.append(test)

    def shown(self, case: Case) -> Result | None:
        """Return what the case of this moment has shown so far, None before it began."""
        if self.current is not None and self.current.plan.case == case:
            return self.current.result()
        return self._last if self._last is not None and self._last.case == case else None

    def against_baseline(self, case: Case) -> compare.Comparison | None:
        """Compare a case with the baseline; None if that has no such case."""
        now = self.shown(case)
        found = compare.compare(self._baseline, [now], self.options.gate).pairs[:1] if now else ()
        if not found or found[0].before is None:
            return None
        return compare.Comparison(pairs=found, limits=dict(self.options.gate))

    def resumed(self) -> str | None:
        """Say what was kept and why the rest was run; None without --resume."""
        return resume.describe_kept(len(self.kept), self._again, self._references.reloaded) if self.options.resume else None

    def disturbed(self) -> str | None:
        """Say what took time from the cases that were run, and what to do; None if nothing did."""
        return interference.advice(self._windows)

    def _record(self, result: Result) -> None:
        self._windows.append(result.interference)
        self._last, self._recorded = result, self._recorded + 1
        self.store.append(result)
        self.added = self._recorded
        if self.on_result is not None:
            self.on_result(result)

    def render(self) -> Path | None:
        """Write the page from everything in the store, and what it could not take, if this run came to any case.

        What a search proposes beyond the cases is a result as well, one that was planned and not run.
        """
        if self._last is None:
            return None
        for one in self._matrix.proposed() if self._subset is None and not self.interrupted else ():
            with suppress(StoreError):  # the page has it, and what was measured is safe or was told of
                self._record(case_result.not_run(one, self.case_model(one.case), self.context, selection.SEARCH))
        results, self.problems = self.store.read()
        results += self.store.unwritten
        self.added = self._recorded - len(self.store.unwritten)
        page.write(self.html, page.render(results, problems=[str(problem) for problem in self.problems]))
        self.page = self.html
        return self.page

    def close(self) -> None:
        """End what still runs, and remove what the run left on the disk."""
        if "context" in self.__dict__ and self.context.gpus is not None:
            self.context.gpus.close()
        if "_scratch" in self.__dict__:
            forkserver.cool_down(self._scratch.path)
            self._scratch.remove()


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


def may_calibrate(options: Options) -> bool:
    """Say whether a run may measure the processor first: not one that goes on with another, nor a hasty one."""
    return bool(options.calibrate == "once" and not options.resume and options.case_timeout >= LEAST_LIMIT_S)
