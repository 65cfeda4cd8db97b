"""What long work says of itself, and how that is shown: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from harness.core.units import format_size

if TYPE_CHECKING:
    from rich.console import Console


class Report(Protocol):
    """Hears of the work: the step in words and, where they are known, the bytes done and to do."""

    def __call__(self, step: str, done_bytes: int = 0, total_bytes: int | None = None, /) -> None: ...


def silent(step: str, done_bytes: int = 0, total_bytes: int | None = None, /) -> None:
    """Show nothing."""


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Report]:
    """Show the steps on stderr or `stream`. Shows nothing until the first step."""
    # rich takes 0.1 s to import, and most runs have nothing to show.
    from rich.console import Console

    console = Console(file=stream or sys.stderr, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _lines(console)


def _lines(console: Console) -> Report:
    """Print each step once, as it begins."""
    last = ""

    def report(step: str, _done_bytes: int = 0, total_bytes: int | None = None, /) -> None:
        nonlocal last
        if step != last:
            last = step
            size = f" ({format_size(total_bytes)})" if total_bytes else ""
            print(f"{step}{size}", file=console.file, flush=True)

    return report


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    """Draw one bar a step: filling where the bytes are known, moving where they are not, full when the next step begins."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    text, size = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[size]}")
    bars = Progress(SpinnerColumn(), text, BarColumn(bar_width=24), size, TimeElapsedColumn(), console=console)
    current: tuple[str, TaskID] | None = None

    def finish() -> None:
        if current:
            bars.update(current[1], total=1, completed=1)

    def report(step: str, done_bytes: int = 0, total_bytes: int | None = None, /) -> None:
        nonlocal current
        if current is None or step != current[0]:
            finish()
            bars.start()
            current = (step, bars.add_task(step, total=None, size=""))
        known = f"{format_size(done_bytes)} of {format_size(total_bytes)}" if total_bytes else ""
        bars.update(current[1], completed=done_bytes, total=total_bytes, size=known)

    try:
        yield report
        finish()
    finally:
        bars.stop()
