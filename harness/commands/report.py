"""`fitmatrix report`: the page of a directory's results, rendered again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "Render the page from the results of a directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory with a results.jsonl")
    parser.add_argument("--html", type=Path, metavar="FILE", help="where to write the page (default DIR/index.html)")


def run(given: argparse.Namespace) -> int:
    """Write the page and name it; raises StoreError for a directory without results."""
    from harness.report import page
    from harness.report.text import line
    from harness.store import Store

    results, problems = Store(given.directory).read()
    for problem in problems:
        print(f"fitmatrix: {line(str(problem))}", file=sys.stderr)
    html = given.html or given.directory / "index.html"
    page.write(html, page.render(results, problems=[str(problem) for problem in problems]))
    print(f"page: {line(str(html))}")
    return 0
