"""`fitmatrix report`: the results in a directory as a page, Markdown, data or badges."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.core.errors import UsageError
from harness.core.options import RESULTS
from harness.core.text import print_note
from harness.report.export.formats import FORMATS
from harness.report.terminal import output

if TYPE_CHECKING:
    from harness.core.records import Result

DETAILS = (
    "Without options this writes the page. Exit status: 0 if everything was written, whatever the results say, 2 for a usage "
    "error; `fitmatrix compare` and pytest have exit statuses for CI."
)


class Target(NamedTuple):
    """One thing to write: a row of FORMATS, and the file; None is standard output."""

    name: str
    path: Path | None


class Text(NamedTuple):
    """The text of one file or of standard output, what it is called, and the option that names its path."""

    what: str
    option: str
    path: Path | None
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog = DETAILS
    shapes = "; ".join(f"{name}: {entry.what}" for name, entry in FORMATS.items())
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=RESULTS,
        metavar="DIR",
        help=f"directory with a results.jsonl (default {RESULTS})",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="path of the page (default DIR/index.html)")
    parser.add_argument(
        "--format", action="append", choices=tuple(FORMATS), default=[], metavar="NAME", help=f"{shapes} (repeatable; default html)"
    )
    parser.add_argument(
        "--output",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="file for md, json or csv (default standard output; repeat it for several formats, told apart by file ending)",
    )
    parser.add_argument(
        "--badge",
        type=Path,
        metavar="PATH",
        help="directory for SVG badges, one per model and GPU size; or, if it ends in .svg, the file for the only badge",
    )


def run(given: argparse.Namespace) -> int:
    """Render what was asked for, write it and print its path; raises StoreError, UsageError."""
    from harness.results.store import Store

    targets = list(_targets(given))
    results, problems = Store(given.directory).read()
    for problem in problems:
        print_note(str(problem))
    texts = [*_rendered(targets, results, [str(problem) for problem in problems]), *_badges(given.badge, results)]
    _write(texts)
    return 0


def _targets(given: argparse.Namespace) -> Iterator[Target]:
    """Find a file for each format that was asked for, in the order of FORMATS.

    Raises:
        UsageError: an --output of unknown format, or two formats for standard output.
    """
    wanted = dict.fromkeys(given.format)
    files = _by_format(given.output, list(wanted))
    if given.html:
        if "html" in files:
            raise UsageError(f"--html {given.html} and --output {files['html']} both name the page: drop one of them")
        files["html"] = given.html
    wanted |= dict.fromkeys(files)
    if not wanted and not given.badge:
        wanted = {"html": None}
    bare = [name for name in wanted if name != "html" and name not in files]
    if len(bare) > 1:
        example = f"--output report{FORMATS[bare[0]].suffixes[0]}"
        raise UsageError(f"--format {' and '.join(bare)} would both go to standard output: give each a file, {example}")
    for name in FORMATS:
        if name in wanted:
            yield Target(name, files.get(name) or (given.directory / "index.html" if name == "html" else None))


def _by_format(files: Sequence[Path], wanted: Sequence[str]) -> dict[str, Path]:
    """Give each file its format: the one that was asked for, if it is one file and one format, else by the file's ending."""
    texts = [name for name in wanted if name != "html"] or list(wanted)
    if len(files) == len(texts) == 1:
        return {texts[0]: files[0]}
    found: dict[str, Path] = {}
    for file in files:
        name = next((name for name, entry in FORMATS.items() if file.suffix.lower() in entry.suffixes), None)
        if name is None:
            endings = ", ".join(entry.suffixes[0] for entry in FORMATS.values())
            raise UsageError(
                f"--output {file}: unknown format: use one of the endings {endings}, or give one --format and one --output"
            )
        if name in found:
            raise UsageError(f"--output {found[name]} and --output {file} are both {name}: drop one of them")
        found[name] = file
    return found


def _rendered(targets: Sequence[Target], results: Sequence[Result], problems: Sequence[str]) -> Iterator[Text]:
    for name, path in targets:
        what, option = ("page", "--html") if name == "html" else (name, "--output")
        yield Text(what, option, path, FORMATS[name].render(results, problems))


def _badges(place: Path | None, results: Sequence[Result]) -> Iterator[Text]:
    """Draw badges for a directory, or the only badge for a file.

    Raises:
        UsageError: a file was named, but there is not exactly one badge.
    """
    if place is None:
        return
    from harness.report.export import badges

    found = badges.badges(results)
    single = place.suffix.lower() == ".svg"
    if single and len(found) != 1:
        raise UsageError(
            f"--badge {place}: there are {len(found)} badges, not one: give a directory, --badge {place.with_suffix('')}"
        )
    for badge in found:
        yield Text("badge", "--badge", place if single else place / f"{badge.slug}.svg", badge.svg)


def _write(texts: Sequence[Text]) -> None:
    """Write all texts and print their paths: on standard error if a text goes to standard output."""
    from harness.core.text import line
    from harness.report.page import render

    names = sys.stderr if any(text.path is None for text in texts) else sys.stdout
    for what, option, path, text in texts:
        if path is None:
            output.print_text(text)
        else:
            render.write(path, text, f"the {what}", option)
            print(f"{what}: {line(str(path))}", file=names)
