"""`fitmatrix COMMAND`, one module each: HELP, `add_arguments` and `run`. Parse, call, print, exit status; no arithmetic.

All of these modules are imported to build the parser, so slow imports are made in `run`.
"""

from __future__ import annotations


def main() -> int:
    """Run the command line; Ctrl-C is answered while what it stands on is imported as well. Returns the exit status."""
    import os

    from harness.machine import garbage, signals

    garbage.collect_seldom()
    heed = signals.end_on_interrupt("nothing was changed", lambda: os._exit(130))  # an exception is lost in what compiles
    from harness.cli import entry

    heed()
    try:
        return entry.main()
    finally:
        garbage.leave_uncollected()
