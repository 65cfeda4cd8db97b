"""What runs on a card, as rows of the front door's table: there are thousands, so each is written once, with its model's page."""

from __future__ import annotations

from harness.core.text import line
from harness.report.page.figures import as_html
from harness.report.site.rows import Row, RowLink


def write_choice(row: Row) -> str:
    """Write a way that works and was measured as a row of HTML, for the page at the root of the site."""
    memory = row.measured
    if memory is None:
        raise ValueError(f"{row.result.id} was not measured, and no choice")
    sound = " data-sound" if row.answers_well else ""
    told = f'data-need="{memory.need.value}" data-speed="{row.speed.value}"'
    case = row.result.case
    way = f'<span class="way"><b>{as_html(line(case.precision, 40))}</b>, {as_html(line(case.placement, 40))}</span>'
    look = "" if row.answers_well else ' class="bad"'
    link = f'<a class="fig" href="{row.page}">'
    return (
        f'<tr data-of="{row.model.page}" data-kind="{memory.kind}"{sound} {told}><th scope="row">{_link(row.model)}</th>'
        f'<td class="words">{way}</td><td>{link}{memory.need.__html__()}</a> <small class="kind">{memory.kind}</small></td>'
        f"<td>{link}{row.speed.__html__()}</a></td>"
        f'<td class="words"><span{look}>{as_html(row.quality or "not checked")}</span></td>'
        f'<td class="words">{_link(row.machine)}</td></tr>\n'
    )


def _link(link: RowLink) -> str:
    return f'<a href="{link.page}"><bdi>{as_html(line(link.name, 80))}</bdi></a>'
