"""The messages between the parent and the worker: one JSON object a line, both ways.

The parent sends a request and waits; the worker answers it with `Done` or `Failed`, after any number of `Entered` events.
Each answer carries the figures of the phases it ran. Times are seconds of the machine-wide monotonic clock
(`time.monotonic`), so that the parent can lay them over its own samples.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from harness.core.records import Answer, Loaded, Phase, Record

T = TypeVar("T")


class Message(Record, frozen=True, kw_only=True, tag_field="kind"):
    """A line on the pipe."""


class Confine(Message, frozen=True, kw_only=True, tag="confine"):
    """Live within limits from now on, before anything is loaded.

    `ram`: take over what memory the process shares with the fork server, so that the limit of its group counts it.
    `vram_bytes`: limit the process to this much on each of `gpus`; `context_bytes` is what a CUDA context takes of it where NVML
    does not report it. `expandable_segments`: have torch's allocator use them.
    """

    ram: bool = False
    vram_bytes: int | None = None
    gpus: tuple[int, ...] = ()
    context_bytes: int = 0
    expandable_segments: bool = False


class Share(Message, frozen=True, kw_only=True, tag="share"):
    """Be this many processes from now on, which share a model and answer as one; sent before anything else."""

    ranks: int


class Load(Message, frozen=True, kw_only=True, tag="load"):
    """Run the loading code. `imports` are imported (and timed) first; `model` becomes MODEL in the code.

    `gguf_file` is the file there that holds the tokenizer, if that is a GGUF; `adapter` becomes ADAPTER. `cache` is what `generate`
    takes for the form of the KV cache.
    """

    model: str
    code: str
    imports: tuple[str, ...] = ()
    tokenizer: bool = True
    gguf_file: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    cache: dict[str, Any] = {}


# The tokens of a round of several generations; a longer generation is a round alone. It keeps results from growing without end.
MOST_ROUND_TOKENS = 1024


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Generate exactly `new_tokens` greedy tokens from each of `batch` prompts of `prompt_tokens`, `times` times in one round."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    phase: str = "warm"
    times: int = 1


class Score(Message, frozen=True, kw_only=True, tag="score"):
    """Run the quality probe. `keep` is a file to write this model's predictions to, `reference` one to compare with.

    `model` is its name, by which it may be asked in a dialogue of its own.
    """

    model: str = ""
    keep: str | None = None
    reference: str | None = None


class Chat(Message, frozen=True, kw_only=True, tag="chat"):
    """Serve a page to talk to the model at `host`:`port`, until asked to stop. `model` is its name, by which it is asked.

    It is shown the latest `prompt_tokens` of a conversation at most, and answers with `new_tokens` at most. `case` is how it is
    loaded, `planned_bytes` what the plan says each tier must have for it at most; the page shows both.
    """

    model: str
    host: str
    port: int
    prompt_tokens: int
    new_tokens: int
    case: str = ""
    planned_bytes: dict[str, int] = {}


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Exit."""


Request = Confine | Share | Load | Generate | Score | Chat | Stop


class Entered(Message, frozen=True, kw_only=True, tag="entered"):
    """A phase began."""

    phase: str
    at_s: float


class Confined(Message, frozen=True, kw_only=True, tag="confined"):
    """The limits hold. `file_bytes` are resident pages of libraries, which other groups are charged for; `anon_bytes` the rest.

    `shared_bytes` are the part of the rest that the kernel would not copy: the fork server's group is charged for it.
    """

    file_bytes: int
    anon_bytes: int
    shared_bytes: int


class Shared(Message, frozen=True, kw_only=True, tag="shared"):
    """The processes are there: their ids by rank. Answers that follow add up what all of them found; times are the first one's."""

    pids: list[int]


class LoadDone(Message, frozen=True, kw_only=True, tag="loaded"):
    """The model is loaded.

    `seconds` holds import_s, tokenizer_s, load_s and, where they can be told apart, weights_s and dispatch_s.
    """

    seconds: dict[str, float]
    loaded: Loaded
    phases: list[Phase]


class GenerateDone(Message, frozen=True, kw_only=True, tag="generated"):
    """One round of one or several generations, all alike.

    `token_s` holds the times of the tokens since the call, `more_token_s` those of each further generation since its own; `total_s`
    and `energy_j` are the whole round's; `text` is the first prompt's continuation.
    """

    token_s: list[float]
    total_s: float
    prompt_tokens: int
    new_tokens: int
    batch: int
    text: str
    phases: list[Phase]
    energy_j: float | None = None
    more_token_s: list[list[float]] = []

    @property
    def generations(self) -> list[list[float]]:
        """The times of the tokens of each generation."""
        return [self.token_s, *self.more_token_s]


class ScoreDone(Message, frozen=True, kw_only=True, tag="scored"):
    """What the probe measured: summed negative log-likelihood in nats over `positions`, agreement with the reference, answers.

    `dialogue` names the dialogue that the questions were put in; empty if they were put plainly or by a chat template.
    """

    nll: float
    positions: int
    finite: bool
    agree: int | None
    kl: float | None
    answers: list[Answer]
    phases: list[Phase]
    dialogue: str = ""


class Chatting(Message, frozen=True, kw_only=True, tag="chatting"):
    """The page is served at `url`."""

    url: str


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """A request failed. `types` are the names of the exception's classes, the most derived first.

    `rank` is the process in which it did, of several that share a model.
    """

    phase: str
    types: tuple[str, ...]
    message: str
    traceback: str
    phases: list[Phase] = []
    rank: int | None = None


class Lost(Message, frozen=True, kw_only=True, tag="lost"):
    """One of several processes ended before it answered; `exit_code` is negative for a signal, None if it cannot be had."""

    rank: int
    exit_code: int | None


Answered = Confined | Shared | LoadDone | GenerateDone | ScoreDone | Chatting | Failed | Lost
Event = Entered | Answered

_REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(message: Message) -> bytes:
    """Write a message as one line, with its newline."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a line that the parent sent. Raises msgspec.DecodeError."""
    return _decoded(_REQUESTS, line)


def decode_event(line: bytes) -> Event:
    """Read a line that the worker sent. Raises msgspec.DecodeError."""
    return _decoded(_EVENTS, line)


def _decoded(decoder: msgspec.json.Decoder[T], line: bytes) -> T:
    try:
        return decoder.decode(line)
    except UnicodeDecodeError as error:  # msgspec lets it through
        raise msgspec.DecodeError(str(error)) from None
