"""One run from end to end: probe the machine, plan the cases, run them, append the results, render the page."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import blueprint, calibration, catalog, checkpoint, machine, plan, process, runner
from harness.blueprint import Blueprint
from harness.calibration import Calibration
from harness.case import Case, Machine, Plan, Result, Verdict, Workload
from harness.catalog import Source
from harness.errors import UsageError
from harness.meters import Gpus
from harness.options import Options
from harness.placement import PLACEMENTS, distinct
from harness.planner import Planner
from harness.precision import PRECISIONS
from harness.process import WorkerMain
from harness.quality import Reference, reference_of
from harness.report import page
from harness.runner import LiveLine, Run, Setting, Subject
from harness.store import Store

_RUNNABLE = (Verdict.FITS, Verdict.TIGHT, Verdict.UNKNOWN)


class Session:
    """All state of a run. The plugin asks it, and it asks everything else."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sources = _resolved(options.model)
        self.results: list[Result] = []
        self.store = Store(options.results)
        self.html = options.html or options.results / "index.html"
        self.on_sample: LiveLine | None = None
        self.worker_main: WorkerMain | None = None
        self.page: Path | None = None
        self.current: Run | None = None
        self.interrupted = False
        self.run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self._locations: dict[str, Path] = {}
        self._checkpoints: dict[str, checkpoint.Checkpoint] = {}
        self._blueprints: dict[str, Blueprint] = {}
        self._plans: dict[str, Plan] = {}
        self._references: dict[str, tuple[Reference, Path]] = {}

    @cached_property
    def machine(self) -> Machine:
        """This machine, probed once."""
        return machine.probe(scratch=Path(self._scratch.name))

    @cached_property
    def _scratch(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="fitmatrix-", ignore_cleanup_errors=True)

    @cached_property
    def setting(self) -> Setting:
        """What all cases share."""
        gpus = Gpus() if self.machine.gpus else None
        return Setting(
            run=self.run_id,
            machine=self.machine,
            environment=machine.versions(),
            scratch=Path(self._scratch.name),
            worker_main=self.worker_main or process.torch_worker,
            timeout_s=self.options.case_timeout,
            gpus=gpus,
            on_sample=self.on_sample,
        )

    def cases(self) -> list[Case]:
        """Return model x precision x placement in the order they run: the widest precision first, as the reference."""
        load = Workload(
            prompt_tokens=self.options.prompt_tokens,
            new_tokens=self.options.new_tokens,
            batch=self.options.batch,
            repeats=self.options.repeats,
        )
        return [
            Case(model=name, precision=precision, placement=placement, workload=load)
            for name in self.sources
            for precision in self._precisions(name)
            for placement in self._placements
        ]

    @cached_property
    def _placements(self) -> list[str]:
        """The placements asked for; unless the user named them, without those that are the same as another here."""
        wanted = _in_order(self.options.placement, PLACEMENTS)
        return wanted if "placement" in self.options.origin else distinct(wanted, bool(self.machine.gpus))

    def _precisions(self, model: str) -> list[str]:
        """Return the precisions asked for; unless the user named them, without those that need a checkpoint of another format."""
        wanted = _in_order(self.options.precision, PRECISIONS)
        if "precision" in self.options.origin:
            return wanted
        stored = catalog.stored_format(self.sources[model]) or "safetensors"
        return [name for name in wanted if PRECISIONS[name].holds_format(stored)]

    def prepare(self, cases: Sequence[Case]) -> None:
        """Have everything at hand that the cases need, before the first is measured: store, models, worker.

        Raises:
            UsageError, CheckpointError, StoreError: something is missing; nothing was measured.
        """
        self.store.prepare()
        _prepare_page(self.html)
        runnable = sorted({case.model for case in cases if plan.gate(case, self.machine) is None})
        with catalog.show_progress() as progress:
            for name in runnable:
                self._locations[name] = catalog.fetch(self.sources[name], progress=progress)
        for name in runnable:
            self._checkpoints[name] = checkpoint.read(self._locations[name] / (self.sources[name].file or ""))
        if self.worker_main is None and runnable:
            process.warm_up(sorted({_modeling_module(self._checkpoints[name]) for name in runnable}))
        for name in runnable:
            self._blueprint(name)

    def plan(self, case: Case) -> Plan:
        """Plan one case, and with the first of a model all of its cases: what is too big names one that fits."""
        read = self._checkpoints.get(case.model)
        if read is None:
            return plan.decide(case, self.machine, None)
        if case.id not in self._plans:
            cases = [one for one in self.cases() if one.model == case.model]
            made = Planner(self._blueprint(case.model), self.machine, constants=self._calibration).plans(cases)
            self._plans |= {one.case.id: one for one in made}
        return self._plans[case.id]

    def _blueprint(self, name: str) -> Blueprint:
        """Draw the blueprint of a model that is here, once; an architecture that is new takes transformers some seconds."""
        if name not in self._blueprints:
            read, location = self._checkpoints[name], self._locations[name]
            self._blueprints[name] = blueprint.of_checkpoint(name, self.sources[name].location, read, location)
        return self._blueprints[name]

    @cached_property
    def _calibration(self) -> Calibration:
        """The constants, corrected by what earlier runs on this machine left in the store."""
        return calibration.correct(self.store.read()[0], self.machine)

    def subject(self, case: Case) -> Subject:
        """Return the model of a case and what its predictions are compared with."""
        source = self.sources[case.model]
        reference = self._references.get(case.model)
        location, drawn = self._locations.get(case.model, Path(source.location)), self._blueprints.get(case.model)
        return Subject(
            location=location,
            tokenizer=drawn.tokenizer if drawn else False,
            gguf_file=drawn.gguf_file if drawn else None,
            code_head=plan.code_head(source, case.placement),
            command=self._command(case),
            reference=reference[0] if reference else None,
            reference_file=reference[1] if reference else None,
            keep_file=None if reference else Path(self._scratch.name) / f"reference-{len(self._references)}.npy",
        )

    def _command(self, case: Case) -> str:
        model = _sayable(self.sources[case.model])
        words = ["pytest", "cases/", "--model", model, "--precision", case.precision, "--placement", case.placement]
        return f"{shlex.join(words)} {self.options.command()}".strip()

    def start(self, decided: Plan) -> Run | None:
        """Start a case, or record why it is not run and return None."""
        if decided.verdict in _RUNNABLE or (self.options.run_all and decided.code is not None):
            self.current = Run(decided, self.subject(decided.case), self.setting)
            return self.current
        self._record(runner.not_run(decided, self.subject(decided.case), self.setting))
        return None

    def finish(self, run: Run) -> Result:
        """End a case and append its result; one that the user interrupted leaves none, so that an older result stays the newest."""
        result = run.finish()
        if self.interrupted:
            return result
        kept = run.subject.keep_file
        if kept is not None and (reference := reference_of(result)) is not None:
            self._references[result.case.model] = (reference, kept)
        self._record(result)
        return result

    def shown(self, case: Case) -> Result | None:
        """Return what a case has shown so far, None before it began."""
        if self.current is not None and self.current.plan.case == case:
            return self.current.result()
        return next((result for result in reversed(self.results) if result.case == case), None)

    def _record(self, result: Result) -> None:
        self.store.append(result)
        self.results.append(result)

    def render(self) -> Path | None:
        """Write the page from everything in the store, if this run added to it."""
        if not self.results:
            return None
        results, problems = self.store.read()
        page.write(self.html, page.render(results, problems=[str(problem) for problem in problems]))
        self.page = self.html
        return self.page

    def close(self) -> None:
        """Remove what the run left on the disk; the fork server ends with this process."""
        if "setting" in self.__dict__ and self.setting.gpus is not None:
            self.setting.gpus.close()
        if "_scratch" in self.__dict__:
            self._scratch.cleanup()


