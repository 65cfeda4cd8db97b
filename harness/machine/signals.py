"""Signals that end a run. The first one is heard, once; whoever must not be cut short holds it back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from harness.core.text import print_note

# What ends a run in order. SIGHUP: its terminal was closed. Windows has the first two.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Terminated(KeyboardInterrupt):
    """Somebody else than the keyboard asked the run to end."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """Return 128 + the number of the signal that stopped a program, as shells say it."""
    return 128 + (signal.Signals[str(stop)] if isinstance(stop, Terminated) else signal.SIGINT)


def say_stopped(kept: str) -> None:
    """Say on standard error that the program was stopped and what was kept, behind the ^C that a terminal shows."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(file=sys.stderr)
    print_note(f"stopped; {kept}")


def end_on_interrupt(kept: str, end: Callable[[], object]) -> Callable[[], None]:
    """Let Ctrl-C say what was kept and call `end`, until the function that is returned is called.

    For the time of imports, which leave nothing behind and whose KeyboardInterrupt nobody answers. What is ignored, or heard
    already, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        say_stopped(kept)
        end()

    def heed() -> None:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    return heed


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let signals that end a run be heard only after the block, whoever listens to them; the block must be short.

    Signals come to the main thread alone, so elsewhere there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    try:
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        before[number](number, None)


class Interrupts:
    """Turns the first signal into a KeyboardInterrupt, as pytest knows it; later ones find the run winding up already.

    `number` is the signal that came. What is ignored already (nohup, a job in the background) stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}
        self._terminals: list[int] = []
        self._held, self._due = 0, False

    def install(self) -> None:
        """Begin to listen; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._terminals = [fd for fd in range(256) if os.isatty(fd)]
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._came)

    def restore(self) -> None:
        """Listen no more; safe to call twice."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back until the end of the block; the block must be short."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._due and not self._held:
            self._raise()

    def hold(self) -> None:
        """Hold signals back for good: the run is at its end."""
        self._held += 1

    @property
    def exit_status(self) -> int | None:
        """128 + the signal's number, as shells say it, for what is not Ctrl-C: pytest has a status for that."""
        return None if self.number in (None, signal.SIGINT) else 128 + int(self.number or 0)

    def _came(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number, self._due = number, True
        if signal.Signals(number).name == "SIGHUP":
            self._leave_terminals()
        if not self._held:
            self._raise()

    def _raise(self) -> None:
        self._due = False
        assert self.number is not None
        raise KeyboardInterrupt if self.number == signal.SIGINT else Terminated(signal.Signals(self.number).name)

    def _leave_terminals(self) -> None:
        """Let everything that would be written to the terminal go nowhere: writing there fails once it is closed."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for terminal in self._terminals:
            with contextlib.suppress(OSError):
                os.dup2(nowhere, terminal, inheritable=os.get_inheritable(terminal))
        os.close(nowhere)
