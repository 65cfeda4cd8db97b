"""The cases of a run: which there are, what each is planned to need, and the command that runs one alone."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harness.catalog import download
from harness.catalog.resolve import Source
from harness.core import precisions
from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.placements import FILE, PLACEMENTS, distinct, named
from harness.core.precisions import PRECISIONS
from harness.core.progress import Report
from harness.core.records import USUAL_KV, Case, Machine, Plan, Result, Verdict, Workload
from harness.core.units import exact_size
from harness.machine import probe
from harness.measure.beacon import NO_OUTLOOK, Outlook
from harness.planning import feasibility, verdict
from harness.planning.calibrating import kept_calibration
from harness.planning.calibration import Calibration
from harness.planning.choice.recommend import advise_usual
from harness.planning.device_map import user_map
from harness.planning.device_map.infer import Device
from harness.planning.outlook import kv_growth, lighter
from harness.planning.planner import Planner
from harness.planning.quality import known_quality
from harness.results.store import Store
from harness.run import forkserver
from harness.run.model_set import ModelSet
from harness.run.options import Options

_NAMES_WAYS = ("precision", "placement", "kv", "attention", "device_map")
RUNNABLE = (Verdict.FITS, Verdict.TIGHT, Verdict.UNKNOWN)

_Limits = tuple[str, int | None, int | None]  # what the files go by, VRAM, RAM


class CaseMatrix:
    """Model x precision x placement x size of GPU as the options ask for it, and the plan of each case."""

    def __init__(
        self,
        options: Options,
        models: ModelSet,
        machine: Callable[[], Machine],
        store: Store,
        device_map: Mapping[str, Device] | None,
    ) -> None:
        """Cross what the options name; `device_map` is that of `--device-map`, and results in `store` correct the estimates.

        `machine` is called once, when something depends on what is here.
        """
        self._options, self._models, self._probe, self._store = options, models, machine, store
        self._device_map = device_map
        self._plans: dict[str, Plan] = {}
        self._planners: dict[_Limits, Planner] = {}

    @cached_property
    def _machine(self) -> Machine:
        return self._probe()

    def cases(self) -> list[Case]:
        """Return the cases in the order they run: the widest precision first, as reference."""
        options = self._options
        return [
            Case(
                model=name,
                precision=precision,
                placement=placement,
                workload=self._workload,
                vram_bytes=vram,
                ram_bytes=options.ram,
                kv=kv,
                attention=attention,
            )
            for name in self._models.sources
            for precision in self._precisions(name)
            for placement in self._placements
            for vram in (("gpu" in PLACEMENTS[placement].devices and options.vram) or (None,))
            for kv in _in_order(options.kv, KV_FORMS)
            for attention in _in_order(options.attention, ATTENTIONS) or (None,)
        ]

    @cached_property
    def _workload(self) -> Workload:
        asked = self._options
        return Workload(prompt_tokens=asked.prompt_tokens, new_tokens=asked.new_tokens, batch=asked.batch, repeats=asked.repeats)

    @cached_property
    def _placements(self) -> list[str]:
        """The placements asked for; unless the user named them, without those that are the same as another here."""
        return named(named_placements(self._options), self._device_map is not None) or distinct(PLACEMENTS, len(self._machine.gpus))

    def _precisions(self, model: str) -> list[str]:
        """Return the precisions asked for; unless the user named them, the usual ones, or what a quantized checkpoint is."""
        if "precision" in self._options.origin:
            return _in_order(self._options.precision, PRECISIONS)
        if model in self._models.faults:
            return precisions.defaults(None)
        return precisions.defaults(download.stored_as(self._models.sources[model]))

    def may_run(self, case: Case) -> bool:
        """Say whether a model is worth fetching for a case; whether packed weights need a package is decided by the files."""
        here = PRECISIONS[case.precision].requires_checkpoint is None
        return feasibility.gate(case, self._machine, here=here) is None

    def check_model(self, model: str) -> None:
        """Read the spec of a model that is fetched, and check the map of `--device-map` against it, if there is one.

        Raises:
            CheckpointError: nothing here loads the model.
            UsageError: the map does not place this model on the devices of this machine.
        """
        spec = self._models.spec(model)
        if self._device_map is not None:
            user_map.check_map(self._device_map, spec.skeleton, len(self._machine.gpus), model=model)

    def plan(self, case: Case) -> Plan:
        """Plan one case, and with the first of a model all that share its limits: what is too big names one that fits."""
        files = self.files_of(case)
        fault = self._models.faults.get(files)
        if fault is not None:
            return Plan(case=case, verdict=Verdict.UNAVAILABLE, why=fault)
        if not self._models.fetched(files):
            return feasibility.decide(case, probe.limited(self._machine, case), None)
        if case.id not in self._plans:
            cases = [one for one in self.cases() if self._limits(one) == self._limits(case)]
            planner = self._planner(case)
            for one in map(_only_planned, planner.plans(cases or [case])):
                self._plans[one.case.id] = planner.made_up(one) if one.verdict in RUNNABLE else one
        return self._plans[case.id]

    def trace(self, asked: Iterable[Case], report: Report) -> list[str]:
        """Have a worker trace what these cases allocate on GPUs, where no record says it; return why some cannot be traced."""
        by_limits: dict[_Limits, list[Case]] = defaultdict(list)
        for case in asked:
            by_limits[self._limits(case)].append(case)
        said = []
        for cases in by_limits.values():
            planner = self._planner(cases[0])
            said += planner.trace(planner.untraced(cases), report)
        return list(dict.fromkeys(said))

    def outlook(self, case: Case) -> Outlook:
        """Return what the plan of a case says to who watches it run; nothing of one that has no figures."""
        one = self.plan(case)
        if one.estimate is None or not self._models.fetched(self.files_of(case)):
            return NO_OUTLOOK
        planner = self._planner(case)
        footprint, context = planner.footprints.get(case.id), planner.spec.context_length
        others = [self._plans[other.id] for other in self.cases() if other.id in self._plans]
        kv = kv_growth(footprint, context) if footprint else {}
        return Outlook(kv=kv, lighter=lighter(one, others), context_length=context)

    def proposed(self) -> list[Plan]:
        """Search each model that is here for the best way under each of its limits; return those that are none of the cases.

        It is what `fitmatrix plan` answers first, by all that is measured by now; nothing where ways of loading were named.
        """
        if any(name in self._options.origin for name in _NAMES_WAYS):
            return []
        known = self._store.read()[0]
        models = [name for name in self._models.sources if self._models.fetched(name)]
        found = [self._search(name, vram, known) for name in models for vram in self._options.vram or (None,)]
        plans = {one.case.id: one for one in found if one is not None}
        self._plans |= plans
        return list(plans.values())

    def _search(self, model: str, vram: int | None, known: Sequence[Result]) -> Plan | None:
        """Return the best way of loading a model with so much of each GPU, None if it is among the cases or nothing fits."""
        usual = [replace(case, vram_bytes=None, ram_bytes=None) for case in self.cases() if case.model == model]
        within = Case(
            model=model, precision="", placement="", workload=self._workload, vram_bytes=vram, ram_bytes=self._options.ram
        )
        spec, trust = self._models.spec(model), bool(self._options.trust_remote_code)
        constants = kept_calibration.corrected(known, self._machine)
        planner = Planner(spec, probe.limited(self._machine, within), constants=constants, trust=trust)
        planner.known_quality = known_quality(spec, known)
        found = advise_usual(self._models.sources[model], planner, list(dict.fromkeys(usual)))
        if found.best is None or not found.is_found:
            return None
        on_gpu = "gpu" in PLACEMENTS[found.best.case.placement].devices
        limits = {"vram_bytes": vram if on_gpu else None, "ram_bytes": self._options.ram}
        return planner.plan(replace(found.best.case, **limits))

    def _planner(self, case: Case) -> Planner:
        """Return the planner of all cases that share a model and limits."""
        limits = self._limits(case)
        if limits not in self._planners:
            here, spec = probe.limited(self._machine, case), self._models.spec(limits[0])
            trust = bool(self._options.trust_remote_code)
            planner = Planner(spec, here, constants=self._calibration, trust=trust, device_map=self._device_map)
            self._planners[limits] = planner
        return self._planners[limits]

    def files_of(self, case: Case) -> str:
        """Return what the files of a case go by in the set of models."""
        return self._models.files_of(case.model, case.precision)

    def _limits(self, case: Case) -> _Limits:
        return self.files_of(case), case.vram_bytes, case.ram_bytes

    @cached_property
    def _calibration(self) -> Calibration:
        """The constants, corrected by what was calibrated here and by what earlier runs on this machine left in the store."""
        return kept_calibration.corrected(self._store.read()[0], self._machine)


def asked_map(options: Options) -> dict[str, Device] | None:
    """Return the device map of `--device-map`, None if there is none. Raises UsageError: it cannot be read, or is missed."""
    return user_map.asked(options.device_map, named_placements(options))


def named_placements(options: Options) -> Sequence[str] | None:
    """Return the placements that the user named, None if the default applies."""
    return options.placement if "placement" in options.origin else None


def _in_order(names: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    return [name for name in table if name in names]


def _only_planned(one: Plan) -> Plan:
    """Make a plan that takes several processes unavailable if a worker cannot be forked into them."""
    parallel = PLACEMENTS[one.case.placement].parallel
    if not parallel or forkserver.METHOD == "forkserver" or one.verdict not in (*RUNNABLE, Verdict.TOO_BIG):
        return one
    why = "processes that share a model are measured on Linux alone: run the code that fitmatrix plan --code prints, by torchrun"
    return replace(one, verdict=Verdict.UNAVAILABLE, why=why, code=None)


def with_free_disk(decided: Plan, free_bytes: int) -> Plan:
    """Plan again with what is free now for offloaded weights: models were fetched since the probe, and others write as well."""
    short = verdict.short_of_disk(decided.estimate, free_bytes)
    if short is None or decided.verdict not in RUNNABLE:
        return decided
    return replace(decided, verdict=Verdict.TOO_BIG, why=short)


def command_of(case: Case, source: Source, options: Options) -> str:
    """Return the command that runs a case of this run alone."""
    words = ["pytest", "cases/", "--model", typed(source), "--precision", case.precision, "--placement", case.placement]
    words += ["--device-map", _relative(options.device_map)] if case.placement == FILE else []
    words += ["--kv", case.kv] if case.kv != USUAL_KV else []
    words += ["--attention", case.attention] if case.attention else []
    limits = (("--vram", case.vram_bytes), ("--ram", case.ram_bytes))
    words += [word for flag, size in limits if size is not None for word in (flag, exact_size(size))]
    return f"{shlex.join(words)} {options.command()}".strip()


def typed(source: Source) -> str:
    """Write the model for a command: a directory relative to the current one, or by its name alone if its path would be private."""
    place = Path(source.location) / (source.file or "")
    return source.name if not source.is_local else _relative(place, source.name)


def _relative(place: Path, otherwise: str | None = None) -> str:
    """Write a path relative to the current directory; outside of it, `otherwise` or the path's name, which reveal no folder."""
    place = place.absolute()
    if not place.is_relative_to(Path.cwd()):
        return place.name if otherwise is None else otherwise
    return f"./{place.relative_to(Path.cwd())}"
