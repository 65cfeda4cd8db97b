"""One worker process: start it, ask it, end it with everything it started.

On Linux the worker is forked by a fork server that has torch, transformers and the model's classes imported, so a case
costs no import time and shares nothing else; elsewhere it is spawned. It leads a process group of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from harness.core.errors import WorkerError
from harness.machine import process_tree
from harness.measure import protocol
from harness.measure.protocol import Entered, Event, Lost, Request, Shared
from harness.run import forkserver
from harness.run.deadline import Deadline

WorkerMain = Callable[[Connection, str, str], None]

_GRACE_S = 2.0
# Tearing down a process with tens of gigabytes on a card takes longer than this machine's own memory does, and what is not awaited
# costs a new fork server.
_GPU_GRACE_S = 20.0
_START_S = 600.0  # the first worker waits for the fork server's imports
_LOG_MOST, _LOG_KEEP = 4 << 20, 32 << 10
_MESSAGE_MOST = 64 << 20  # what claims to be longer was written to the pipe by somebody else
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def _child(main: WorkerMain, pipe: Connection, log: str, scratch: str) -> None:
    """Run `main` in the new process."""
    if not Path(scratch).is_dir():
        return  # Ctrl-C while the fork server was busy importing: the parent has given the case up
    _let_go_of_fork_server()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forkserver.PARENTS - {signal.SIGINT})  # the fork server is deaf to them
    main(pipe, log, scratch)


def _let_go_of_fork_server() -> None:
    """Close the pipe that keeps the fork server alive as long as any process has it open.

    So it ends with the parent, and takes along a worker that is too busy to see the parent's end (PR_SET_PDEATHSIG).
    """
    server = forkserver.server()
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def torch_worker(pipe: Connection, log: str, scratch: str) -> None:
    """Be the real worker. Imported by name, in the child only: the parent never imports torch."""
    importlib.import_module("harness.worker.main").main(pipe, log, scratch)


class Ended(Exception):
    """The worker ended, or was ended, before it answered. `ended_by` names who ended it, None if nobody here did.

    `rank` is the first process to end, and `note` what each of them did at a limit of time, of several that share a model.
    """

    def __init__(self, *, exit_code: int | None, ended_by: str | None, rank: int | None = None, note: str | None = None) -> None:
        super().__init__(f"worker ended with {exit_code} ({ended_by})")
        self.exit_code, self.ended_by, self.rank, self.note = exit_code, ended_by, rank, note


def _started(main: WorkerMain, log: Path, scratch: Path, start_s: float) -> tuple[Connection, Any]:
    """Start a process; return the parent's end of its pipe, and the process.

    Raises:
        EOFError, ConnectionError: the fork server is gone, or did not answer in time and was killed.
    """
    context = multiprocessing.get_context(forkserver.METHOD)
    pipe, theirs = context.Pipe()
    # mypy: the stubs of get_context(str) know no Process
    process = context.Process(  # type: ignore[attr-defined]  # as said above
        target=_child, args=(main, theirs, str(log), str(scratch)), name="fitmatrix worker", daemon=True
    )
    try:
        if forkserver.METHOD == "forkserver":
            forkserver.start()
        with forkserver.environment(), forkserver.no_main(), _watchdog(min(start_s, _START_S), forkserver.kill):
            process.start()
    except BaseException:
        pipe.close()  # a worker that began nevertheless sees the end of its pipe
        raise
    finally:
        theirs.close()
    return pipe, process


@contextlib.contextmanager
def _watchdog(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Act if the block takes longer: what it waits for in the kernel takes no limit of time."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Worker:
    """A child process that speaks `harness.measure.protocol`. `phase` is the last phase that it entered.

    `ranks` are the ids of the processes that share its model, if it has started several.
    """

    def __init__(self, main: WorkerMain, *, log: Path, scratch: Path, start_s: float = _START_S) -> None:
        """Start it. The fork server is given `start_s` seconds; a stopped one would never answer, and is replaced."""
        self.log, self.phase = log, "start"
        self.uses_gpu = False  #: it is given longer to end
        self.ranks: Sequence[int] = ()
        self._ended_by: str | None = None
        self._note: str | None = None
        self._is_gone = False
        log.touch()
        try:
            self._pipe, self._process = _started(main, log, scratch, start_s)
        except (EOFError, ConnectionError):  # the fork server was killed: another one takes its place
            forkserver.end()
            self._pipe, self._process = _started(main, log, scratch, _START_S)

    @property
    def _grace_s(self) -> float:
        return _GPU_GRACE_S if self.uses_gpu else _GRACE_S

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def ask(self, request: Request, deadline: Deadline) -> Event:
        """Send a request and wait for its answer, blocking, until the deadline at most.

        Raises:
            Ended: the process died, or the time is over and it was killed.
            WorkerError: it sent something that is no message; it was killed.
        """
        try:
            deadline.begin_phase()
            self._send(request)
            while isinstance(event := self._next(deadline), Entered):
                self.phase = event.phase
                deadline.begin_phase()
        except KeyboardInterrupt:  # no one waits for the answer any more
            self.kill()
            raise
        if isinstance(event, Lost):
            raise self._lost(event)
        if isinstance(event, Shared):
            self.ranks = event.pids
        return event

    def wait(self) -> NoReturn:
        """Wait until the process ends, without being asked to. Raises Ended."""
        try:
            multiprocessing.connection.wait([self._process.sentinel])
        except KeyboardInterrupt:
            self.kill()
            raise
        raise self._dead()

    def _send(self, request: Request) -> None:
        try:
            self._pipe.send_bytes(protocol.encode(request))
        except (BrokenPipeError, ConnectionResetError):
            raise self._dead() from None

    def _next(self, deadline: Deadline) -> Event:
        look_at = [self._pipe, self._process.sentinel]
        ready = deadline.wait(lambda most_s: multiprocessing.connection.wait(look_at, timeout=most_s))
        if self._pipe in ready:
            return self._decode(self._receive(deadline))
        if not ready:
            self._time_over(deadline.reached)
        raise self._dead()

    def _receive(self, deadline: Deadline) -> bytes:
        """Read the message that has begun to arrive; a worker that stops in the middle of it is killed when the time is over."""
        try:
            with _watchdog(max(deadline.left_s, _GRACE_S), lambda: self._time_over(deadline.reached)):
                return self._pipe.recv_bytes(_MESSAGE_MOST)
        except (EOFError, OSError) as error:
            if self._pipe.readable:  # the length was fine, so it ended, perhaps in the middle of the message
                raise self._dead() from None
            self.kill()
            raise WorkerError(f"the worker's pipe carries what is no message: {error}") from None

    def _time_over(self, limit: str) -> None:
        self._ended_by = limit
        if self.ranks:
            self._note = ", ".join(f"rank {number} was {process_tree.process_status(pid)}" for number, pid in enumerate(self.ranks))
        self._process.kill()

    def _decode(self, line: bytes) -> Event:
        try:
            return protocol.decode_event(line)
        except msgspec.DecodeError as error:
            self.kill()
            raise WorkerError(f"the worker sent {line[:80]!r}, which is no message: {error}") from None

    def _lost(self, lost: Lost) -> Ended:
        """One of several processes has ended: by itself, or because all were ended."""
        self.kill()
        return Ended(exit_code=lost.exit_code, ended_by=self._ended_by, rank=None if self._ended_by else lost.rank)

    def _dead(self) -> Ended:
        self._process.join(_GRACE_S)
        if self._process.is_alive() and self._ended_by is None:  # it closed the pipe and stays
            self._ended_by = "protocol"
        # multiprocessing knows of no exit code then, and says 255
        if self._ended_by is None and self._process.exitcode == 255 and forkserver.has_ended(within_s=_GRACE_S):
            self._ended_by = "fork server"
        self.kill()
        return Ended(exit_code=self._process.exitcode, ended_by=self._ended_by, note=self._note)

    def end(self, reason: str) -> None:
        """Kill the worker and all that it started, from any thread; who waits for an answer gets the first reason as `ended_by`."""
        self._ended_by = self._ended_by or reason
        self._kill_group()

    def stop(self) -> None:
        """End the worker: politely first, then by force; whatever it started goes with it."""
        try:
            if self._process.is_alive():
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._pipe.send_bytes(protocol.encode(protocol.Stop()))
                self._process.join(self._grace_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the worker's process group and whatever else it started, and wait for the worker. Does nothing twice."""
        if self._is_gone:
            return
        self._kill_group()
        self._process.join(self._grace_s)
        if self._process.is_alive():  # the fork server, which would report the end, is stopped
            forkserver.end()
            self._process.join(_GRACE_S)
        forkserver.end_strays(within_s=_GRACE_S)
        self._pipe.close()
        self._is_gone = not self._process.is_alive()

    def _kill_group(self) -> None:
        if self._is_gone:  # by now its id may be another process's
            return
        process_tree.kill_below(self.pid)
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # the worker made itself the leader of a group
        if self._process.is_alive():
            self._process.kill()

    def log_tail(self) -> str:
        """Return the last lines of what the worker printed, without colors and progress bars' repeats."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - _LOG_KEEP, 0))
                data = file.read()
        except FileNotFoundError:  # code of the model may have removed it
            return ""
        lines = [line.rsplit(b"\r", 1)[-1].rstrip() for line in _ANSI.sub(b"", data).split(b"\n")]
        return "\n".join(_unrepeated(line.decode("utf-8", "replace") for line in lines if line))

    def trim_log(self) -> None:
        """Keep the log file bounded; the worker appends, so it goes on at the new end."""
        if self.log.stat().st_size <= _LOG_MOST:
            return
        with self.log.open("r+b") as file:
            file.seek(-_LOG_KEEP, os.SEEK_END)
            tail = file.read()
            file.truncate(0)
            file.seek(0)
            file.write(tail)


def _unrepeated(lines: Iterator[str], most: int = 60) -> list[str]:
    """Collapse runs of the same line (bitsandbytes warns once per layer and token) and keep the last `most`."""
    kept: list[tuple[str, int]] = []
    for line in lines:
        if kept and kept[-1][0] == line:
            kept[-1] = (line, kept[-1][1] + 1)
        else:
            kept.append((line, 1))
    return [line if count == 1 else f"{line} [{count} times]" for line, count in kept[-most:]]
