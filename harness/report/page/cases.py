"""Cases as HTML: the cell of each in the matrix, and what stands behind it.

Of what a page says most is said here, of thousands of cases, so it is written at once: templates take twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from harness.core.metrics import phase_title
from harness.core.records import Answer
from harness.core.text import MORE
from harness.report.html import as_html
from harness.report.page.details import Details, details
from harness.report.page.figures import icon
from harness.report.page.view import Cell, Matrix

_BAD_ANSWERS = ("broken", "degraded")
_ENDED_EARLY = ("oom", "timeout", "crash")
# Letters of a reason in a cell, and of a doubt beside one.
_MOST_REASON, _MOST_DOUBT = 320, 200
_FOLDED_LINES = 7
_BEST = f'<span class="star">{icon("best")}best</span>'


def write_cases(matrix: Matrix, up: str, *, points: int) -> str:
    """Write what stands behind the cells of a matrix; `up` is the anchor of its block, `points` the most of a line in a chart."""
    found = [_case(cell, up, points) for cell in matrix.cells]
    for fold in matrix.folds:
        inside = "".join([_case(cell, up, points) for cell in fold.cells])
        summary = f"<summary>{as_html(fold.text)}</summary>"
        found.append(f'<details class="case group">{summary}<div class="folded">\n{inside}</div></details>\n')
    return "".join(found)


def write_code(text: str, label: str, *, fold: bool = False) -> Markup:
    """Write code that can be copied, `label` saying what it is; of a long one only the beginning is seen if it is to `fold`."""
    lines = len(text.strip().splitlines())
    whole = fold and lines > _FOLDED_LINES
    rest = f'<details class="whole"><summary>show all {lines} lines</summary></details>' if whole else ""
    button = f'<button type="button" class="copy" aria-label="copy {as_html(label)}">copy</button>'
    return Markup(f'<div class="code">{button}<pre><code>{as_html(text)}</code></pre>{rest}</div>\n')


def write_cell(c: Cell) -> Markup:
    """Write the cell of a case in the matrix."""
    look, case = c.status.look, c.result.case
    marks = ("" if c.ran else " plan") + " best" * c.best + " unsound" * (look in ("broken", "fault"))
    label = as_html(f"{c.status.word}: {case.precision}, {case.place}")
    tag = ""
    if c.best:
        tag = f'<span class="tag star">{icon("best")}best</span>\n'
    elif c.memory and c.memory.predicted:
        tag = '<span class="tag">predicted</span>\n'
    bar = (c.memory.bar or "") if c.memory else ""
    shown = "".join([f"<div{where}><dt>{term}</dt><dd{look}>{value}</dd></div>" for where, term, look, value in _terms(c)])
    told = f"<dl>{shown}</dl>\n" if shown else ""
    return Markup(
        f'<td class="cell s-{look}{marks}">\n<a href="#{as_html(c.anchor)}" aria-label="{label}">{icon(look)}{c.status.word}</a>\n'
        f"{tag}{bar}{told}{_why(c)}</td>"
    )


def _terms(c: Cell) -> Iterator[tuple[str, str, str, str]]:
    """Yield what a cell says, each with the attributes of its line, its name and the attributes of its value."""
    bad = ' class="bad"'
    if c.memory:
        yield "", "needs" if c.memory.predicted else c.memory.kind, ' class="need"', c.memory.need.__html__()
        if c.memory.predicted and c.memory.capacity:
            yield "", f"{c.memory.kind} free", "", c.memory.capacity.__html__()
    if c.status.measured:
        if c.ready.value:
            yield "", c.ready.name, "", c.ready.__html__()
        if c.speed.value:
            yield ' class="speed"', "speed", "", c.speed.__html__()
        yield "", "answers", bad if c.quality in _BAD_ANSWERS else "", as_html(c.quality or "not checked")
    if c.proposed:
        yield "", "speed", "", c.proposed.__html__()
    if not (c.memory or c.status.measured or c.status.look in _ENDED_EARLY):
        return
    if c.faults:
        yield "", "checks", bad, f"{len(c.faults)} failed"
    if c.surprise or c.planned == "tight":
        yield "", "plan", bad if c.surprise else "", c.planned


def _why(c: Cell) -> str:
    """Write the reason of a cell; of one that has its figures what they mean together, for those who hear the page."""
    if not c.status.measured:
        return f'<p class="why">{_quoted(_cut(c.result.why, _MOST_REASON))}</p>' if c.result.why else ""
    said = ""
    if c.memory and c.memory.capacity:
        said += f"Needs {c.memory.brief.text} of {c.memory.capacity.text} {c.memory.kind}, measured. "
    if c.memory and c.memory.resident:
        said += f"Resident at most: {c.memory.resident.text}. "
    said += f"Predicted: {c.planned}."
    for figure in (c.ready, c.speed):
        if figure.noisy:
            said += f" <span>Noisy, {as_html(figure.label)}: {_told(_cut(figure.noisy, _MOST_DOUBT))}.</span>"
    doubts = [*c.faults]
    if c.quality in _BAD_ANSWERS and c.result.quality:
        doubts.append(c.result.quality.why)
    said += "".join([f" {_quoted(_cut(doubt, _MOST_DOUBT))}" for doubt in doubts])
    return f'<p class="why sr">{said}</p>'


def _cut(text: str, most: int) -> str:
    """Leave out the end of a text that is too long for a cell, at a blank."""
    return text if len(text) <= most else text[: most - len(MORE)].rsplit(" ", 1)[0] + MORE


def _quoted(text: str) -> str:
    return f"<bdi>{as_html(text)}</bdi>"


def _told(text: str) -> str:
    """Write a sentence of ours that a result holds, which has its counterpart in other languages."""
    return f'<span class="told">{_quoted(text)}</span>'


def _case(c: Cell, up: str, points: int) -> str:
    r, look, d = c.result, c.status.look, details(c.result, points=points)
    need = f"{c.memory.need.__html__()} <small>{c.memory.kind}</small>" if c.memory and not c.memory.predicted else ""
    ready = f"{c.ready.__html__()} <small>{c.ready.name}</small>" if c.ready.value else ""
    speed = c.speed.__html__() if c.speed.value else ""
    anchor = as_html(c.anchor)
    return (
        f'<details class="case s-{look}" id="{anchor}">\n<summary>\n'
        f'<bdi class="name"><b>{as_html(r.case.precision)}</b> {as_html(r.case.place)}</bdi>\n'
        f'<span class="ends">{icon(look)}{c.status.word}{" " + _BEST if c.best else ""}</span>\n'
        f'<span class="num">{need}</span>\n<span class="num">{ready}</span>\n<span class="num">{speed}</span>\n</summary>\n'
        f'<div class="body">\n{_lead(c)}{_chart(d)}{_figures(d)}<div class="side">\n{_side(c, d)}</div>\n{"".join(_wide(c, d))}'
        f'<p class="wide muted"><span>Case <code>{as_html(r.case.id)}</code>, {as_html(r.weights)} weights, '
        f"run <code>{as_html(r.run)}</code> at {as_html(r.at)}.</span>\n{_quoted(d.versions)}\n"
        f'<a href="#{anchor}">Link to this case</a> · <a href="#{as_html(up)}">Back to the matrix</a></p>\n</div>\n</details>\n'
    )


def _lead(c: Cell) -> str:
    """Write what was planned and what became of it."""
    wrong = f" (a {c.surprise})" if c.surprise else ""
    during = "" if c.status.measured else f" during <b>{as_html(phase_title(c.result.stage))}</b>"
    ended = f"Outcome: <b>{c.status.word}</b>{during}." if c.ran else "Not run."
    why = f"<br>{_quoted(c.result.why)}" if c.result.why else ""
    return f'<p class="lead"><span>Plan: <b>{c.planned}</b>{wrong}.</span> <span>{ended}</span>\n{why}</p>\n'


def _chart(d: Details) -> str:
    if not d.chart:
        return ""
    keys = "".join([f'<span class="key"><i class="k-{look}"></i><span>{as_html(name)}</span></span>' for look, name in d.lines])
    return (
        f'<figure class="wide"><figcaption><span>Memory over time, by phase</span> {keys}</figcaption>\n'
        f'<div class="scroll" tabindex="0" role="group" aria-label="Memory over time">{d.chart}</div></figure>\n'
    )


def _table(name: str, heads: str, rows: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{name}"><table class="figures"><caption>{name}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )


def _head(name: str) -> str:
    return f'<th scope="col">{as_html(name)}</th>'


def _figures(d: Details) -> str:
    if not d.figures:
        return ""
    heads = _head("figure") + _head("measured") * d.measured + _head("predicted") * d.predicted
    return _table("Figures", heads, d.figures)


def _side(c: Cell, d: Details) -> str:
    """Write what stands beside the figures: the phases, where the modules are, what was loaded."""
    found = []
    if (plan := c.result.estimate) and plan.bound_by:
        found.append(f'<p class="held"><span>Slowest part of a token, as planned:</span> {_told(plan.bound_by)}</p>\n')
    if d.phases:
        heads = _head("phase") + _head("time") + "".join(map(_head, d.columns))
        found.append(_table("Phases", heads, d.phases))
    if d.map:
        title = "Where the modules are" if d.map.loaded else "Where the modules were planned"
        groups = [
            f'<li><i class="t-{as_html(one.look)}"></i><code>{as_html(one.modules)}</code> <span>{as_html(one.tier)}</span></li>'
            for one in d.map.groups
        ]
        found.append(f'<figure><figcaption>{title}</figcaption>\n{d.map.strip}\n<ul class="map">{"".join(groups)}</ul></figure>\n')
    for title, held in d.held:
        sizes = ", ".join([f"{_quoted(figure.label)} {figure.__html__()}" for figure in held])
        found.append(f'<p class="held"><span>{title}:</span> {sizes}</p>\n')
    return "".join(found)


def _wide(c: Cell, d: Details) -> Iterator[str]:
    """Yield what takes the whole width, under a heading each: answers, checks, interference, code, command, log."""
    r = c.result
    if r.quality:
        compared = f"; compared with {_quoted(r.quality.reference)}" if r.quality.reference else ""
        judged = f'{_quoted(r.quality.why)} <span class="muted">Probe: {_quoted(r.quality.probe)}{compared}.</span>'
        answers = "".join(map(_answer, r.quality.answers))
        listed = f'\n<ul class="answers">{answers}</ul>\n' if answers else ""
        yield f'<div class="wide"><h5>Answers: {as_html(c.quality)}</h5>\n<p class="judged">{judged}</p>{listed}</div>\n'
    if r.checks:
        bad = ' class="bad"'
        checks = [f"<li{'' if said == 'ok' else bad}>{_quoted(f'{name}: {said}')}</li>" for name, said in r.checks.items()]
        yield _listed("Checks", checks)
    if d.disturbances:
        yield _listed("Interference", [f"<li><span>{as_html(name)}</span>: {_told(why)}</li>" for name, why in d.disturbances])
    if r.code:
        yield f'<div class="wide"><h5>Loading code</h5>{write_code(r.code, "the loading code")}</div>\n'
    if r.command:
        yield f'<div class="wide"><h5>Command to rerun</h5>{write_code(r.command, "the command")}</div>\n'
    if r.log_tail:
        log = f'<pre class="log" dir="auto" tabindex="0">{as_html(r.log_tail)}</pre>'
        yield f'<div class="wide"><h5>End of the log</h5>{log}</div>\n'
    if r.remote_code:
        yield _listed("Remote code that ran", [f"<li>{_quoted(name)}</li>" for name in r.remote_code])


def _answer(one: Answer) -> str:
    word = "right" if one.correct else "wrong"
    said = f'{_quoted(one.question)}<q dir="auto">{as_html(one.answer)}</q>'
    return f'<li class="{word}"><span class="sr">{word}: </span>{said}</li>'


def _listed(title: str, items: list[str]) -> str:
    return f'<div class="wide"><h5>{title}</h5><ul class="plain">{"".join(items)}</ul></div>\n'
