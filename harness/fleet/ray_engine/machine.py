"""One machine of a cluster, held by one actor. It measures in a process of its own, as pytest on one machine does.

Ray gives its workers an environment of its own, with one OpenMP thread; the run gets that of the node's daemon instead. A run ends
with its actor, by a signal on which it keeps what it has, and until then it has the machine's lease.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.core.errors import HarnessError
from harness.core.records import Machine, Record, encode_record
from harness.core.units import KIB
from harness.fleet import conformity, lease, pytest_run
from harness.fleet.contract import Shard, utc
from harness.fleet.receipt import file_name
from harness.machine import accelerators, probe
from harness.machine.scratch import Scratch
from harness.results.store import NAME

_POLL_S, _BEAT_S, _PATIENCE_S = 0.1, 5.0, 600.0
_LOG_BYTES = 8 * KIB
_OF_RAY = ("raylet", "gcs_server", "ray::", "log_monitor.py", "dashboard.py", "dashboard/agent.py", "runtime_env/agent/main.py")


class MachineEvent(NamedTuple):
    """What a machine sends: "result" a line of results, "receipt" the receipt so far, "log" the last output, "beat" nothing."""

    kind: str
    data: bytes = b""


class Described(Record, frozen=True, kw_only=True):
    """What a machine is: as probed, its versions, its clock, and what Ray's own processes hold of its RAM."""

    machine: Machine
    versions: dict[str, str]
    clock: str
    ray_bytes: int


class HeldMachine:
    """The actor: everything that happens on its machine."""

    def __init__(self, name: str, node: str) -> None:
        self._name = name
        self._lease = lease.lease_file(node)

    def describe(self) -> Described:
        """Return what this machine is."""
        machine = accelerators.usable(probe.probe(), ask=False)
        return Described(machine=machine, versions=probe.versions(), clock=utc(), ray_bytes=_ray_bytes())

    def run(self, shard: Shard, cases: Mapping[str, str]) -> Iterator[MachineEvent]:
        """Measure a shard with the test files of `cases`, and yield what comes while it comes.

        It waits for whoever has the machine: a run that a cluster has given up, and that still winds up.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not lease.is_free(self._lease) and time.monotonic() < deadline:
            yield MachineEvent("beat")
            time.sleep(_POLL_S * 5)
        try:
            with Scratch() as folder:
                pytest_run.lay_out(folder, cases)
                (folder / "shard.json").write_bytes(encode_record(shard))
                yield from self._measure(folder, shard)
        except HarnessError as error:
            yield MachineEvent("log", str(error).encode())

    def _measure(self, folder: Path, shard: Shard) -> Iterator[MachineEvent]:
        with pytest_run.measuring(sys.executable, folder, ["--shard", "shard.json"], self._environment()) as process:
            yield from _followed(process, folder / pytest_run.RUN_RESULTS, file_name(shard.name))
        yield MachineEvent("log", (folder / pytest_run.RUN_LOG).read_bytes()[-_LOG_BYTES:])

    def _environment(self) -> dict[str, str]:
        """Return the environment of the node's daemon, which Ray's workers no longer have, without what is Ray's own."""
        try:
            found = psutil.Process(os.getppid()).environ()
        except psutil.Error:
            found = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        kept = {name: value for name, value in found.items() if not name.startswith("RAY_")}
        return kept | {conformity.MACHINE_NAME: self._name, lease.LEASE: str(self._lease), "PYTHONUNBUFFERED": "1"}


def _followed(process: subprocess.Popen[bytes], results: Path, receipt: str) -> Iterator[MachineEvent]:
    """Yield lines and receipts as they are written, until the process has ended and all of them are out.

    A receipt comes behind the lines that it vouches for: whatever ends the machine, none is vouched for that did not come.
    """
    seen, told, beat_s = b"", 0, time.monotonic()
    while True:
        is_over = process.poll() is not None
        now = _bytes_of(results / receipt)
        lines, told = _new_lines(results / NAME, told)
        yield from (MachineEvent("result", line) for line in lines)
        if now != seen:
            seen, beat_s = now, time.monotonic()
            yield MachineEvent("receipt", now)
        if is_over:
            return
        if time.monotonic() - beat_s > _BEAT_S:
            beat_s = time.monotonic()
            yield MachineEvent("beat")
        time.sleep(_POLL_S)


def _bytes_of(path: Path, start: int = 0) -> bytes:
    """Return what a file holds from a place on, nothing if it is not there yet."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


def _new_lines(path: Path, told: int) -> tuple[list[bytes], int]:
    """Return the whole lines behind the first `told` bytes of a file, and how many bytes are told then."""
    new = _bytes_of(path, told)
    whole = new[: new.rfind(b"\n") + 1]
    return whole.splitlines(keepends=True), told + len(whole)


def _ray_bytes() -> int:
    """Return what Ray's processes on this machine hold in RAM; what is free was measured beside them, so it is without that."""
    total = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        words = " ".join(process.info["cmdline"] or ())
        if any(part in words for part in _OF_RAY) and process.info["memory_info"]:
            total += process.info["memory_info"].rss
    return total
