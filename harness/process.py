"""One worker process: start it, ask it, end it with everything it started.

On Linux the worker is forked by a fork server that has torch, transformers and the model's classes imported, so a case
costs no import time and shares nothing else; elsewhere it is spawned. It leads a process group of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from harness import protocol
from harness.errors import UsageError, WorkerError
from harness.protocol import Entered, Event, Request

WorkerMain = Callable[[Connection, str, str], None]

_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_PRELOAD = ("harness.worker.preload", "harness.worker.main")
_RESIDENCY = "harness.worker.residency"  # last: it records which pages the imports have touched
_GRACE_S = 2.0
_LOG_MOST, _LOG_KEEP = 4 << 20, 32 << 10
_MESSAGE_MOST = 64 << 20  # what claims to be longer was written to the pipe by somebody else
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def warm_up(modules: Sequence[str] = ()) -> None:
    """Start the fork server, importing `modules` besides torch and transformers; returns at once.

    The imports go on in the background; the first worker waits for them. Does nothing where processes are spawned, or when
    the fork server runs already.

    Raises:
        UsageError: there is no place for the fork server's socket.
    """
    if _METHOD != "forkserver":
        return
    multiprocessing.set_forkserver_preload([*_PRELOAD, *modules, _RESIDENCY])
    _start_fork_server()


def _start_fork_server() -> None:
    """Start the fork server unless it runs. Raises UsageError: there is no place for its socket."""
    try:
        with _import_path(), _no_main(), _deaf():
            multiprocessing.forkserver.ensure_running()
    except OSError as error:
        place = multiprocessing.util.get_temp_dir()
        raise UsageError(f"no process can be started: {error} in {place}; set TMPDIR to a short path on a local disk") from None


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Block SIGINT: what is started meanwhile never hears Ctrl-C, which is this process's to handle, and hears of it after."""
    multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must run already
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _import_path() -> Iterator[None]:
    """Let the fork server find this package: CPython before 3.12 does not hand it our sys.path."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (here, before) if part)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Hide the main script while a process starts: multiprocessing would import it (pytest) again in the child."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def _child(main: WorkerMain, pipe: Connection, log: str, scratch: str) -> None:
    """Run `main` in the new process."""
    if not Path(scratch).is_dir():
        return  # Ctrl-C while the fork server was busy importing: the parent has given the case up
    _let_go_of_fork_server()
    main(pipe, log, scratch)


def _let_go_of_fork_server() -> None:
    """Close the pipe that keeps the fork server alive as long as anybody holds it.

    So it ends with the parent, and takes along a worker that is too busy to see the parent's end (PR_SET_PDEATHSIG).
    """
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def torch_worker(pipe: Connection, log: str, scratch: str) -> None:
    """Be the real worker. Imported by name, in the child only: the parent never imports torch."""
    importlib.import_module("harness.worker.main").main(pipe, log, scratch)


class Ended(Exception):
    """The worker ended, or was ended, before it answered. `ended_by` says who did it: None is not us."""

    def __init__(self, *, exit_code: int | None, ended_by: str | None) -> None:
        super().__init__(f"worker ended with {exit_code} ({ended_by})")
        self.exit_code, self.ended_by = exit_code, ended_by


class Worker:
    """A child process that speaks `harness.protocol`. `phase` is the last phase that it entered."""

    def __init__(self, main: WorkerMain, *, log: Path, scratch: Path) -> None:
        context = multiprocessing.get_context(_METHOD)
        self._pipe, theirs = context.Pipe()
        self.log, self.phase, self.entered_s = log, "start", time.monotonic()
        self._ended_by: str | None = None
        log.touch()
        # mypy: the stubs of get_context(str) know no Process
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_child, args=(main, theirs, str(log), str(scratch)), name="fitmatrix worker", daemon=True
        )
        try:
            if _METHOD == "forkserver":
                _start_fork_server()
            with _import_path(), _no_main():
                self._process.start()
        except BaseException:
            self._pipe.close()  # a worker that began nevertheless sees the end of its pipe
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def ask(self, request: Request, *, until_s: float) -> Event:
        """Send a request and wait for its answer, blocking, at most until the monotonic clock shows `until_s`.

        Raises:
            Ended: the process died, or the time is over and it was killed.
            WorkerError: it sent something that is no message; it was killed.
        """
        try:
            self._send(request)
            while isinstance(event := self._next(until_s), Entered):
                self.phase, self.entered_s = event.phase, event.at_s
        except KeyboardInterrupt:  # nobody waits for the answer any more
            self.kill()
            raise
        return event

    def _send(self, request: Request) -> None:
        try:
            self._pipe.send_bytes(protocol.encode(request))
        except (BrokenPipeError, ConnectionResetError):
            raise self._dead() from None

    def _next(self, until_s: float) -> Event:
        left = max(until_s - time.monotonic(), 0)
        ready = multiprocessing.connection.wait([self._pipe, self._process.sentinel], timeout=left)
        if self._pipe in ready:
            return self._decode(self._receive(until_s))
        if not ready:
            self._time_over()
        raise self._dead()

    def _receive(self, until_s: float) -> bytes:
        """Read the message that has begun to arrive; a worker that stops in the middle of it is killed when the time is over."""
        watchdog = threading.Timer(max(until_s - time.monotonic(), _GRACE_S), self._time_over)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self._pipe.recv_bytes(_MESSAGE_MOST)
        except (EOFError, OSError) as error:
            if self._pipe.readable:  # the length was fine, so it ended, perhaps in the middle of the message
                raise self._dead() from None
            self.kill()
            raise WorkerError(f"the worker's pipe carries what is no message: {error}") from None
        finally:
            watchdog.cancel()

    def _time_over(self) -> None:
        self._ended_by = "timeout"
        self._process.kill()

    def _decode(self, line: bytes) -> Event:
        try:
            return protocol.decode_event(line)
        except msgspec.DecodeError as error:
            self.kill()
            raise WorkerError(f"the worker sent {line[:80]!r}, which is no message: {error}") from None

    def _dead(self) -> Ended:
        self._process.join(_GRACE_S)
        if self._process.is_alive():  # it closed the pipe and stays
            self._ended_by = "protocol"
        self.kill()
        return Ended(exit_code=self._process.exitcode, ended_by=self._ended_by)

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
                self._process.join(_GRACE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the worker's process group, and wait for the worker."""
        self._kill_group()
        self._process.join()
        self._pipe.close()

    def _kill_group(self) -> None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # the worker made itself the leader of a group
        if self._process.is_alive():
            self._process.kill()

    def log_tail(self) -> str:
        """Return the last lines of what the worker printed, without colours and progress bars' repeats."""
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
