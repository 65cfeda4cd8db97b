"""The options of the commands: rows of the table of a run, and rows of the command line alone, read by the same parsers."""

from __future__ import annotations

import argparse
from typing import Any

from harness.core.options import OPTION, Meaning, Option, name_in, whole_number
from harness.core.units import parse_capacity
from harness.planning.zero import STAGES

HOST, FIRST_PORT = "127.0.0.1", 7860

_ROWS = (
    Option(name="file", help="GGUF file of MODEL, if it has several", metavar="NAME"),
    Option(name="revision", help="branch, tag or commit on the hub", metavar="NAME"),
    Option(name="json", help="print one JSON object", switch=True),
    Option(
        name="gpu",
        help='plan for a machine with this GPU, "RTX 3060 12GB" or 8GiB (repeatable)',
        in_command={"hardware": Meaning(help='its GPU, "RTX 3060 12GB" or 8GiB (repeatable)')},
        repeat=True,
        metavar="NAME|SIZE",
    ),
    Option(
        name="disk",
        help="plan for a machine with this much free disk space, e.g. 500GB",
        in_command={"hardware": Meaning(help="its free disk space, e.g. 500GB")},
        parse=parse_capacity,
        metavar="SIZE",
    ),
    Option(
        name="context",
        help="plan for this many tokens, prompt and answer together",
        parse=whole_number(3),
        metavar="N",
    ),
    Option(name="code", help="print a script that loads the model and generates, for a case such as int8/direct", metavar="CASE"),
    Option(name="explain", help="show every term of the estimate for a case such as int8/direct", metavar="CASE"),
    Option(
        name="training",
        help=f"estimate training with DeepSpeed ZeRO instead: {', '.join(STAGES)}",
        parse=name_in(STAGES, "stage"),
        metavar="STAGE",
    ),
    Option(name="nodes", help="with --training: number of machines like this one (default 1)", parse=whole_number(1), metavar="N"),
    Option(
        name="prove-min-ram",
        help="run the cases under RAM limits to find the smallest RAM that works, within 5 % (default placement: cpu)",
        switch=True,
    ),
    Option(name="measure", help="measure the read bandwidth of RAM and disk again (1 to 3 s)", switch=True),
    Option(name="dry-run", help="show what the results say and keep nothing", switch=True),
    Option(name="reset", help="forget what was kept for this machine", switch=True),
    Option(
        name="host",
        help=f"address to listen on (default {HOST}; 0.0.0.0 opens it to the whole network)",
        default=HOST,
        metavar="ADDRESS",
    ),
    Option(
        name="port",
        help=f"port to listen on (default: the first free one from {FIRST_PORT})",
        parse=whole_number(1, 65535),
        metavar="N",
    ),
    Option(name="shard", help="largest size of a file (default: as published)", parse=parse_capacity, metavar="SIZE"),
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
