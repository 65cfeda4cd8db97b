"""Signals that end a run: the first is heard, once, and never in the middle of what must not be cut short."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from harness.machine.signals import Interrupts, Terminated, deferred

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = [signal.getsignal(number) for number in NUMBERS]
    interrupts = Interrupts()
    yield interrupts
    interrupts.restore()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "raised", "status"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, Terminated, 143)]
)
def test_the_first_signal_is_an_interrupt(interrupts: Interrupts, number: int, raised: type, status: int | None) -> None:
    interrupts.install()
    with pytest.raises(raised) as caught:
        send(number)
    assert caught.type is raised
    assert interrupts.exit_status == status


def test_later_signals_find_the_run_winding_up(interrupts: Interrupts) -> None:
    interrupts.install()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    for number in NUMBERS[:2]:
        send(number)
    assert interrupts.number == signal.SIGINT


def test_what_must_not_be_cut_short_is_not(interrupts: Interrupts) -> None:
    interrupts.install()
    done = []

    def careful() -> None:
        with interrupts.deferred():
            with interrupts.deferred():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")

    with pytest.raises(Terminated):
        careful()
    assert done == ["inner", "outer"]


def test_at_the_end_a_signal_is_only_noted(interrupts: Interrupts) -> None:
    interrupts.install()
    interrupts.hold()
    send(signal.SIGTERM)
    with interrupts.deferred():
        pass
    assert interrupts.exit_status == 143


def test_what_is_ignored_stays_ignored(interrupts: Interrupts) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupts.install()
        send(signal.SIGHUP)
    finally:
        interrupts.restore()
        signal.signal(signal.SIGHUP, before)
    assert interrupts.number is None


def test_nothing_is_written_to_a_terminal_that_is_gone(interrupts: Interrupts) -> None:
    controller, terminal = os.openpty()
    try:
        interrupts.install()
        os.close(controller)
        with pytest.raises(OSError, match="Input/output"):
            os.write(terminal, b"before")
        interrupts.hold()
        interrupts._terminals = [terminal]  # that of the tests stays as it is
        send(signal.SIGHUP)
        assert os.write(terminal, b"after") == 5
    finally:
        os.close(terminal)
    assert interrupts.exit_status == 129


@pytest.mark.parametrize("listens", [True, False], ids=["Interrupts", "Python alone"])
def test_a_deferred_signal_is_heard_after_the_block_by_whoever_listens(interrupts: Interrupts, listens: bool) -> None:
    if listens:
        interrupts.install()
    before, done = signal.getsignal(signal.SIGINT), []

    def careful() -> None:
        with deferred(), deferred():
            send(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        careful()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) == before


def test_an_error_in_the_block_is_not_lost_to_a_deferral() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="no program"), deferred():
        raise OSError("no program")
    assert signal.getsignal(signal.SIGINT) is before
