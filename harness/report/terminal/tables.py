"""Text for a terminal, a pipe or a file: tables, lists of facts and bars in 80 columns.

Colors are for terminals, and everything they say is said in words as well. What does not go to a terminal is plain ASCII,
except for names that are not.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness.core.text import line as line
from harness.core.text import visible

WIDEST = 100
NARROWEST = 40
_GAP = 2  # between columns
_FOLDED = 11  # columns that a folded name has at least
_ENDLESS = 1 << 16
_IN_FIGURE = re.compile(r"(?<=\d) (?=(?:[KMGT]i?B(?:/s)?|bytes|tokens(?:/s)?|m?s|min|h|B|M)\b|%)")  # before the unit of a figure
_TIE = "\ue000"  # stands for such a blank until lines are broken; no text has it, `visible` spells it out

# The colors of Okabe and Ito that the pages use, by kind of module.
KIND_COLORS = {
    "embedding": "#56b4e9",
    "attention": "#0072b2",
    "mlp": "#e69f00",
    "norm": "#009e73",
    "head": "#cc79a7",
    "other": "#8a949e",
}


def screen() -> Console:
    """Return the console of standard output, no wider than can be read; letters that its encoding lacks become "?".

    A pipe or a file has no width: nothing is wrapped or left out there, unless COLUMNS says how wide it is.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        console.width = min(max(console.width, NARROWEST), WIDEST)
    else:
        console.width = _ENDLESS
    return console


def show(*parts: RenderableType, console: Console | None = None) -> None:
    """Print the parts with an empty line between them; what goes to no terminal has no blanks at the ends of its lines."""
    console = console or screen()
    width = console.width
    with console.capture() as captured:
        for number, part in enumerate(parts):
            console.width = max(width, _fixed_width(part))  # a terminal wraps what rich would cut
            console.print("\n" if number else "", end="")
            console.print(part, end="" if isinstance(part, (Group, Table)) else "\n")
    text = captured.get().replace(_TIE, " ")
    sys.stdout.write(text if console.is_terminal else "".join(f"{row.rstrip()}\n" for row in text.splitlines()))


def said(text: str) -> Text:
    """Write sentences, which may quote a file or a library; no line ends between a figure and its unit."""
    return Text(_IN_FIGURE.sub(_TIE, visible(text)))


def commands(text: str) -> Text:
    """Write commands, a line each, which a terminal may wrap but nobody else: what is pasted is one line."""
    return Text(visible(text), no_wrap=True)


def title(text: str) -> Text:
    """Write the name of what is shown."""
    return Text(_IN_FIGURE.sub(_TIE, line(text)), style="bold")


def table(*columns: str, left: int = 1) -> Table:
    """Make a table without lines; the first `left` columns are words, the others figures. A heading may have two lines.

    A word that is too long for a narrow screen goes on in the next line: a name that is cut cannot be typed.
    """
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for number, heading in enumerate(columns):
        is_word = number < left
        made.add_column(heading, justify="left" if is_word else "right", no_wrap=not is_word, overflow="fold")
    return made


def width_of(part: Table) -> int:
    """Return how many columns of the screen a table takes where nothing is wrapped or cut."""
    return sum(_widths(part)) + _GAP * (len(part.columns) - 1)


def has_room_for(part: Table, *, wrapping: Sequence[int] = (), folding: bool = False) -> bool:
    """Fix the columns of a table, and say whether the screen is wide enough to show it without cutting anything.

    The columns of these numbers may be wrapped at their blanks, the first one first, and for `folding` words of them that are
    longer than the screen has room for; else nothing is.
    """
    widths, room = _widths(part), screen().width - _GAP * (len(part.columns) - 1)
    for number in wrapping:
        cells = (part.columns[number].header, *part.columns[number].cells)
        longest = max(cell_len(word) for cell in cells for word in str(cell).split())
        longest = min(longest, _FOLDED) if folding else longest
        widths[number] = max(widths[number] - max(sum(widths) - room, 0), longest)
    for column, width in zip(part.columns, widths, strict=True):
        column.width = width  # else rich lays out every cell once more to find it, and cuts figures
    return sum(widths) <= room


def _fixed_width(part: RenderableType) -> int:
    """Return how wide a table is whose columns are fixed, or a text that is not to be wrapped."""
    if isinstance(part, Text) and part.no_wrap:
        return max(cell_len(line) for line in part.plain.split("\n"))
    widths = [column.width or 0 for column in part.columns] if isinstance(part, Table) else []
    return sum(widths) + _GAP * (len(widths) - 1) if all(widths) and widths else 0


def _widths(part: Table) -> list[int]:
    """Return the width of each column: of the widest line of plain or styled text in it."""
    cells = ((column.header, *column.cells) for column in part.columns)
    return [max(cell_len(line) for cell in column for line in str(cell).split("\n")) for column in cells]


def facts(pairs: Iterable[tuple[str, str | Sequence[str]]]) -> Table:
    """Make a list of facts, name and value; a value of several texts takes a line for each."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, Text("\n").join(said(text) for text in ([value] if isinstance(value, str) else value)))
    return made


def height(part: RenderableType) -> int:
    """Return how many lines of the screen something takes."""
    return len(screen().render_lines(part, pad=False))


def text_bar(share: float, width: int, console: Console, color: str = "") -> Text:
    """Draw `share` of a full bar of `width` letters: blocks on a terminal that has them, # elsewhere.

    What is not nothing is at least a mark, the thinnest there is.
    """
    if console.is_terminal and not console.options.ascii_only:
        eighths = max(round(share * width * 8), 1 if share > 0 else 0)
        return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style=color)
    return Text("#" * max(round(share * width), 0))
