"""`fitmatrix fleet bisect --package NAME --good VERSION --bad VERSION --case ID`: which release of a package changed a case."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.fleet.case_files import add_case_files, read_case_files
from harness.cli.options import add_options, typed_options
from harness.cli.plan_args import asked_case
from harness.core.errors import UsageError
from harness.core.records import USUAL_KV
from harness.core.text import print_note
from harness.report.terminal import output

if TYPE_CHECKING:
    from harness.fleet.bisect.releases import ReleaseRange
    from harness.fleet.bisect.search import BisectAnswer

HELP = "Find the release of a package that changed memory, load, speed or quality of a case, or whether it works."
BISECT_SCHEMA = 1
FOUND, OPEN = 0, 1

OF_THE_CASE = (
    "model", "weights", "prompt-tokens", "new-tokens", "batch", "repeats", "case-timeout", "phase-timeout", "trust-remote-code",
    "run-all",
)  # fmt: skip
_LIMIT = re.compile(r"@(vram|ram)([0-9][^@]*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--package", required=True, metavar="NAME", help="package whose releases are tried, e.g. transformers")
    parser.add_argument("--good", required=True, metavar="VERSION", help="release with which the case is as it should be")
    parser.add_argument("--bad", required=True, metavar="VERSION", help="release with which it is not; it may be the older one")
    parser.add_argument("--case", required=True, metavar="ID", help="the case, MODEL/bf16/cpu, or bf16/cpu with --model")
    parser.add_argument(
        "--figure", metavar="NAME", help="what to follow, e.g. ram_needed_bytes, or end (default: the first that changed)"
    )
    parser.add_argument(
        "--find-links", type=Path, metavar="DIR", help="take the releases from the wheels in DIR (default: pip's index)"
    )
    add_case_files(parser)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("fitmatrix-bisect"),
        metavar="DIR",
        help="keep results here, a directory for each release, and go on with what is there (default fitmatrix-bisect)",
    )
    add_options(parser, "fleet", *OF_THE_CASE, "json")


def run(given: argparse.Namespace) -> int:
    """Search and show what was found. Returns 1 if nothing changed, or if only a range of releases is known; 130 after Ctrl-C.

    Raises:
        UsageError, OSError: the question cannot be answered: no such release, package or case, or an end does not run.
    """
    from harness.fleet import lease
    from harness.fleet.bisect import kept, releases
    from harness.fleet.bisect.overlay import uv_program
    from harness.fleet.bisect.search import Bisection, known_figure
    from harness.fleet.conformity import PINNED
    from harness.machine import probe, signals
    from harness.results.compare import thresholds
    from harness.run.options import read_config

    words, figure, status = tuple(_words(given)), known_figure(given.figure), 0
    limits = thresholds(read_config(Path.cwd()).get("gate", {}))
    files = read_case_files(given.cases)
    uv_program()
    found = releases.releases_between(given.package, given.good, given.bad, given.find_links)
    versions = {name: version for name, version in probe.versions().items() if name in PINNED and name != given.package}
    with lease.leased(f"bisect of {given.package}"):
        question = kept.BisectQuestion(package=given.package, words=words, versions=versions)
        measured = kept.Measurements(question, given.results, files, given.find_links)
        search = Bisection(found.releases, measured.measure, limits, figure, _tell)
        try:
            answer = search.run()
        except KeyboardInterrupt as stop:
            signals.say_stopped("what was measured is kept, and the same command goes on from there")
            answer, status = search.answer(), signals.exit_status(stop)
    if given.json:
        output.print_json({"schema": BISECT_SCHEMA, "package": given.package, "left_out": found.left_out, "answer": answer})
    else:
        _show(given.package, found, answer)
    return status or (FOUND if answer.is_exact else OPEN)


def _words(given: argparse.Namespace) -> Iterator[str]:
    """Yield the options of `pytest cases/` that run the case alone."""
    text = _LIMIT.sub("", given.case)
    asked = asked_case(text)
    named = text.rpartition("/")[0].rpartition("/")[0]
    if named and given.model:
        raise UsageError(f"--case {given.case} names a model, and --model {given.model[0]} too: leave one out")
    if len(given.model or ()) > 1:
        raise UsageError(f"--model {' '.join(given.model)}: one case is of one model; name one")
    model = named or next(iter(given.model or ()), "")
    if model:
        yield from ("--model", str(Path(model).resolve()) if Path(model).exists() else model)
    yield from ("--precision", asked.precision, "--placement", asked.placement)
    if asked.kv not in (None, USUAL_KV):
        yield from ("--kv", str(asked.kv))
    if asked.attention:
        yield from ("--attention", asked.attention)
    for kind, size in _LIMIT.findall(given.case):
        yield from (f"--{kind}", size)
    yield from shlex.split(typed_options(given, *(name for name in OF_THE_CASE if name != "model")))


def _tell(said: str) -> None:
    print_note(said, name="")


def _show(package: str, found: ReleaseRange, answer: BisectAnswer) -> None:
    """Print the releases that were tried, each with the figure, its change and its side, and between which it changed."""
    from harness.core.metrics import METRICS, format_metric
    from harness.core.text import plural
    from harness.report.terminal import tables
    from harness.results.compare import signed

    heading = METRICS[answer.figure].label if answer.figure is not None and answer.figure in METRICS else "case"
    table = tables.table("release", "", heading, "change")
    for one in answer.tried:
        shown = "" if one.value is None else format_metric(str(answer.figure), one.value)
        table.add_row(one.release, one.side.value, shown, "" if one.change is None else signed(one.change))
    notes = [f"{one.release} was skipped: {one.why}" for one in answer.tried if one.why]
    if found.left_out:
        notes.append(f"{plural(len(found.left_out), 'pre-release')} left out: {', '.join(found.left_out)}")
    if answer.also:
        notes.append(f"also changed: {', '.join(answer.also)} (--figure follows another; what was measured is kept)")
    tables.show(
        tables.title(f"{package}: {plural(len(found.releases), 'release')} from {found.releases[0]} to {found.releases[-1]}"),
        table,
        *map(tables.said, notes),
        tables.said(_verdict(package, answer)),
    )


def _verdict(package: str, answer: BisectAnswer) -> str:
    """Say the answer in a sentence."""
    if not answer.is_changed:
        return answer.said or "no end was measured yet"
    if answer.is_exact:
        return f"{answer.said}: changed between {package} {answer.last_good} and {answer.first_bad}"
    why = "the releases between were skipped" if answer.is_over else "not searched to the end"
    return f"{answer.said}: changed after {package} {answer.last_good} and no later than with {answer.first_bad}; {why}"
