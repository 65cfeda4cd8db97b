"""Several processes that share a model, and the one that leads them: what torchrun and its processes are to a program.

The leader is none of them and touches no model. It hands every request on and answers when all ranks have, with the figures of all
together; or at once when one fails or dies, for the others then hang in a collective, where no thread of theirs would notice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

import torch
from msgspec.structs import replace

from harness.core.records import Loaded, Phase
from harness.measure import protocol, sampler
from harness.measure.protocol import Answered, Confine, Confined, Entered, Failed, LoadDone, Lost, Request, Score

_HOST = "127.0.0.1"
# Unless the user says otherwise: torchrun has one thread in each process, and all of them are on this machine, so that nobody
# beyond it needs to reach what they listen on.
_DEFAULTS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_CAUSE_S = 0.5  # when a rank dies, the others fail for it at about the same time
_REAP_S = 2.0  # what has closed its pipe ends within that
_MEET = timedelta(hours=1)  # a limit of ours would come before those of the case


class Rank(NamedTuple):
    """One of the processes, and the leader's end of its pipe."""

    pid: int
    pipe: Connection


def lead(pipe: Connection, count: int, serve: Callable[[Connection], None]) -> None:
    """Fork `count` ranks, each of which runs `serve` on a pipe of its own, and lead them until `pipe` says stop."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    ranks: list[Rank] = []
    for number in range(count):
        ranks.append(_forked(serve, _environment(number, count, port), [pipe, listener, *(rank.pipe for rank in ranks)]))
    # Where the ranks meet, as torchrun has it. Its thread must not be there before the forks.
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
        _HOST, port, is_master=True, wait_for_workers=False, timeout=_MEET, master_listen_fd=listener.detach()
    )
    _Leader(pipe, ranks, store).serve()


def _forked(
    serve: Callable[[Connection], None], environment: Mapping[str, str], not_its: Iterable[Connection | socket.socket]
) -> Rank:
    """Fork a rank; `not_its` are the leader's ends, which would keep the pipes of others open."""
    ours, theirs = multiprocessing.Pipe()
    pid = os.fork()
    if not pid:
        try:
            for end in (ours, *not_its):
                end.close()
            if "OMP_NUM_THREADS" not in os.environ:  # the library has read it long ago
                torch.set_num_threads(int(_DEFAULTS["OMP_NUM_THREADS"]))
            os.environ.update({**_DEFAULTS, **os.environ, **environment})
            serve(theirs)
        finally:
            _leave(sys.exc_info()[1])  # never back into what the leader does
    theirs.close()
    return Rank(pid, ours)


def _leave(error: BaseException | None) -> NoReturn:
    """End this process as Python would, without what it does at its end."""
    status = 0 if error is None else 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun tells its processes (torch.distributed, "Environment Variables")."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


