"""The options of the commands: rows of the table of a run, and rows of the command line alone, read by the same parsers."""

from __future__ import annotations

import argparse
from typing import Any

from harness.core.options import OPTION, Option, name_in, whole_number
from harness.core.units import parse_size
from harness.planning.zero import STAGES

HOST, FIRST_PORT = "127.0.0.1", 7860

_ROWS = (
    Option(name="file", help="this GGUF file of MODEL, if it has several", metavar="NAME"),
    Option(name="revision", help="branch, tag or commit on the hub", metavar="NAME"),
    Option(name="json", help="print one JSON object", switch=True),
    Option(
        name="gpu",
        help='describe a machine with this card instead of this one, "RTX 3060 12GB" or 8GiB (repeatable)',
        repeat=True,
        metavar="NAME|SIZE",
    ),
    Option(
        name="disk",
        help="describe a machine with this much free disk space instead of this one, e.g. 500GB",
        parse=parse_size,
        metavar="SIZE",
    ),
    Option(
        name="context",
        help="tokens of prompt and answer together; replaces --prompt-tokens",
        parse=whole_number(3),
        metavar="N",
    ),
    Option(name="code", help="print a script that loads and generates, for a case such as int8/direct", metavar="CASE"),
    Option(name="explain", help="show every term of a case such as int8/direct", metavar="CASE"),
    Option(
        name="training",
        help=f"what training by DeepSpeed's ZeRO would take instead: {', '.join(STAGES)}",
        parse=name_in(STAGES, "stage"),
        metavar="STAGE",
    ),
    Option(name="nodes", help="with --training: number of machines like this one (default 1)", parse=whole_number(1), metavar="N"),
    Option(
        name="prove-min-ram",
        help="run the cases under limits until the smallest RAM that works is known within 5 % (default placement: cpu)",
        switch=True,
    ),
    Option(name="measure", help="measure again how fast RAM and disk are read (1 to 3 s)", switch=True),
    Option(
        name="host",
        help=f"where to listen (default {HOST}; 0.0.0.0: for the whole network)",
        default=HOST,
        metavar="ADDRESS",
    ),
    Option(
        name="port",
        help=f"the port to listen at (default: the first free from {FIRST_PORT})",
        parse=whole_number(1, 65535),
        metavar="N",
    ),
    Option(name="shard", help="most bytes of one file (default: as the model is published)", parse=parse_size, metavar="SIZE"),
)
_OWN = {row.name: row for row in _ROWS}


class _Read(argparse.Action):
    """Read what is given by the row's parser: its sentence is the error."""

    def __init__(self, row: Option, **how: Any) -> None:
        super().__init__(**how, nargs=0 if row.switch else None, metavar=row.metavar, help=row.help.replace("%", "%%"))
        self._row = row

    def __call__(self, _: argparse.ArgumentParser, given: argparse.Namespace, value: Any, *__: object) -> None:
        read = self._row.read(True if self._row.switch else [value] if self._row.repeat else value)
        setattr(given, self.dest, (*(getattr(given, self.dest) or ()), *read) if self._row.repeat else read)


def add_options(parser: argparse._ActionsContainer, command: str, *names: str) -> None:
    """Add the options of these names to a command, in this order; what is not given is None, a switch False.

    They are rows of OPTIONS, as the command means them, or of the command line alone.
    """
    for name in names:
        row = (_OWN.get(name) or OPTION[name]).of_command(command)
        parser.add_argument(row.flag, dest=row.key, action=_Read, row=row, default=False if row.switch else None)


def given_or_default(given: argparse.Namespace, command: str, name: str) -> Any:
    """Return what an option was given, or its default in this command."""
    row = (_OWN.get(name) or OPTION[name]).of_command(command)
    value = getattr(given, row.key)
    return row.default if value is None else value
