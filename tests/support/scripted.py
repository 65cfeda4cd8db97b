"""A scripted worker: a real child process that speaks harness.measure.protocol, without torch and without a model.

`worker("abort")` is a `RunContext.worker_main` with that behavior; `by_model` takes the behavior of each precision from the
directory of the model (`write_model`). What a behavior does not script goes well, with plausible figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil

from harness.core.precisions import PRECISIONS
from harness.core.records import Answer, Loaded, Phase
from harness.core.units import MIB
from harness.measure import protocol
from harness.measure.protocol import Entered, Failed, Generate, GenerateDone, Load, LoadDone, Message, Score, ScoreDone
from harness.run import forkserver
from harness.run.worker_process import WorkerMain

TOKEN_S = 0.01
NOISE = "noise noise noise\n"
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"
CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB"


class Player:
    """The loop of a worker. `code` is the loading code that it was sent last."""

    def __init__(self, pipe: Connection, behavior: str | None) -> None:
        self.pipe, self._behavior = pipe, behavior
        self.code = ""
        self.phases: list[Phase] = []

    def serve(self) -> None:
        while True:
            try:
                request = protocol.decode_request(self.pipe.recv_bytes())
            except EOFError:
                return
            if isinstance(request, protocol.Stop):
                return
            self.phases = []
            self.send(self._answer(request))

    def send(self, message: Message) -> None:
        self.pipe.send_bytes(protocol.encode(message))

    def _answer(self, request: protocol.Request) -> Message:
        if isinstance(request, protocol.Confine):
            return protocol.Confined(file_bytes=0, anon_bytes=0, shared_bytes=0)
        if isinstance(request, Load):
            self.code = request.code
            if self._behavior is None:
                self._behavior = _scripted_for(Path(request.model), request.code)
            return self._step("load", load)(self, request)
        if isinstance(request, Generate):
            return self._step(request.phase, generate)(self, request)
        return self._step("score", score)(self, request)

    def _step(self, name: str, otherwise: Step) -> Step:
        return BEHAVIORS[self._behavior or "ok"].get(name, otherwise)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self.send(Entered(phase=name, at_s=start))
        yield
        self.phases.append(
            Phase(
                name=name,
                start_s=start,
                end_s=time.monotonic(),
                ram_peak_bytes=700 * MIB + len(name),
                ram_anon_bytes=400 * MIB + len(name),
            )
        )


Step = Callable[[Player, protocol.Request], Message]


# What goes well


def load(player: Player, request: protocol.Request) -> Message:
    assert isinstance(request, Load)
    print(f"torch is imported: {'torch' in sys.modules}", flush=True)
    with player.phase("import"):
        pass
    with player.phase("load"):
        pass
    return loaded(player, held(request.code))


def loaded(player: Player, dtype: str) -> LoadDone:
    on_disk = 4000 if "max_memory" in player.code else 0
    return LoadDone(
        seconds={"import_s": 0.5, "tokenizer_s": 0.1, "load_s": 1.5},
        loaded=Loaded(
            model_class="ScriptedForCausalLM",
            dtype_bytes={dtype: 8000},
            linear_dtype_bytes={dtype: 7000},
            tier_bytes={"cpu": 8000 - on_disk, **({"disk": on_disk} if on_disk else {})},
            device_map={"": "cpu"},
            mapped_bytes=0,
            library_bytes=20 * MIB,
        ),
        phases=player.phases,
    )


def held(code: str) -> str:
    """Return the dtype that Linear weights have after this loading code."""
    for words, dtype in (("load_in_8bit", "int8"), ("load_in_4bit", "nf4")):
        if words in code:
            return dtype
    found = re.search(r'dtype="(\w+)"', code)
    return found[1] if found else "float32"


def generate(player: Player, request: protocol.Request) -> Message:
    assert isinstance(request, Generate)
    with player.phase(request.phase):
        return generated(player, request, request.new_tokens)


def generated(player: Player, request: Generate, tokens: int) -> GenerateDone:
    times = [TOKEN_S * (index + 1) for index in range(tokens)]
    return GenerateDone(
        token_s=times,
        more_token_s=[times] * (request.times - 1),
        total_s=TOKEN_S * tokens * request.times,
        prompt_tokens=request.prompt_tokens,
        new_tokens=tokens,
        batch=request.batch,
        text="so it goes",
        phases=player.phases,
    )


def score(player: Player, request: protocol.Request) -> Message:
    """Keep the loading code as if it were predictions, and give back as an answer what was compared with."""
    assert isinstance(request, Score)
    with player.phase("score"):
        if request.keep:
            Path(request.keep).write_text(player.code)
        compared = Path(request.reference).read_text() if request.reference else "nothing"
    return ScoreDone(
        nll=230.0,
        positions=100,
        finite=True,
        agree=99 if request.reference else None,
        kl=0.001 if request.reference else None,
        answers=[Answer(question="compared with", answer=compared, correct=True)],
        phases=player.phases,
    )


# What does not


def fail(*types: str, message: str = "no luck") -> Step:
    """Answer that an exception was raised, its class and base classes being called `types`."""

    def step(player: Player, request: protocol.Request) -> Message:
        name = _phase_of(request)
        with player.phase(name):
            pass
        trace = f"Traceback (most recent call last):\n{types[0]}: {message}"
        return Failed(phase=name, types=types, message=message, traceback=trace, phases=player.phases)

    return step


def do(*actions: Callable[[Player], object]) -> Step:
    """Enter the phase and act; if that leaves the process alive, go on well."""

    def step(player: Player, request: protocol.Request) -> Message:
        player.send(Entered(phase=_phase_of(request), at_s=time.monotonic()))
        for action in actions:
            action(player)
        return {"load": load, "score": score}.get(_phase_of(request), generate)(player, request)

    return step


def _phase_of(request: protocol.Request) -> str:
    return request.phase if isinstance(request, Generate) else type(request).__name__.lower()


def send_signal(number: signal.Signals) -> Callable[[Player], None]:
    return lambda _: os.kill(os.getpid(), number)


def abort(_: Player) -> None:
    print(BAD_ALLOC, file=sys.stderr, flush=True)
    os.abort()


def hang(_: Player) -> None:
    print("hanging", flush=True)
    while True:
        time.sleep(60)


def pause(_: Player) -> None:
    time.sleep(0.5)


def breathe(_: Player) -> None:
    time.sleep(0.06)


def leave(_: Player) -> None:
    os._exit(3)


def hoard(_: Player) -> None:
    """Take 1 GiB of memory bit by bit, and keep it."""
    held = []
    for _step in range(64):
        held.append(bytearray(b"x" * (16 * MIB)))
        time.sleep(0.02)
    hang(_)


def start_grandchild(_: Player) -> None:
    """Start a process that would outlive everybody, and write its id into the log."""
    print(f"grandchild {subprocess.Popen(['sleep', '600']).pid}", flush=True)


def start_grandchild_apart(_: Player) -> None:
    """Start one that leaves for a session of its own, and whose parent is gone."""
    code = "import os, subprocess; print('grandchild', subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)


def make_noise(_: Player) -> None:
    """Print some megabytes in every way that libraries do, with bytes that are no text."""
    for _round in range(3):
        sys.stdout.write(NOISE * (MIB // len(NOISE)))
        os.write(1, b"\xff\xfe \x1b[31mred\x1b[0m\n" * 100_000)
        sys.stderr.write("\r".join(f"{percent}%|####" for percent in range(100)) + "\n")
    print("the last word", flush=True)


def send(*, framed: bytes = b"", raw: bytes = b"") -> Callable[[Player], None]:
    """Write to the pipe what is no message: in a frame, or past all framing."""

    def action(player: Player) -> None:
        if framed:
            player.pipe.send_bytes(framed)
        if raw:
            os.write(player.pipe.fileno(), raw)

    return action


def close_pipe(player: Player) -> None:
    player.pipe.close()


def without_effect(player: Player, request: protocol.Request) -> Message:
    assert isinstance(request, Load)
    with player.phase("load"):
        pass
    return loaded(player, "float64")


def generate_fewer(player: Player, request: protocol.Request) -> Message:
    assert isinstance(request, Generate)
    with player.phase(request.phase):
        return generated(player, request, request.new_tokens - 1)


def generate_none(player: Player, request: protocol.Request) -> Message:
    assert isinstance(request, Generate)
    with player.phase(request.phase):
        return generated(player, request, 0)


def score_nan(player: Player, request: protocol.Request) -> Message:
    del request
    with player.phase("score"):
        pass
    return ScoreDone(nll=0.0, positions=100, finite=False, agree=None, kl=None, answers=[], phases=player.phases)


BEHAVIORS: Mapping[str, Mapping[str, Step]] = {
    "ok": {},
    "slow": dict.fromkeys(("load", "cold", "warm", "score"), do(pause)),
    "brisk": dict.fromkeys(("load", "cold", "warm", "score"), do(breathe)),
    "cuda_oom_in_load": {"load": fail("OutOfMemoryError", "RuntimeError", message=CUDA_OOM)},
    "cuda_oom_in_cold": {"cold": fail("OutOfMemoryError", "RuntimeError", message=CUDA_OOM)},
    "cuda_oom_in_warm": {"warm": fail("OutOfMemoryError", "RuntimeError", message=CUDA_OOM)},
    "memory_error": {"load": fail("MemoryError", message="")},
    "bad_alloc": {"load": do(abort)},
    "abort": {"cold": do(send_signal(signal.SIGABRT))},
    "killed": {"cold": do(send_signal(signal.SIGKILL))},
    "segfault": {"warm": do(send_signal(signal.SIGSEGV))},
    "exit": {"score": do(leave)},
    "bug": {"load": fail("KeyError", "LookupError", message="'model.embed_tokens.weight'")},
    "import_error": {"load": fail("ModuleNotFoundError", "ImportError", message="No module named 'flash_attn'")},
    "not_supported": {"load": fail("ValueError", message="Some modules: fp8 is not supported on this device")},
    "hang_in_load": {"load": do(hang)},
    "hang_in_cold": {"cold": do(hang)},
    "hang_in_score": {"score": do(hang)},
    "hoard_and_hang": {"load": do(hoard)},
    "noise": {"load": do(make_noise), "cold": do(make_noise)},
    "nonsense": {"load": do(send(framed=b"Loading checkpoint shards: 100%"), hang)},
    "unknown_message": {"load": do(send(framed=b'{"kind":"loading","percent":3}'), hang)},
    "past_the_framing": {"load": do(send(raw=b"Loading checkpoint shards: 100%\n"), hang)},
    "hang_in_a_message": {"load": do(send(raw=struct.pack("!i", 1000) + b'{"kind":"loaded"'), hang)},
    "closed_pipe": {"load": do(close_pipe, hang)},
    "without_effect": {"load": without_effect},
    "fewer_tokens": {"warm": generate_fewer},
    "no_tokens": {"warm": generate_none},
    "nan": {"score": score_nan},
    "grandchild": {"load": do(start_grandchild)},
    "grandchild_apart": {"load": do(start_grandchild_apart)},
    "grandchild_apart_killed": {"load": do(start_grandchild_apart, send_signal(signal.SIGKILL))},
    "grandchild_killed": {"load": do(start_grandchild, send_signal(signal.SIGKILL))},
    "grandchild_hangs": {"load": do(start_grandchild, hang)},
}
"""A behavior: what it does instead of going well, by the step: load, cold, warm, score."""


# How it runs


def worker(behavior: str) -> WorkerMain:
    """Return a worker's program with this behavior; it travels to the child by name."""
    assert behavior in BEHAVIORS
    return functools.partial(play, behavior=behavior)


