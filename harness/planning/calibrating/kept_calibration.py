"""What `fitmatrix calibrate` keeps for this user: observations of results, by kind of machine; and the constants that follow.

The observations are kept, not the constants: with those of a directory of results they are fitted anew, each result once. A file of
another version of the constants counts for nothing, and says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from msgspec.structs import replace

from harness.core.errors import StoreError, UsageError
from harness.core.records import Machine, Record, Result
from harness.data import DATA
from harness.machine import atomic, probe
from harness.machine.cache import MOST_BYTES, cache_dir
from harness.machine.regular import read_regular
from harness.planning import calibration
from harness.planning.calibrating import evidence, fit
from harness.planning.calibrating.evidence import FIGURES, Observation
from harness.planning.calibration import Calibration

FILE_NAME = "calibration.json"
KEPT_SCHEMA = 1
_LIMIT_S = 300.0  # a minute of cases, the weights made before, and torch imported for each
_DECIDE = ("torch", "bitsandbytes", "torchao", "optimum-quanto", "gptqmodel")  # with another of these, speeds are others


class KeptEvidence(Record, frozen=True, kw_only=True):
    """The observations of one kind of machine, by the constants of `digest`, as of the day `at`, with these versions installed."""

    machine: str
    digest: str
    at: str
    observations: tuple[Observation, ...]
    versions: dict[str, str] = {}
    failed: str = ""  #: why a run that would have measured could not; it is not tried again by itself

    @property
    def results(self) -> int:
        """How many results they come from."""
        return len({one.result for one in self.observations if FIGURES[one.figure].metric})


class _File(Record, frozen=True, kw_only=True):
    """The whole file."""

    schema: int = KEPT_SCHEMA
    machines: tuple[KeptEvidence, ...] = ()


def kept_file() -> Path:
    """Return where it is kept: in the cache of this user, or FITMATRIX_CACHE."""
    return cache_dir() / FILE_NAME


def kept_evidence(machine: Machine) -> KeptEvidence | None:
    """Return what is kept for a kind of machine.

    Raises:
        StoreError: the file is damaged or of a newer version.
    """
    return next((kept for kept in _read().machines if kept.machine == evidence.machine_kind(machine)), None)


def keep_evidence(machine: Machine, observations: Iterable[Observation], failed: str = "") -> KeptEvidence:
    """Keep the observations for a kind of machine, or why there are none, instead of what was kept.

    Raises:
        StoreError: the file is damaged.
        UsageError: it cannot be written.
    """
    kept = KeptEvidence(
        machine=evidence.machine_kind(machine),
        digest=calibration.default().digest,
        at=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        observations=tuple(observations),
        versions=_versions(),
        failed=failed,
    )
    others = tuple(other for other in _read().machines if other.machine != kept.machine)
    _write(_File(machines=(*others, kept)))
    return kept


def forget(machine: Machine) -> bool:
    """Drop what is kept for a kind of machine, and a damaged file whole; say whether there was any.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        machines = _read().machines
    except StoreError:
        _write(_File())
        return True
    others = tuple(kept for kept in machines if kept.machine != evidence.machine_kind(machine))
    if len(others) == len(machines):
        return False
    _write(_File(machines=others))
    return True


def is_due(machine: Machine) -> bool:
    """Say whether nothing is kept for this machine that counts for these constants."""
    try:
        kept = kept_evidence(machine)
    except StoreError:
        return False  # plans say so, and what is there is not overwritten
    return kept is None or kept.digest != calibration.default().digest


def calibrate_once(machine: Machine, tell: Callable[[str], None]) -> None:
    """Have `fitmatrix calibrate --measure` measure this machine and keep what it finds, if nothing is kept yet.

    In a process of its own, so that nothing of it is left in this one. `tell` hears of it before, and why where nothing came of it:
    that is kept too, for what fails takes its time in every run.
    """
    if not is_due(machine):
        return
    tell("Measuring this machine once, for about a minute; --calibrate never leaves it out.")
    if not (failed := _measure()):
        return
    tell(f"Not calibrated: {failed}")
    try:
        keep_evidence(machine, (), failed)
    except (UsageError, StoreError) as error:
        tell(f"Not kept: {error}")


def _measure() -> str:
    """Measure in a process of its own; return why it could not, an empty text if it could."""
    command = [sys.executable, "-m", DATA.parent.name, "calibrate", "--measure"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False, cwd=DATA.parent.parent
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {_LIMIT_S:.0f} s"
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return said[-1].removeprefix("fitmatrix: ") if done.returncode else ""


def corrected(results: Iterable[Result], machine: Machine) -> Calibration:
    """Return the constants by what is kept for this machine and by `results`, each result once; `note` says what was kept."""
    base = calibration.default()
    note: str | None
    try:
        kept = kept_evidence(machine)
        note = _note(kept, base.digest) if kept else None
    except StoreError as error:
        kept, note = None, str(error)
    old = [one for one in kept.observations if one.is_plausible] if kept and kept.digest == base.digest else []
    found = fit.fit_constants(base, [*old, *evidence.observations(results, base.digest, machine)])
    return replace(found.calibration, note=note)


def _note(kept: KeptEvidence, digest: str) -> str:
    if kept.digest != digest:
        return f"The calibration of {kept.at} was for an earlier fitmatrix and does not count: fitmatrix calibrate makes a new one"
    if kept.failed:
        return f"Not calibrated on {kept.at}: {kept.failed}; fitmatrix calibrate measures again"
    said = f"Calibrated on {kept.at} by {kept.results} results of this machine"
    now = _versions()
    others = [f"{name} {was} (now {now.get(name, 'none')})" for name, was in kept.versions.items() if now.get(name) != was]
    return f"{said}, with {', '.join(others)}: calibrate again" if others else said


def _versions() -> dict[str, str]:
    return {name: found for name, found in probe.versions().items() if name in _DECIDE}


def _read() -> _File:
    path = kept_file()
    try:
        found = msgspec.json.decode(read_regular(path, MOST_BYTES), type=_File)
    except FileNotFoundError:
        return _File()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(path, f"does not count, for it cannot be read ({error}): fitmatrix calibrate --reset removes it") from None
    if found.schema > KEPT_SCHEMA:
        raise StoreError(path, f"does not count, for a newer fitmatrix wrote it (schema {found.schema}): update fitmatrix")
    return found


def _write(file: _File) -> None:
    try:
        atomic.write_bytes(kept_file(), msgspec.json.encode(file))
    except OSError as error:
        raise UsageError(
            f"{kept_file()} cannot be written ({error.strerror or error}): set FITMATRIX_CACHE to a directory that can"
        ) from None
