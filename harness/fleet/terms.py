"""From a fleet file and the options of a run to the terms of a contract: each class gets the cases that pytest would run there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from harness.core.errors import UsageError
from harness.core.records import Case
from harness.fleet.conformity import PINNED
from harness.fleet.contract import MAP, Contract, Expected, MachineClass, Terms, Words, digest_of, utc
from harness.fleet.fleet_file import ANY, Fleet
from harness.machine import gpus, probe
from harness.results.store import Store
from harness.run.cases import CaseMatrix, asked_map
from harness.run.model_set import ModelSet
from harness.run.options import Options


def agree(fleet: Fleet, asked: Words, attempts: int, now: datetime | None = None) -> Contract:
    """Make a contract over the classes of a fleet; no shard is handed out yet.

    Raises:
        UsageError, CheckpointError: an option, or a model that cannot be found; two machines could not tell what is meant.
    """
    options = Options(given={name.replace("-", "_"): value for name, value in asked.items()})
    models = ModelSet(options.model, synthetic=options.weights == "synthetic", trust=bool(options.trust_remote_code))
    if models.faults:
        raise UsageError(next(iter(models.faults.values())))
    if len(models.sources) < len(options.model):
        raise UsageError(f"--model {' '.join(options.model)}: two of these are one model; name it once")
    device_map = asked_map(options)
    if device_map is not None:  # the file is here alone
        asked = {**asked, MAP: msgspec.json.encode(device_map).decode()}
    cases = [
        Expected(machine_class=kind.name, case=case)
        for kind in fleet.classes
        for case in _cases_of(kind, options, models, device_map)
    ]
    terms = Terms(
        made_at=utc(now or datetime.now(timezone.utc)),
        classes=fleet.classes,
        cases=tuple(cases),
        models=dict(zip(models.sources, options.model, strict=True)),
        options={name: value for name, value in asked.items() if name != "model"},
        versions=_versions(fleet.versions),
        attempts=attempts,
        case_timeout_s=options.case_timeout,
        faults=fleet.faults,
    )
    return Contract(digest=digest_of(terms), terms=terms)


def _cases_of(kind: MachineClass, options: Options, models: ModelSet, device_map: Mapping[str, str | int] | None) -> list[Case]:
    """Return what `pytest cases/` would run on a machine of this class."""
    machine = gpus.profile(kind.gpus, kind.ram_bytes)
    return CaseMatrix(options, models, lambda: machine, Store(Path()), device_map).cases()


def _versions(asked: Mapping[str, str]) -> dict[str, str]:
    """Return the versions that all machines must have: those here, unless the fleet file says another or that any will do."""
    here = probe.versions()
    wanted = {name: here[name] for name in PINNED if name in here} | dict(asked)
    return {name: version for name, version in wanted.items() if version != ANY}