def play(pipe: Connection, log: str, scratch: str, *, behavior: str | None = None) -> None:
    """Be a worker."""
    _settle(log, scratch)
    Player(pipe, behavior).serve()


def by_model(pipe: Connection, log: str, scratch: str) -> None:
    """Be a worker that behaves as the directory of its model says."""
    play(pipe, log, scratch)


def unsettled(pipe: Connection, log: str, scratch: str) -> None:
    """Be a worker that has not come to anything yet: neither a group of its own nor a log."""
    del log, scratch
    Player(pipe, "ok").serve()


def _settle(log: str, scratch: str) -> None:
    """Do what the real worker does first."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(scratch)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def own_fork_server(*preload: str) -> Iterator[None]:
    """Fork the workers from a server that has only this module imported, or others; leave none to tests that want torch in it.

    Workers that a test forgot are killed and told of.
    """
    server: Any = multiprocessing.forkserver._forkserver
    server._stop()
    forkserver.preload(*(preload or (__name__,)))
    forkserver.start()  # before any session: a session ends the fork server that it started
    yield
    left = psutil.Process(server._forkserver_pid).children(recursive=True) if server._forkserver_pid else []
    for one in left:
        one.kill()
    server._stop()
    assert not left


def preload() -> None:
    """Fork the workers of this process, which has started none yet, from a server that has nothing but this module imported."""
    multiprocessing.set_forkserver_preload([__name__])


def workers() -> list[psutil.Process]:
    """Return the processes that the fork server of this process has started and that still run."""
    server: Any = multiprocessing.forkserver._forkserver
    pid = server._forkserver_pid
    return [one for one in psutil.Process(pid).children() if one.is_running()] if pid else []


def runs(one: psutil.Process) -> bool:
    """Say whether a process lives; one that nobody has asked after yet does not."""
    try:
        return bool(one.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ends(one: psutil.Process, within_s: float = 60.0) -> bool:
    """Wait for the kernel to end a process that was killed."""
    until_s = time.monotonic() + within_s
    while runs(one) and time.monotonic() < until_s:
        time.sleep(0.01)
    return not runs(one)


def has_ended(pid: int, within_s: float = 60.0) -> bool:
    """Wait for the kernel to end a process that may have gone already."""
    try:
        return ends(psutil.Process(pid), within_s)
    except psutil.NoSuchProcess:
        return True


def no_counters(*_: object) -> NoReturn:
    """Stand in for harness.measure.system_counters.cpu where a test must not see what else this machine does."""
    raise OSError("this system counts nothing")


# The model


def write_model(directory: Path, **behaviors: str) -> Path:
    """Write a checkpoint of one small block by hand; `behaviors` is what a worker `by_model` does, by precision."""
    directory.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8}
    config |= {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "dtype": "bfloat16"}))
    (directory / "script.json").write_text(json.dumps(behaviors))
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}
    for block in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (16, 8) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (8, 16), f"{block}.input_layernorm.weight": (8,)}
        shapes |= {f"{block}.post_attention_layernorm.weight": (8,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * functools.reduce(int.__mul__, shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return directory


def _scripted_for(model: Path, code: str) -> str:
    precision = next(row.name for row in PRECISIONS.values() if row.linear_dtype == held(code))
    script: dict[str, str] = json.loads((model / "script.json").read_text())
    return script.get(precision, "ok")
