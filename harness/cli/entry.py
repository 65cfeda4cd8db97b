"""The command line: a table of commands, each a function from parsed arguments to an exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Container, Sequence
from importlib import import_module
from typing import NamedTuple

import harness
from harness.cli.options import CommandParser, add_options
from harness.cli.plan_args import USAGE
from harness.core.errors import HarnessError
from harness.core.text import print_note
from harness.machine import signals

UNWRITTEN = 1
_KEPT_NOTHING = "nothing was changed"
_KEPT_FILES = "each file is as it was, or new and whole"
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a usage error is one sentence on standard error and exit status 2."""
    _open_closed()
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:  # after the parser's own help as well
            sys.stdout.flush()
    except HarnessError as error:
        print_note(str(error))
        return USAGE
    except BrokenPipeError:  # the reader closed the pipe
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:  # what fails to open has a name
            where = f"{error.filename}: " if error.filename else ""
            print_note(f"{where}{error.strerror or error}")
            return USAGE
        _drop_output()
        print_note(f"standard output cannot be written ({error.strerror or error})")
        return UNWRITTEN
    except KeyboardInterrupt as stop:
        return _stopped(stop, _KEPT_NOTHING)


def _run(words: Sequence[str]) -> int:
    """Run the command that the words ask for; of no words, show what can be asked."""
    parser = build_parser(words[:1])
    if not words:
        parser.print_help()
        return 0
    given = parser.parse_args(words)
    try:
        status: int = given.command(given)
    except KeyboardInterrupt as stop:
        return _stopped(stop, given.kept)
    return status


def _stopped(stop: KeyboardInterrupt, kept: str) -> int:
    signals.say_stopped(kept)
    return signals.exit_status(stop)


def _open_closed() -> None:
    """Let what was closed before we began lead nowhere: else the first file that is opened takes its place, and gets the output.

    So it is for the processes that we start: libraries of a worker ask its streams whether they are terminals.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, mode, encoding="utf-8"))


def _drop_output() -> None:
    """Let what is left for standard output go nowhere: Python flushes it once more at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(called: Container[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the commands that may be called, with their options: of all if None.

    If none of COMMANDS is called, it knows their names alone, to say what there is.
    """
    parser = CommandParser(
        prog="fitmatrix",
        description="Which ways of loading a language model fit this machine, and how well do they run?",
        epilog="To measure: pytest cases/ --model MODEL",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    rows = {name: row for name, row in COMMANDS.items() if called is None or name in called}
    for name, row in (rows or COMMANDS).items():
        sub = commands.add_parser(name, help=row.help, description=row.help)
        if rows:
            module = import_module(row.module)
            getattr(module, row.add_arguments)(sub)
            sub.set_defaults(command=getattr(module, row.run), kept=row.kept)
    return parser


class _Version(argparse.Action):
    """Look up the version only on request: argparse's own action needs it in advance, for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"fitmatrix {harness.__version__}")
        parser.exit()


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fitmatrix watch`."""
    add_options(parser, "watch", "pid", "once", "json")


def run_watch(given: argparse.Namespace) -> int:
    """Run `fitmatrix watch`."""
    from harness.live import command

    return command.run(given.pid, once=given.once, as_json=given.json)


class _Row(NamedTuple):
    """A command; its module is imported only when it is called, as each brings others that the rest do without."""

    help: str
    module: str
    add_arguments: str = "add_arguments"
    run: str = "run"
    kept: str = _KEPT_NOTHING  #: what is true whenever Ctrl-C stops it; a command that gets past that sets `given.kept`


COMMANDS = {
    "hardware": _Row(
        "Show memory, bandwidth and links of this machine, or of one that you describe.",
        "harness.cli.hardware",
        kept="a measurement that had not ended is not kept",
    ),
    "inspect": _Row(
        "Show what a checkpoint contains: files, parameters, dtypes, blocks, tied weights. Reads headers, never weights.",
        "harness.cli.inspect",
    ),
    "models": _Row(
        "List the models that are known offline: names, stored form, parameters, context.",
        "harness.cli.inspect",
        "add_models_arguments",
        "run_models",
    ),
    "plan": _Row("Predict which ways of loading a model fit, before loading or even downloading it.", "harness.cli.plan"),
    "calibrate": _Row(
        "Correct the estimates by what was measured on this machine, from now on.",
        "harness.cli.calibrate",
        kept="nothing of it was kept, and plans are as before",
    ),
    "chat": _Row(
        "Chat with a model in the browser on this machine, loaded as the plan recommends.",
        "harness.cli.chat",
        kept="nothing of the chat is kept",
    ),
    "watch": _Row(
        "Watch memory by component while a case runs, with room in tokens.",
        __name__,
        "add_watch_arguments",
        "run_watch",
        kept="what was watched goes on, and only saved frames are kept",
    ),
    "synth": _Row(
        "Write a checkpoint with random weights in a model's true shapes, files and dtype, to measure it before downloading.",
        "harness.cli.synth",
        kept="no checkpoint is left half written",
    ),
    "report": _Row(
        "Render the results in a directory as a page, Markdown, JSON, CSV or badges.", "harness.cli.report", kept=_KEPT_FILES
    ),
    "publish": _Row(
        "Build a static site from the results of many machines; invalid results are refused with a reason.",
        "harness.cli.publish",
        kept="the site is as it was, or new and whole",
    ),
    "share": _Row(
        "Prepare results as a pull request, cleaned and checked.",
        "harness.cli.publish",
        "add_share_arguments",
        "run_share",
        kept=_KEPT_FILES,
    ),
    "fleet": _Row("Measure one matrix on many machines: nothing lost, nothing twice.", "harness.cli.fleet", kept=_KEPT_FILES),
    "compare": _Row(
        "Compare two sets of results: memory, load time, speed, quality; exit status 1 if something got worse.",
        "harness.cli.compare",
        kept=_KEPT_FILES,
    ),
}