class _Leader:
    """The loop: one request, handed to all, one answer. `store`, where the ranks meet, is kept as long as they live."""

    def __init__(self, pipe: Connection, ranks: Sequence[Rank], store: object) -> None:
        self._pipe, self._ranks, self._store = pipe, ranks, store
        self._number = {rank.pipe: number for number, rank in enumerate(ranks)}

    def serve(self) -> None:
        self._send(protocol.Shared(pids=[rank.pid for rank in self._ranks]))
        while True:
            try:
                request = protocol.decode_request(self._pipe.recv_bytes())
            except EOFError:  # the parent is gone: end all, and this process
                os.killpg(0, signal.SIGKILL)
                return
            if isinstance(request, protocol.Stop):
                break
            answer = self._answer(request)
            if isinstance(answer, (Failed, Lost)):
                self._end()  # the others can never go on
            self._send(answer)
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send_bytes(protocol.encode(protocol.Stop()))
        for number in range(len(self._ranks)):
            self._reaped(number)

    def _send(self, event: protocol.Message) -> None:
        self._pipe.send_bytes(protocol.encode(event))

    def _answer(self, request: Request) -> Answered:
        for number, rank in enumerate(self._ranks):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # reading will tell
                rank.pipe.send_bytes(protocol.encode(_part(request, number)))
        answers: dict[int, Answered] = {}
        entered, told = [0] * len(self._ranks), 0
        while waiting := [rank.pipe for number, rank in enumerate(self._ranks) if number not in answers]:
            for pipe in connection.wait(waiting):
                assert isinstance(pipe, Connection)
                number, event = self._number[pipe], self._read(pipe)
                if isinstance(event, Lost):
                    return event
                if isinstance(event, Failed):
                    return self._lost_meanwhile([other for other in waiting if other is not pipe]) or _of(number, event)
                if not isinstance(event, Entered):
                    answers[number] = event
                    continue
                entered[number] += 1
                if entered[number] > told:  # a phase begins with the first that enters it
                    told += 1
                    self._send(event)
        doubled = sampler.doubled_bytes(rank.pid for rank in self._ranks)
        return run_together([answers[number] for number in sorted(answers)], doubled)

    def _read(self, pipe: Connection) -> protocol.Event:
        try:
            return protocol.decode_event(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            number = self._number[pipe]
            return Lost(rank=number, exit_code=self._reaped(number))

    def _lost_meanwhile(self, others: list[Connection]) -> Lost | None:
        """Return the rank that has died, if one has: another that fails with it only tells of that."""
        until_s = time.monotonic() + _CAUSE_S
        while others and (ready := connection.wait(others, max(until_s - time.monotonic(), 0))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                event = self._read(pipe)
                if isinstance(event, Lost):
                    return event
                if not isinstance(event, Entered):
                    others.remove(pipe)
        return None

    def _reaped(self, number: int) -> int | None:
        """Wait for a rank that ends, and return its exit code; None if it does not end."""
        until_s = time.monotonic() + _REAP_S
        while time.monotonic() < until_s:
            try:
                pid, status = os.waitpid(self._ranks[number].pid, os.WNOHANG)
            except ChildProcessError:  # reaped before
                return None
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def _end(self) -> None:
        for rank in self._ranks:  # all at once: it takes a while to free a GPU
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        for number in range(len(self._ranks)):
            self._reaped(number)


def _part(request: Request, rank: int) -> Request:
    """Return what one rank is told: a GPU for each; and what is predicted, all compute but the first alone keeps and compares.

    All must be asked the same: ranks that compute on inputs of other shapes wait for one another for ever.
    """
    if isinstance(request, Confine):
        return replace(request, gpus=request.gpus[rank : rank + 1])
    return replace(request, keep=None, reference=None) if isinstance(request, Score) and rank else request


def _of(rank: int, failed: Failed) -> Failed:
    """Say which rank failed. Of the phases only the times stand: the peaks of one rank are not those of all, which were sampled."""
    phases = [replace(phase, ram_peak_bytes=None, sampled=True) for phase in failed.phases]
    return replace(failed, rank=rank, phases=phases)


def run_together(answers: Sequence[Answered], doubled_bytes: int) -> Answered:
    """Return one answer for those of all ranks to one request: the first one's, with memory added up.

    `doubled_bytes` of the resident memory are pages of files that several ranks map, which count once.
    """
    first = answers[0]
    if isinstance(first, Confined):
        confined = [one for one in answers if isinstance(one, Confined)]
        return Confined(
            file_bytes=max(one.file_bytes for one in confined),
            anon_bytes=sum(one.anon_bytes for one in confined),
            shared_bytes=sum(one.shared_bytes for one in confined),
        )
    assert not isinstance(first, (protocol.Shared, protocol.Chatting, Failed, Lost))
    parts = zip(*(one.phases for one in answers if isinstance(one, type(first))), strict=True)
    phases = [_phase(same, doubled_bytes) for same in parts]
    if isinstance(first, LoadDone):
        return replace(first, loaded=_loaded([one.loaded for one in answers if isinstance(one, LoadDone)]), phases=phases)
    return replace(first, phases=phases)


def _phase(same: Sequence[Phase], doubled_bytes: int) -> Phase:
    """Add up a phase of all ranks, which go through it in step: their peaks are taken to come at once.

    `doubled_bytes` are those at the end of the request, of which an earlier phase may have had fewer.
    """
    sampled = any(phase.sampled for phase in same)
    peaks = [phase.ram_peak_bytes or 0 for phase in same]
    read = [phase.disk_read_bytes for phase in same if phase.disk_read_bytes is not None]
    return replace(
        same[0],
        ram_peak_bytes=None if sampled else max(sum(peaks) - doubled_bytes, *peaks),
        ram_anon_bytes=sum(phase.ram_anon_bytes or 0 for phase in same),
        sampled=sampled,
        disk_read_bytes=sum(read) if len(read) == len(same) else None,
        vram_peak_bytes=_sum(phase.vram_peak_bytes for phase in same),
        vram_reserved_bytes=_sum(phase.vram_reserved_bytes for phase in same),
    )


def _loaded(parts: Sequence[Loaded]) -> Loaded:
    return replace(
        parts[0],
        dtype_bytes=_sum(part.dtype_bytes for part in parts),
        linear_dtype_bytes=_sum(part.linear_dtype_bytes for part in parts),
        tier_bytes=_sum(part.tier_bytes for part in parts),
        device_map={f"rank {number}": max(part.tier_bytes, key=part.tier_bytes.__getitem__) for number, part in enumerate(parts)},
        rank_bytes=[sum(part.tier_bytes.values()) for part in parts],
        mapped_bytes=None if parts[0].mapped_bytes is None else sum(part.mapped_bytes or 0 for part in parts),
    )


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