def _resolved(models: Sequence[str]) -> dict[str, Source]:
    """Resolve models to sources by name; two directories of one name could not be told apart in the results."""
    sources: dict[str, Source] = {}
    for source in map(catalog.resolve, models):
        other = sources.setdefault(source.name, source)
        if other.location != source.location:
            raise UsageError(f"two models are called {source.name!r}: {other.location} and {source.location}; rename a directory")
    return sources


def _sayable(source: Source) -> str:
    """Write the model for a command: a directory as seen from here, or by its name alone where that would name others."""
    place = Path(source.location) / (source.file or "")
    if source.kind != "directory" or not place.is_relative_to(Path.cwd()):
        return source.name
    return f"./{place.relative_to(Path.cwd())}"


def _in_order(names: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    return [name for name in table if name in names]


def _modeling_module(read: checkpoint.Checkpoint) -> str:
    """Name transformers' module of the model's classes, which the first from_pretrained would import."""
    kind = str(read.config.get("model_type", "")).replace("-", "_")
    return f"transformers.models.{kind}.modeling_{kind}"


def _prepare_page(path: Path) -> None:
    """Make the page's directory before anything is measured.

    Raises:
        UsageError: the page could not be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--html {path}: its directory cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise UsageError(f"--html {path} is a directory; name a file, such as {path / 'index.html'}")
