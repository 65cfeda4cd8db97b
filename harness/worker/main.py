"""The child process: takes requests from the pipe, one at a time, and answers each with its own figures."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from harness.core.records import Phase
from harness.machine.accelerators import ALLOCATOR_OPTIONS, EXPANDABLE_SEGMENTS
from harness.measure import protocol, sampler
from harness.measure.beacon import Pulse
from harness.worker import accelerators, model, prefault, quality_probe, tensor_parallel

_PR_SET_PDEATHSIG = 1


def main(pipe: Connection, log: str, scratch: str) -> None:
    """Serve requests until asked to stop or until the parent is gone."""
    _settle(log, scratch)
    Server(pipe).serve()
    # Nothing is left to save, and tearing torch down takes longer than a short case.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _settle(log: str, scratch: str) -> None:
    """Become a process group of our own that dies with its parent and writes into its log and scratch directory."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    faulthandler.enable(file=2, all_threads=False)  # a library that crashes says where it was called from
    os.chdir(scratch)
    os.environ["TMPDIR"], tempfile.tempdir = scratch, None  # what a library leaves there goes with the case
    _belong()


def _belong() -> None:
    """End with the process that forked this one, be the first to go, and look like one that did its imports itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # when memory ends, this process goes first
        prefault.replay()


def _be_rank(pipe: Connection) -> None:
    """Serve as one of several processes that share a model."""
    _belong()
    Server(pipe).serve()


def _take_along() -> None:
    """The parent is gone, and nobody else ends what this process has started: end its group, and itself."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)


def _text(said: str) -> str:
    """Replace what has no UTF-8, such as the undecodable part of a path that a library quotes."""
    return said.encode("utf-8", "replace").decode("utf-8")


class Server:
    """The loop: one request, its phases, one answer."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._phases: list[Phase] = []
        self._phase = "start"
        self._model: model.Model | None = None
        self._pulse = Pulse(Path.cwd(), accelerators.torch_memory)

    def serve(self) -> None:
        while True:
            try:
                request = protocol.decode_request(self._pipe.recv_bytes())
            except EOFError:
                _take_along()
                return
            if isinstance(request, protocol.Stop):
                return
            if isinstance(request, protocol.Share):
                tensor_parallel.lead(self._pipe, request.ranks, _be_rank)
                return
            self._phases = []
            self._send(self._answer(request))

    def _send(self, event: protocol.Message) -> None:
        self._pipe.send_bytes(protocol.encode(event))

    def _answer(self, request: protocol.Request) -> protocol.Event:
        try:
            return self._do(request)
        except Exception as error:  # noqa: BLE001 the boundary of the process: whatever a library raises is a result
            return protocol.Failed(
                phase=self._phase,
                types=tuple(kind.__name__ for kind in type(error).__mro__ if kind not in (Exception, BaseException, object)),
                message=_text(str(error)[:20_000]),
                traceback=_text(traceback.format_exc()[-20_000:]),
                phases=self._phases,
            )

    def _do(self, request: protocol.Request) -> protocol.Event:
        if isinstance(request, protocol.Confine):
            if request.expandable_segments:
                os.environ.setdefault(ALLOCATOR_OPTIONS, EXPANDABLE_SEGMENTS)
            shared = prefault.own() if request.ram else 0
            used = sampler.memory(os.getpid())  # before CUDA's libraries are read, which this process is charged for
            if request.vram_bytes is not None:
                model.cap_vram(request.vram_bytes, request.gpus, request.context_bytes)
            file = used.ram_bytes - used.anon_bytes
            return protocol.Confined(file_bytes=file, anon_bytes=used.anon_bytes, shared_bytes=shared)
        if isinstance(request, protocol.Load):
            self._model, seconds = model.load(request, self.phase)
            self._model.pulse = self._pulse
            return protocol.LoadDone(seconds=seconds, loaded=model.loaded_facts(self._model), phases=self._phases)
        if self._model is None:
            raise RuntimeError("nothing is loaded")
        if isinstance(request, protocol.Generate):
            with self.phase(request.phase):
                done = model.generate(self._model, request)
            return protocol.GenerateDone(**done, phases=self._phases)
        if isinstance(request, protocol.Score):
            with self.phase("score"):
                scored = quality_probe.score(self._model, request)
            return protocol.ScoreDone(**scored, phases=self._phases)
        if isinstance(request, protocol.Chat):
            from harness.worker.web import page  # needs gradio

            self._pulse.begin("chat")
            return page.serve(self._model, request)
        raise RuntimeError(f"no such request: {request!r}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase, and keep its times and exact peaks, also when it fails."""
        self._phase = name
        exact, read = sampler.reset_peak(), sampler.disk_read_bytes()
        accelerators.reset_vram_peaks()
        self._pulse.begin(name)
        start = time.monotonic()
        self._send(protocol.Entered(phase=name, at_s=start))
        try:
            yield
            model.synchronize()
        finally:
            end = time.monotonic()
            allocated, reserved = accelerators.vram_peaks()
            now_read = sampler.disk_read_bytes()
            self._phases.append(
                Phase(
                    name=name,
                    start_s=start,
                    end_s=end,
                    ram_peak_bytes=sampler.peak_bytes() if exact else None,
                    ram_anon_bytes=sampler.memory(os.getpid()).anon_bytes,
                    sampled=not exact,
                    disk_read_bytes=None if read is None or now_read is None else now_read - read,
                    vram_peak_bytes=allocated,
                    vram_reserved_bytes=reserved,
                )
            )
