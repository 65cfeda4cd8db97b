"""A comparison as words: for the terminal, as Markdown for a pull request, as JUnit XML for CI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from harness.core.metrics import METRICS, format_metric
from harness.core.text import plural, visible
from harness.core.units import format_share
from harness.report.export.markdown import escaped, folded, table
from harness.report.terminal import tables
from harness.results.compare import Call, Change, Comparison, Pair, sentence, signed

_STYLES = {Call.WORSE: "bold red", Call.BETTER: "green", Call.UNSURE: "yellow", Call.UNJUDGED: "dim", Call.SAME: "dim"}
_MOST_NAMED = 3


def verdict(comparison: Comparison) -> str:
    """Say the whole in one sentence; a case that fails counts once, as in JUnit XML."""
    failed, compared = len(_failed(comparison)), plural(len(comparison.compared), "case")
    if not comparison.compared:
        return "nothing to compare: the two sets share no case"
    if comparison.is_identical:
        return f"{compared} compared, nothing got worse: every figure is the same"
    return f"{plural(failed, 'failure')} in {compared}" if failed else f"{compared} compared, nothing got worse"


def _failed(comparison: Comparison) -> list[Pair]:
    return [pair for pair in comparison.pairs if _failures(pair)]


def show_changes(comparison: Comparison, everything: bool) -> None:
    """Print failures, then a table of what changed; with `everything` also of what did not."""
    rows = list(_rows(comparison, everything))
    parts: list[Text | Table] = [tables.title(verdict(comparison))]
    parts += [Text(f"  {tables.line(failure)}") for failure in comparison.failures]
    if rows:
        made = tables.table("case", "figure", "before", "now", "change", "", left=2)
        for pair, change in rows:
            style = _STYLES[change.call]
            made.add_row(*map(tables.line, _cells(pair, change)), Text(change.call.value, style=style))
        parts.append(made)
    parts += [Text(tables.line(note), style="dim") for note in _notes(comparison)]
    parts += [Text(said) for said in _way_out(comparison)]
    tables.show(*parts)


def _way_out(comparison: Comparison) -> Iterator[str]:
    """Say, where a case fails, what it was held to and how a change is accepted."""
    if _failed(comparison):
        held = ", ".join(f"{group} {format_share(limit)}" for group, limit in comparison.limits.items())
        yield f"Worse is what is beyond: {held} ([tool.fitmatrix.gate] in pyproject.toml)."
        yield "To accept a change, keep the newer results as the baseline."


def _rows(comparison: Comparison, everything: bool) -> Iterator[tuple[Pair, Change]]:
    for pair in comparison.pairs:
        for change in pair.changes:
            if everything or change.call not in (Call.SAME, Call.UNJUDGED):
                yield pair, change


def _cells(pair: Pair, change: Change) -> tuple[str, ...]:
    span = f" ({signed(change.low)} to {signed(change.high)})" if change.low is not None and change.high is not None else ""
    figures = (format_metric(change.key, value) for value in (change.before, change.after))
    return pair.id, METRICS[change.key].label, *figures, f"{signed(change.change)}{span}"


def _notes(comparison: Comparison) -> Iterator[str]:
    """Say what else differs, each thing once, and which cases have no counterpart or another end."""
    seen: dict[str, list[str]] = {}
    for pair in comparison.pairs:
        for note in pair.notes:
            seen.setdefault(note, []).append(pair.id)
        if pair.said and not pair.failed:
            yield f"{pair.id}: {pair.said}"
    for why, figures in comparison.doubts.items():
        more = f"; and {plural(len(figures) - _MOST_NAMED, 'other figure')}" if len(figures) > _MOST_NAMED else ""
        yield f"not judged, {why}: {'; '.join(figures[:_MOST_NAMED])}{more}"
    for note, ids in seen.items():
        yield f"{note} ({ids[0] if len(ids) == 1 else plural(len(ids), 'case')})"


def markdown(comparison: Comparison) -> str:
    """Write a comparison for a pull request: the verdict, failures, a table of what changed, the rest folded."""
    mark = "❌" if comparison.failures else "✅"
    lines = [f"### {mark} fitmatrix: {verdict(comparison)}", ""]
    lines += [f"- {escaped(failure)}" for failure in comparison.failures]
    changed = list(_rows(comparison, False))
    lines += [*([""] if comparison.failures else []), *_table(changed)] if changed else []
    steady = [row for row in _rows(comparison, True) if row[1].call is Call.SAME]
    if steady:
        lines += ["", *folded(f"{plural(len(steady), 'figure')} unchanged", _table(steady))]
    notes = list(_notes(comparison))
    lines += ["", *(f"- {escaped(note)}" for note in notes)] if notes else []
    lines += ["", *map(escaped, _way_out(comparison))] if comparison.failures else []
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[tuple[Pair, Change]]) -> list[str]:
    cells = [[escaped(cell) for cell in (*_cells(pair, change), change.call.value)] for pair, change in rows]
    return table(("case", "figure", "before", "now", "change", ""), cells, right=(2, 3, 4))


def junit(comparison: Comparison) -> bytes:
    """Write JUnit XML: a test case for each pair, failed where the gate stops."""
    skipped = len(comparison.pairs) - len(comparison.compared)
    totals = {
        "tests": str(len(comparison.pairs)),
        "failures": str(len(_failed(comparison))),
        "errors": "0",
        "skipped": str(skipped),
    }
    suites = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "fitmatrix compare", **totals})
    for pair in comparison.pairs:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "fitmatrix", "name": visible(pair.id)})
        if said := [visible(failure) for failure in _failures(pair)]:
            ElementTree.SubElement(case, "failure", {"message": "; ".join(said)}).text = "\n".join(said)
        if pair.before is None or pair.after is None:
            ElementTree.SubElement(case, "skipped", {"message": pair.said or ""})
    return bytes(ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True))


def _failures(pair: Pair) -> list[str]:
    said = [pair.said] if pair.failed and pair.said else []
    return said + [sentence(change) for change in pair.changes if change.gated and change.call is Call.WORSE]
