"""`fitmatrix publish`: a static site from the results of many machines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.core.errors import UsageError

HELP = "Build a static site from the results of many machines; invalid results are refused with a reason."
REFUSED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "places",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directory (every results.jsonl and .zip below it is read), zip archive, or file of results",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("site"), metavar="OUT", help="directory of the site, replaced as a whole (default site)"
    )
    parser.add_argument("--strict", action="store_true", help="write nothing if anything is refused, with exit status 1")


def run(given: argparse.Namespace) -> int:
    """Write the site and print its path; raises StoreError, and UsageError if nothing can be published."""
    from datetime import datetime, timezone

    from harness.core.text import line, plural
    from harness.machine import atomic
    from harness.report.site import build
    from harness.results import collect
    from harness.results.audit import format_place

    found, now = collect.find_artifacts(given.places), datetime.now(timezone.utc)
    if not found:
        raise UsageError(f"{line(' '.join(map(str, given.places)))}: no results.jsonl below; run: pytest cases/ --results DIR")
    try:
        with atomic.replace_directory(given.to, marker=build.MARKER, ours=build.NAMES, option="--to") as folder:
            joined = build.gather(found, folder, now)
            for refusal in joined.refusals:
                where = format_place(found[refusal.source].where, refusal.line)
                print(f"fitmatrix: {line(f'{where}: {refusal.why}')}", file=sys.stderr)
            refused = plural(joined.refused, "line") + " refused"
            if not joined.entries:
                raise UsageError(f"nothing to publish: no result in {plural(len(found), 'file')}, {refused}")
            if joined.refusals and given.strict:
                raise _Refused
            pages = build.write_site(joined, folder, now)
    except _Refused:
        print(f"fitmatrix: {refused}, so nothing was written; without --strict the rest is published", file=sys.stderr)
        return REFUSED
    print(
        f"site: {line(str(given.to / 'index.html'))} ({plural(len(joined.entries), 'result')}, {plural(pages, 'page')}, {refused})"
    )
    return 0


class _Refused(Exception):
    """Something was refused although --strict was given."""
