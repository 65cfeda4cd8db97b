"""Results made ready to be shared: the file as `publish` would publish it, and the text of a pull request that adds it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from harness.core.records import Result
from harness.core.text import line, plural
from harness.report.export.markdown import code
from harness.report.export.summary import render_summary
from harness.report.site.rows import raw_file, slug
from harness.results.audit import CHECKED, identity
from harness.results.register import Joined
from harness.results.store import NAME

SHARE_MARKER = "fitmatrix-share"
TEXT = "pull-request.md"
# Where a results repository keeps what people send; `publish` reads every file of results below the first.
SUBMITTED = "reports/shared"
CONTENTS = frozenset({SHARE_MARKER, TEXT, "reports"})


class Submission(NamedTuple):
    """What is to be sent: the name of its folder in the repository, a title, and the files beside it."""

    name: str
    title: str
    file: Path
    text: Path


def write_submission(joined: Joined, folder: Path) -> Submission:
    """Write sound results, which `folder`/raw has by machine, as one file of results, and the text that presents them.

    The file holds the very bytes that a site publishes, so what is read there is all that is sent.
    """
    of_machine = {
        machine: iter((folder / raw_file(machine)).read_bytes().splitlines(keepends=True))
        for machine in {entry.machine for entry in joined.entries}
    }
    lines = [next(of_machine[entry.machine]) for entry in joined.entries]
    results = [msgspec.json.decode(data, type=Result) for data in lines]
    machines = list({identity(result.machine): result.machine.name for result in results}.values())
    newest = joined.entries[-1]
    name = f"{newest.at[:10]}-{slug(machines[0], newest.digest)}"
    title = f"Results of {line(machines[0], 60)}" + (f" and {plural(len(machines) - 1, 'other machine')}" if machines[1:] else "")
    file, text = folder / SUBMITTED / name / NAME, folder / TEXT
    file.parent.mkdir(parents=True)
    file.write_bytes(b"".join(lines))
    text.write_text(_text(joined, results, f"{SUBMITTED}/{name}/{NAME}"), encoding="utf-8")
    return Submission(name, title, file.relative_to(folder), text.relative_to(folder))


def _text(joined: Joined, results: Sequence[Result], where: str) -> str:
    """Say in Markdown what is sent, how it was checked and cleaned, and what it shows."""
    cleaned = sum(entry.cleaned for entry in joined.entries)
    said = [
        f"Adds {plural(len(results), 'result')} as {code(where)}, written by `fitmatrix share`.",
        f"Private names were taken out of {plural(cleaned, 'result')}." if cleaned else "Nothing private was found in them.",
        "The audit of `fitmatrix publish` passed:",
    ]
    checks = "\n".join(f"- {rule}" for rule in CHECKED)
    return f"{' '.join(said)}\n\n{checks}\n\n{render_summary(results)}"


def sending_commands(submission: Submission, folder: Path, repository: str) -> list[str]:
    """Return the command lines that send it, by git and GitHub's own program; nothing here runs them."""
    branch, of = f"results-{submission.name}", shlex.quote(f"{SUBMITTED}/{submission.name}")
    quoted = {name: shlex.quote(str(folder / name)) for name in ("reports", TEXT)}
    title = shlex.quote(submission.title)
    return [
        f"gh repo fork {shlex.quote(repository)} --clone && cd {shlex.quote(repository.rpartition('/')[2])}",
        f"git switch -c {branch} && cp -R {quoted['reports']} . && git add {of} && git commit -m {title}",
        f"git push -u origin {branch} && gh pr create --title {title} --body-file {quoted[TEXT]}",
    ]
