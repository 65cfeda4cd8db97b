"""The command line: a table of commands, each a function from parsed arguments to an exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Container, Sequence

import harness
from harness.cli import calibrate, chat, compare, fleet, hardware, inspect, plan, publish, report, synth
from harness.cli.options import CommandParser, add_options
from harness.cli.plan_args import USAGE
from harness.core.errors import HarnessError
from harness.core.text import line
from harness.live import command as live

Command = Callable[[argparse.Namespace], int]

UNWRITTEN = 1
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a usage error is one sentence on standard error and exit status 2."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:  # after the parser's own help as well
            if sys.stdout is not None:  # closed before we began
                sys.stdout.flush()
    except HarnessError as error:
        print(f"fitmatrix: {line(str(error))}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader closed the pipe
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:  # what fails to open has a name
            where = f"{error.filename}: " if error.filename else ""
            print(f"fitmatrix: {line(f'{where}{error.strerror or error}')}", file=sys.stderr)
            return USAGE
        _drop_output()
        print(f"fitmatrix: standard output cannot be written ({error.strerror or error})", file=sys.stderr)
        return UNWRITTEN
    except KeyboardInterrupt:
        return 130


def _run(words: Sequence[str]) -> int:
    """Run the command that the words ask for; of no words, show what can be asked."""
    parser = build_parser(words[:1])
    if not words:
        parser.print_help()
        return 0
    given = parser.parse_args(words)
    command: Command = given.command
    return command(given)


def _drop_output() -> None:
    """Let what is left for standard output go nowhere: Python flushes it once more at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(called: Container[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser, with one subcommand for each row of COMMANDS, and the options of those that may be called: all if None."""
    parser = CommandParser(
        prog="fitmatrix",
        description="Which ways of loading a language model fit this machine, and how well do they run?",
        epilog="To measure: pytest cases/ --model MODEL",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (help_text, add_arguments, command) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, description=help_text)
        if called is None or name in called:
            add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


class _Version(argparse.Action):
    """Look up the version only on request: argparse's own action needs it in advance, for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"fitmatrix {harness.__version__}")
        parser.exit()


def _watch(given: argparse.Namespace) -> int:
    return live.run(given.pid, once=given.once, as_json=given.json)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Command]] = {
    "hardware": (hardware.HELP, hardware.add_arguments, hardware.run),
    "inspect": (inspect.HELP, inspect.add_arguments, inspect.run),
    "models": (inspect.MODELS_HELP, inspect.add_models_arguments, inspect.run_models),
    "plan": (plan.HELP, plan.add_arguments, plan.run),
    "calibrate": (calibrate.HELP, calibrate.add_arguments, calibrate.run),
    "chat": (chat.HELP, chat.add_arguments, chat.run),
    "watch": (live.HELP, lambda parser: add_options(parser, "watch", "pid", "once", "json"), _watch),
    "synth": (synth.HELP, synth.add_arguments, synth.run),
    "report": (report.HELP, report.add_arguments, report.run),
    "publish": (publish.HELP, publish.add_arguments, publish.run),
    "share": (publish.SHARE_HELP, publish.add_share_arguments, publish.run_share),
    "fleet": (fleet.HELP, fleet.add_arguments, fleet.run),
    "compare": (compare.HELP, compare.add_arguments, compare.run),
}
