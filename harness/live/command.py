"""`fitmatrix watch`: what is in memory while a case runs, on a live screen, once, or as lines for programs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from harness.core.errors import UsageError
from harness.core.text import print_note

if TYPE_CHECKING:
    from harness.live.stream import Stream

_EVERY_S = 1.0


def run(pid: int | None, *, once: bool, as_json: bool) -> int:
    """Show frames until Ctrl-C, `q`, or the end of the process that was asked for; returns 0.

    Raises:
        UsageError: no such process, or Textual is missing for the live screen.
        KeyboardInterrupt: Ctrl-C, which the live screen reads as a key.
    """
    from harness.live import reading
    from harness.live.stream import Stream
    from harness.live.subject import WatchTarget

    target = WatchTarget(pid)
    with reading.sensors() as sensors:
        stream = Stream(target, sensors)
        if once:
            return _once(stream, pid, as_json=as_json)
        if as_json or not _is_terminal():
            return _lines(stream, pid, as_json=as_json)
        return _screen(stream)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _once(stream: Stream, pid: int | None, *, as_json: bool) -> int:
    from harness.live.stream import look_twice

    try:
        frame = look_twice(stream)
    except ProcessLookupError:
        return _ended(pid)
    if as_json:
        _print_json(frame)
        return 0
    from rich.console import Console

    from harness.live import render

    console = Console(highlight=False, markup=False, soft_wrap=True)
    drawn = render.lines(frame, console.width)
    if console.options.ascii_only:
        render.in_ascii(drawn)
    with console.capture() as captured:  # rich's own print ends the program when a reader leaves
        for line in drawn:
            console.print(line)
    sys.stdout.write(captured.get())
    return 0


def _lines(stream: Stream, pid: int | None, *, as_json: bool) -> int:
    """Print a line a second, at once, for whoever reads."""
    from harness.live.stream import frames

    if not as_json:
        print_note("this is no terminal: a line a second (--json for programs, --once for one look)")
    for frame in frames(stream, _EVERY_S):
        if as_json:
            _print_json(frame)
        else:
            from harness.live.render import one_line

            print(one_line(frame), flush=True)
    return _ended(pid)


def _print_json(frame: object) -> None:
    """Print one object on one line, in ASCII: standard output may have any encoding."""
    import json

    import msgspec

    print(json.dumps(msgspec.to_builtins(frame)), flush=True)


def _ended(pid: int | None) -> int:
    print_note(f"process {pid} has ended")
    return 0


def _screen(stream: Stream) -> int:
    from importlib.util import find_spec

    if find_spec("textual") is None:
        raise UsageError("the live screen needs the package textual: pip install fitmatrix[watch]; --once and --json do without")
    from harness.live.screen import INTERRUPTED, Screen

    screen = Screen(stream)
    why = screen.run()
    if screen.return_code == INTERRUPTED:
        raise KeyboardInterrupt
    if why:
        print_note(why)
    return screen.return_code or 0  # Textual prints what ended it
