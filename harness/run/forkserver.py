"""The fork server: imports torch and transformers once, and forks the workers (Linux); where it lives, and how it ends.

It is the one of `multiprocessing`, whose private parts it takes to put its socket elsewhere and to end it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import UsageError
from harness.machine import process_tree

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_KEEPER = "harness.worker.reaper"  # first: what it does holds while the others are imported
_PRELOAD = ("harness.worker.preload", "harness.worker.main")
_RESIDENCY = "harness.worker.prefault"  # last: it records which pages the imports have touched
# With these no library finds a GPU, whoever made it; Apple's cannot be hidden. ("CUDA environment variables", "GPU isolation" of
# ROCm, "Environment variables" of DPC++.)
_NO_GPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "ONEAPI_DEVICE_SELECTOR": "*:*;!*:gpu",
}
# What ends a run comes to all processes of a terminal or a job; the parent alone puts things in order.
PARENTS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)}


def warm_up(modules: Sequence[str] = ()) -> None:
    """Start the fork server, importing `modules` besides torch and transformers; returns at once.

    The imports go on in the background; the first worker waits for them. Does nothing where processes are spawned, or when
    the fork server runs already.

    Raises:
        UsageError: there is no place for the fork server's socket.
    """
    if METHOD != "forkserver":
        return
    preload(*_PRELOAD, *modules, _RESIDENCY)
    start()


def preload(*modules: str) -> None:
    """Let the fork server import these, and its keeper, when it starts."""
    multiprocessing.set_forkserver_preload([_KEEPER, *modules])


def live_in(home: Path) -> None:
    """Let the fork server's socket and its temporary files lie in `home`; one that runs already stays where it is."""
    if server()._forkserver_pid is None:
        _config()["tempdir"] = str(home)


def hide_gpus(hide: bool) -> None:
    """Start what comes from now on with no GPU in sight, or with all of them; a fork server that runs already stays as it is."""
    _config()["no_gpu"] = hide


def cool_down(home: Path) -> None:
    """End the fork server that lives in `home`, with all that is below it."""
    if _config().get("tempdir") != str(home):
        return
    del _config()["tempdir"]
    end()


def _config() -> dict[str, Any]:
    """Return what multiprocessing keeps of this process; `tempdir` is where its sockets go, `no_gpu` is ours."""
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]  # typeshed leaves it out
    return config


def server() -> Any:
    """Return multiprocessing's record of the fork server; its `_forkserver_pid` is None while none was started."""
    return multiprocessing.forkserver._forkserver


def has_ended(within_s: float) -> bool:
    """Say whether a fork server was started and has ended; whoever waits for it still can."""
    pid, until_s = server()._forkserver_pid, time.monotonic() + within_s
    while pid is not None and time.monotonic() < until_s:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.01)  # its pipes are closed before it counts as ended
    return False


def end() -> None:
    """Kill the fork server, if there is one, and wait for it: then another can be started."""
    kill()
    with contextlib.suppress(OSError):  # its socket is gone
        server()._stop()


def kill() -> None:
    """Kill the fork server and all that is below it."""
    pid = server()._forkserver_pid
    if pid is not None:
        process_tree.kill_below(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # SIGKILL ends a stopped process as well


def start() -> None:
    """Start the fork server unless it runs. Raises UsageError: there is no place for its socket."""
    try:
        with environment(), no_main(), _deaf():
            multiprocessing.forkserver.ensure_running()
    except OSError as error:
        place = multiprocessing.util.get_temp_dir()
        raise UsageError(f"no process can be started: {error} in {place}; set TMPDIR to a short path on a local disk") from None


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Block the signals that end a run: what is started meanwhile never hears them, and this process hears of them after."""
    multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must run already
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Let what is started find this package, as CPython before 3.12 does not hand it our sys.path, and keep its files at home.

    Importing torch makes a folder for temporary files. Plans number the cards as NVML does, by their place on the bus; CUDA would
    begin with the fastest.
    """
    here = str(Path(__file__).resolve().parents[2])
    settings = {"PYTHONPATH": os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)}
    settings["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if home := _config().get("tempdir"):
        settings["TMPDIR"] = home
    if _config().get("no_gpu"):
        settings |= _NO_GPU
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """Hide the main script while a process starts: multiprocessing would import it (pytest) again in the child."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def end_strays(within_s: float) -> None:
    """End what workers that are gone have left, and wait for it: the fork server has adopted it (`harness.worker.reaper`)."""
    pid, until_s = server()._forkserver_pid, time.monotonic() + within_s
    while pid is not None and time.monotonic() < until_s:
        strays = set(process_tree.children(pid)) - {child.pid for child in multiprocessing.active_children()}
        if not strays:
            return
        for stray in strays:
            process_tree.kill_below(stray)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(stray, signal.SIGKILL)
        time.sleep(0.005)
