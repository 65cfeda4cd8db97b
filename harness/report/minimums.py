"""Smallest sizes that work, in the terminal: each limit as it is tried, then a table beside the estimates."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness import cgroup
from harness.case import Result
from harness.minimum import Minimum, failed
from harness.report import terminal
from harness.units import format_gib, format_share


def tell(result: Result) -> None:
    """Say on standard error, where that is a terminal, how a case fared under a limit."""
    if sys.stderr.isatty():
        print(terminal.line(f"{result.id}  {failed(result) or 'works'}"), file=sys.stderr)


def show(found: Sequence[Minimum]) -> None:
    """Print the smallest RAM that each case works in beside the estimate, and why less does not do."""
    table = terminal.table("case", "works in", "not in", "estimate", "at most", "off", left=1)
    for one in found:
        sizes = (one.works_bytes, one.fails_bytes, one.estimate_bytes, one.estimate_high_bytes)
        off = format_share(one.estimate_bytes / one.works_bytes - 1) if one.works_bytes else ""
        table.add_row(terminal.line(one.case.id), *(format_gib(size) if size is not None else "–" for size in sizes), off)
    reasons = "\n".join(terminal.line(f"{one.case.id} with less: {one.why}") for one in found if one.why)
    held = "" if cgroup.is_allowed() else "No control group can be made here: only memory that cannot be dropped was limited."
    terminal.show(terminal.said("RAM in GiB"), table, *(terminal.said(text) for text in (reasons, held) if text))
