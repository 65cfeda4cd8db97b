"""`fitmatrix calibrate [RESULTS...]`: correct the constants of the estimates by what was measured here, and keep that.

Without results it measures: the cases of a small model of random weights, as every case is measured, until its minute is over, and
layers whose weights are stored packed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.options import add_options
from harness.core.errors import UsageError
from harness.core.options import RESULTS
from harness.core.text import plural, print_note
from harness.report.terminal import output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from harness.core.records import Machine, Result
    from harness.planning.calibrating.evidence import Observation
    from harness.planning.calibrating.fit import Fit

CALIBRATE_SCHEMA = 1
_MEASURE = "measure some: fitmatrix calibrate --measure, or pytest cases/ --model MODEL"
# Large enough that tokens wait for memory, small enough that six cases end within a minute.
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
SECONDS = 60.0
_PRECISIONS = ("bf16", "int4", "int8", "fp32", "fp16")  # in the order of how many ask for them
_LOAD = {"prompt_tokens": 64, "new_tokens": 24, "batch": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    text = f"directories or files of results, of which those of this machine count (default: {RESULTS}, or what is measured)"
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help=text)
    add_options(parser, "calibrate", "measure", "dry-run", "reset", "json")


def run(args: argparse.Namespace) -> int:
    """Fit the constants, show them, and keep what they were fitted to.

    Raises:
        UsageError, StoreError: there is nothing to calibrate by, or a file cannot be read or written; exit status 2.
    """
    from harness.machine import accelerators, probe, signals

    machine = accelerators.usable(probe.probe(), ask=False)
    if args.reset:
        return _reset(args, machine)
    from harness.planning import calibration
    from harness.planning.calibrating import fit, kept_calibration

    if args.measure or not (args.results or RESULTS.exists()):
        measured = _measured()
        machine = measured[0].machine if measured else machine
        found = [*_said(measured, machine, f"what was measured of {MODEL}"), *_packed(machine)]
    else:
        found = _evidence(args.results or [RESULTS], machine)
    kept = kept_calibration.kept_evidence(machine)
    if kept is not None and kept.digest == calibration.default().digest:
        found = list({(one.result, one.figure): one for one in (*kept.observations, *found)}.values())
    fitted = fit.fit_constants(calibration.default(), found)
    if not args.dry_run:
        with signals.deferred():
            kept_calibration.keep_evidence(machine, found)
            args.kept = "what was measured is kept, and plans go by it"
    if args.json:
        output.print_json(_as_json(fitted, machine, kept=not args.dry_run))
    else:
        _show(fitted, machine, found, kept=not args.dry_run)
    return 0


def _reset(args: argparse.Namespace, machine: Machine) -> int:
    from harness.machine import signals
    from harness.planning.calibrating import kept_calibration

    if args.results or args.dry_run or args.measure:
        raise UsageError(
            "--reset forgets what was kept, and takes neither RESULTS nor --dry-run nor --measure: drop those, or --reset"
        )
    with signals.deferred():
        had = kept_calibration.forget(machine)
        args.kept = "what was kept for this machine is forgotten"
    print("Forgotten: plans rest on the constants of the package." if had else "Nothing was kept for this machine.")
    return 0


def _evidence(places: Sequence[Path], machine: Machine) -> list[Observation]:
    """Read what results of this machine say.

    Raises:
        UsageError: they say nothing, and why.
    """
    from harness.results import store

    results = [result for place in places for result in store.read_telling(store.file_of(place), print_note)]
    return _said(results, machine, ", ".join(map(str, places)))


def _said(results: Sequence[Result], machine: Machine, where: str) -> list[Observation]:
    from harness.planning import calibration
    from harness.planning.calibrating import evidence

    found = evidence.observations(results, calibration.default().digest, machine)
    if not found:
        raise UsageError(f"nothing to calibrate by in {where}: {_why_nothing(results, machine)}; {_MEASURE}")
    return found


def _measured() -> list[Result]:
    """Measure the small model in every precision that works here, the most common first, for as long as a minute lasts."""
    import time
    from tempfile import TemporaryDirectory

    from harness.run import min_ram
    from harness.run.options import Options
    from harness.run.session import Session

    asked = {"model": [MODEL], "weights": "synthetic", "precision": _PRECISIONS, "placement": ["cpu", "direct"], **_LOAD}
    found: list[Result] = []
    with TemporaryDirectory(prefix="fitmatrix-") as nothing_kept:
        session = Session(Options(given={**asked, "results": nothing_kept}))
        try:
            session.prepare(asked_for := session.cases())
            cases = [case for case in asked_for if session.plan(case).verdict.is_good]
            cases.sort(key=lambda case: _PRECISIONS.index(case.precision))
            begun = time.monotonic()
            for number, case in enumerate(cases, 1):
                print_note(f"measuring {number} of {len(cases)}: {case.id}", name="")
                found.append(min_ram.measure(session, case))
                spent = time.monotonic() - begun
                if spent + spent / number > SECONDS and number < len(cases):
                    print_note(f"left out, for the minute is over: {', '.join(one.id for one in cases[number:])}", name="")
                    break
        finally:
            session.close()
    return found


def _packed(machine: Machine) -> list[Observation]:
    """Time the layers of this package whose weights are stored packed, which no small model has; nothing where that fails."""
    from harness.planning.calibrating import packed_times

    print_note("measuring layers whose weights are stored packed", name="")
    try:
        return packed_times.time_packed(machine)
    except UsageError as error:  # the cases say enough without them
        print_note(str(error), name="")
        return []


def _why_nothing(results: Sequence[Result], machine: Machine) -> str:
    from harness.core.records import Outcome
    from harness.planning import calibration
    from harness.planning.calibrating import evidence

    if not results:
        return "no results"
    here = [result for result in results if evidence.is_same(result.machine, machine)]
    ended = [result for result in here if result.outcome is Outcome.OK]
    digest = calibration.default().digest
    same = [result for result in ended if result.estimate and result.estimate.constants == digest and result.estimate.makeup]
    steps = (
        (here, f"of {plural(len(results), 'result')} none is of this machine"),
        (ended, f"none of {plural(len(here), 'result')} ran to its end"),
        (same, f"none of {plural(len(ended), 'result')} was estimated by this version of the constants"),
    )
    return next((why for left, why in steps if not left), "what ran was under a limit on RAM, or lay elsewhere than was estimated")


def _as_json(fitted: Fit, machine: Machine, *, kept: bool) -> dict[str, Any]:
    from msgspec.structs import asdict

    from harness.planning import calibration

    base, now = calibration.default(), fitted.calibration
    return {
        "schema": CALIBRATE_SCHEMA,
        "machine": machine.name,
        "kept": kept,
        "figures": len(fitted.groups),
        "median_error_before": _error(fitted.before),
        "median_error_after": _error(fitted.after),
        "constants": {name: {"package": base[name], "here": now[name], **asdict(one)} for name, one in now.fitted.items()},
        "contradicting": [f"{group.case} {group.figure}" for group in fitted.contradicting],
    }


def _error(ratios: Sequence[float]) -> float:
    """Return the median of how far figures lay from their estimates, as a factor less one."""
    from statistics import median

    return median(max(ratio, 1 / ratio) - 1 for ratio in ratios)


def _show(fitted: Fit, machine: Machine, found: Sequence[Observation], *, kept: bool) -> None:
    from harness.planning.calibrating import kept_calibration
    from harness.report.terminal import tables

    results, figures = plural(len({one.result for one in found}), "result"), plural(len(fitted.groups), "figure")
    parts: list[RenderableType] = [tables.title(f"{machine.name}: {results}, {figures}"), tables.facts(_constants(fitted))]
    before, after = (f"{100 * _error(ratios):.0f} %" for ratios in (fitted.before, fitted.after))
    parts.append(tables.said(f"Half of the estimates of these figures were off by {before} or more, and are by {after} now."))
    if fitted.contradicting:
        named = "; ".join(f"{group.case} {group.figure}" for group in fitted.contradicting[:4])
        count = f"{len(fitted.contradicting)} of {figures}"
        parts.append(tables.said(f"Far from what the others say, and of little weight: {count}: {named}."))
    where = f"Kept in {kept_calibration.kept_file()}: fitmatrix plan and runs use it, --reset forgets it."
    parts.append(tables.said(where if kept else "Nothing was kept: without --dry-run it would be."))
    tables.show(*parts)


def _constants(fitted: Fit) -> Iterator[tuple[str, str]]:
    """Yield each constant that is corrected: what it is here, with its interval, of the package, and by how many results."""
    from harness.planning import calibration

    base, now = calibration.default(), fitted.calibration
    for name, one in now.fitted.items():
        here, cases = now[name], plural(one.cases, "case")
        said = f"{here.best:.3g}, {here.low:.3g} to {here.high:.3g}; of the package {base[name].best:.3g}"
        yield name, f"{said}; {plural(one.results, 'result')}, {cases}"
