"""`fitmatrix fleet COMMAND`: one matrix over many machines; a table of commands as that of `fitmatrix` itself."""

from __future__ import annotations

import argparse

from harness.cli.fleet import bisect, collect, emit, plan, resume, run_live, status

FLEET_COMMANDS = {
    "plan": plan,
    "status": status,
    "collect": collect,
    "resume": resume,
    "run": run_live,
    "emit": emit,
    "bisect": bisect,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in FLEET_COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(fleet_command=module.run)


def run(given: argparse.Namespace) -> int:
    """Run the command that was asked for, as `fitmatrix` runs its own."""
    status: int = given.fleet_command(given)
    return status
