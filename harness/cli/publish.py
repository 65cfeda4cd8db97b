"""`fitmatrix publish`: a static site from the results of many machines; `fitmatrix share`: results ready to be sent to one."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.errors import UsageError
from harness.core.text import print_note
from harness.report.terminal import output

if TYPE_CHECKING:
    from datetime import datetime

    from harness.report.planner.bundle import Runtime
    from harness.results.collect import Artifact
    from harness.results.register import Joined

REFUSED = 1
REPOSITORY = "fitmatrix/fitmatrix"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9_.][A-Za-z0-9_.-]{0,99}")
_PLACES = "directory (every results.jsonl and .zip below it is read), zip archive, or file of results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("places", type=Path, nargs="+", metavar="DIR", help=_PLACES)
    parser.add_argument(
        "--to", type=Path, default=Path("site"), metavar="OUT", help="directory of the site, replaced as a whole (default site)"
    )
    parser.add_argument(
        "--planner", type=Path, metavar="DIR", help="with a page that plans in the browser, by the Pyodide in this directory"
    )
    parser.add_argument("--strict", action="store_true", help="write nothing if anything is refused, with exit status 1")


def run(given: argparse.Namespace) -> int:
    """Write the site and print its path; raises StoreError, and UsageError if nothing can be published."""
    from datetime import datetime, timezone

    from harness.core.text import line, plural
    from harness.report.planner.bundle import find_runtime

    runtime = find_runtime(given.planner) if given.planner else None
    found, now = _artifacts(given.places), datetime.now(timezone.utc)
    try:
        joined, refused, pages = _build(given, found, now, runtime)
    except _Refused as error:
        print_note(f"{error}, so nothing was written; without --strict the rest is published")
        return REFUSED
    print(
        f"site: {line(str(given.to / 'index.html'))} ({plural(len(joined.entries), 'result')}, {plural(pages, 'page')}, {refused})"
    )
    return 0


def _build(given: argparse.Namespace, found: Sequence[Artifact], now: datetime, runtime: Runtime | None) -> tuple[Joined, str, int]:
    """Build the site by what is kept of the last build, or without it if that cannot be used."""
    import sqlite3

    from harness.report.site import state

    file = state.file_for(given.to)
    try:
        return _build_by(file, given, found, now, runtime)
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, sqlite3.Error) and "locked" not in str(error):  # by another that builds the same site
            state.forget_state(file)
        return _build_by(None, given, found, now, runtime)


def _build_by(
    file: Path | None, given: argparse.Namespace, found: Sequence[Artifact], now: datetime, runtime: Runtime | None
) -> tuple[Joined, str, int]:
    """Build the site; return what is published, what was refused, and how many pages there are. Raises _Refused."""
    import sqlite3
    from contextlib import suppress

    from harness.machine import atomic
    from harness.report.site import build, intake, state

    with state.opened(file) as kept:
        with atomic.replace_directory(given.to, marker=build.MARKER, ours=build.NAMES, option="--to") as folder:
            old = build.old_site(given.to, kept)
            joined = intake.gather(found, folder, now, kept, old)
            refused = _told(joined, found, "publish")
            if joined.refusals and given.strict:
                raise _Refused(refused)
            pages = build.write_site(joined, folder, now, kept, old, runtime)
        with suppress(sqlite3.Error):  # the site is there, and what is not kept is made again
            build.saved(given.to, kept)
    return joined, refused, pages


class _Refused(Exception):
    """Something was refused although --strict was given."""


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fitmatrix share`."""
    parser.add_argument("places", type=Path, nargs="+", metavar="RESULTS", help=_PLACES)
    parser.add_argument(
        "--to", type=Path, default=Path("share"), metavar="OUT", help="directory to write to, replaced as a whole (default share)"
    )
    parser.add_argument(
        "--repository", default=REPOSITORY, metavar="OWNER/NAME", help=f"results repository on GitHub (default {REPOSITORY})"
    )


def run_share(given: argparse.Namespace) -> int:
    """Write what would be published, show it and say how to send it; nothing leaves this machine.

    Raises:
        StoreError, UsageError: nothing can be shared, or the repository is no name of one.
    """
    from datetime import datetime, timezone

    from harness.core.text import line, plural
    from harness.machine import atomic
    from harness.report.export import submission
    from harness.report.site import intake, state
    from harness.report.site.old import Old

    if not _REPOSITORY.fullmatch(given.repository):
        raise UsageError(f"--repository {given.repository!r} is no repository on GitHub: write OWNER/NAME, such as {REPOSITORY}")
    found, now = _artifacts(given.places), datetime.now(timezone.utc)
    place = atomic.replace_directory(given.to, marker=submission.SHARE_MARKER, ours=submission.CONTENTS, option="--to")
    with state.opened(None) as nothing, place as folder:
        joined = intake.gather(found, folder, now, nothing, Old())
        refused = _told(joined, found, "share")
        sent = submission.write_submission(joined, folder)
        shutil.rmtree(folder / "raw")
        shown = (folder / sent.text).read_text(encoding="utf-8")
    cleaned = sum(entry.cleaned for entry in joined.entries)
    output.print_text(f"{shown}\n")
    print(f"file: {line(str(given.to / sent.file))} ({plural(len(joined.entries), 'result')}, {cleaned} cleaned, {refused})")
    print(f"text: {line(str(given.to / sent.text))}")
    print("\nRead both: they are all that is sent. To send them:")
    for command in submission.sending_commands(sent, given.to.resolve(), given.repository):
        print(f"  {line(command)}")
    return 0


def _artifacts(places: Sequence[Path]) -> list[Artifact]:
    """Return the files of results that are meant; raises UsageError if there is none."""
    from harness.core.text import line
    from harness.results import collect

    found = collect.find_artifacts(places)
    if not found:
        raise UsageError(f"{line(' '.join(map(str, places)))}: no results.jsonl below; run: pytest cases/ --results DIR")
    return found


def _told(joined: Joined, found: Sequence[Artifact], what: str) -> str:
    """Print why lines are refused, and return how many; raises UsageError if nothing is left to `what`."""
    from harness.core.text import plural
    from harness.results.register import format_place

    for refusal in joined.refusals:
        where = format_place(found[refusal.source].where, refusal.line)
        print_note(f"{where}: {refusal.why}")
    refused = plural(joined.refused, "line") + " refused"
    if not joined.entries:
        raise UsageError(f"nothing to {what}: no result in {plural(len(found), 'file')}, {refused}")
    return refused
