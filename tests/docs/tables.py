"""The tables of the documentation, made from those of the program. All that these tests take from `harness` comes in here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from harness.cli.entry import COMMANDS, build_parser, main
from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.methods.packages import asked_of_pip
from harness.core.metrics import METRICS
from harness.core.options import OPTIONS
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Precision
from harness.results import store
from harness.results.compare import thresholds
from harness.results.selection import ran
from harness.run.live import summary
from harness.run.options import Options

__all__ = [
    "COMMANDS",
    "MAKERS",
    "OPTIONS",
    "PLACEMENTS",
    "PRECISIONS",
    "actions",
    "figures",
    "flags",
    "main",
    "needed",
    "parsed",
]
__all__ += ["run_options", "table"]

ROOT = Path(__file__).parents[2]
Rows = Iterator[tuple[str, ...]]
_YES = "yes"


def table(name: str) -> str:
    """Return the Markdown of the table of this name."""
    head, rows = MAKERS[name]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *map(_cells, rows())))


def flags(command: str) -> set[str]:
    """Return the options that a command of `fitmatrix` takes, such as "--gpu"."""
    return {flag for flag in actions(command) if flag.startswith("--")}


def actions(command: str) -> Mapping[str, argparse.Action]:
    """Return what a command of `fitmatrix` makes of each of its options and of those of its own commands, by the option."""
    parser = _subparsers()[command]
    found = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                found |= own._option_string_actions
    return found


def needed(words: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """Return what a command of `fitmatrix`, or one of its own commands, must be given: how many names, and which options.

    The last are the words behind the names of the commands.
    """
    (first, *rest), parsers = words, _subparsers()
    parser = parsers[first]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and rest and rest[0] in action.choices:
            parser, rest = action.choices[rest[0]], rest[1:]
    named = [action for action in parser._actions if not action.option_strings]
    asked = [action.option_strings[0] for action in parser._actions if action.option_strings and action.required]
    return sum(action.nargs not in ("?", "*") for action in named), asked, rest


def parsed(words: Iterable[str]) -> argparse.Namespace:
    """Read the words behind `fitmatrix`."""
    return build_parser().parse_args([*words])


def run_options(given: Mapping[str, object]) -> Options:
    """Read the options of a run as pytest gives them."""
    return Options(given=given)


def figures(directory: Path) -> dict[str, str]:
    """Return what the line of each case says that ran and passed all tests, by its id, from the results in a directory."""
    results, _ = store.read(directory / store.NAME)
    return {result.case.id: summary(result) for result in results if ran(result) and not result.failed}


def _subparsers() -> Mapping[str, argparse.ArgumentParser]:
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices


def _cells(row: Iterable[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _options() -> Rows:
    for row in OPTIONS:
        yield f"`{row.flag}{'' if row.switch else f' {row.metavar}'}`", row.help


def _commands() -> Rows:
    for name, row in COMMANDS.items():
        yield f"`fitmatrix {name}`", row.help


def _precisions() -> Rows:
    for row in PRECISIONS.values():
        needs = [*_needs(row), *_capability(row)]
        yield f"`{row.name}`", row.title, f"{row.bits:.3g}", _YES if row.default else "", "; ".join(needs)


def _kv_forms() -> Rows:
    for row in KV_FORMS.values():
        needs = [
            *asked_of_pip(row.needs),
            *(["full attention"] if row.full_attention_only else []),
            *(["GPU"] if row.in_ram else []),
        ]
        yield f"`{row.name}`", row.help, f"{row.bits or ''}", "; ".join(needs)


def _attentions() -> Rows:
    for row in ATTENTIONS.values():
        capability = [f"GPU of compute capability {row.least_capability:g}"] if row.least_capability else []
        width = [f"heads of {row.most_head_dim} at most"] if row.most_head_dim else []
        yield f"`{row.name}`", row.help, "; ".join([*asked_of_pip(row.needs), *capability, *width])


def _precisions_in_short() -> Rows:
    for row in (row for row in PRECISIONS.values() if not row.unsupported and not row.requires_checkpoint):
        yield f"`{row.name}`", row.title, "; ".join([*_needs(row), *(["GPU"] if _needs_gpu(row) else [])])


def _needs(row: Precision) -> Iterator[str]:
    """Say what a precision asks for beyond the packages that every installation has."""
    if row.unsupported:
        yield row.unsupported
    if row.requires_checkpoint:
        yield f"{row.requires_checkpoint} checkpoint"
    if row.extra:
        yield f"extra `{row.extra}`"


def _capability(row: Precision) -> Iterator[str]:
    if row.min_compute_capability:
        yield f"{'GPU of' if _needs_gpu(row) else 'on a GPU:'} compute capability {row.min_compute_capability}"


def _needs_gpu(row: Precision) -> bool:
    return "ram" in row.incompatible


def _placements() -> Rows:
    for row in PLACEMENTS.values():
        yield f"`{row.name}`", row.help, str(row.least_gpus or ""), "" if row.on_request else _YES


def _placements_in_short() -> Rows:
    for name, what, *_ in _placements():
        yield name, what


def _metrics() -> Rows:
    for key, row in METRICS.items():
        yield f"`{key}`", row.label, row.unit, row.better, row.how


def _report(name: str) -> Callable[[], Rows]:
    """Make the rows of the first table of a report, which a measuring run wrote."""

    def rows() -> Rows:
        lines = (ROOT / "reports" / name).read_text(encoding="utf-8").splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
        for line in takewhile(lambda line: line.startswith("|"), lines[start + 1 :]):
            yield tuple(cell.strip() for cell in line.strip("|").split("|"))

    return rows


def _gate() -> Rows:
    for name, share in thresholds({}).items():
        yield f"`{name}`", f"{share:.0%}"


MAKERS: Mapping[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "commands": (("command", "what it does"), _commands),
    "options": (("option", "meaning"), _options),
    "precisions in short": (("precision", "weights", "requires"), _precisions_in_short),
    "precisions": (("precision", "weights", "bits", "in the default matrix", "requires"), _precisions),
    "placements in short": (("placement", "what it does"), _placements_in_short),
    "placements": (("placement", "what it does", "GPUs", "in the default matrix"), _placements),
    "kv": (("form", "what it does", "bits", "requires"), _kv_forms),
    "attention": (("attention", "what it is", "requires"), _attentions),
    "metrics": (("name in results", "label", "unit", "better", "how it is measured"), _metrics),
    "accuracy": (("what", "rows", "found", "wanted"), _report("accuracy.md")),
    "bench": (("what", "found", "wanted"), _report("bench.md")),
    "gate": (("group", "worse by more than"), _gate),
}
