"""The messages: each comes back as it was, on one line, and nonsense is told from them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from harness.core.records import Answer, Phase
from harness.measure import protocol
from harness.measure.protocol import (
    Chat,
    Chatting,
    Confine,
    Confined,
    Entered,
    Failed,
    Generate,
    GenerateDone,
    Load,
    LoadDone,
    Lost,
    Message,
    Score,
    ScoreDone,
    Share,
    Shared,
    Stop,
    decode_event,
    decode_request,
    encode,
)
from tests.support.builders import loaded

PHASE = Phase(name="load", start_s=1.25, end_s=2.5, ram_peak_bytes=2**40, vram_peak_bytes={"gpu:0": 1})
REQUESTS = (
    Confine(ram=True, vram_bytes=8 << 30, gpus=(0, 2), context_bytes=450_000_000),
    Load(model="/models/tiny", code="model = 1\n", imports=("bitsandbytes",), tokenizer=False, trust_remote_code=True),
    Generate(prompt_tokens=64, new_tokens=32, batch=2, phase="cold"),
    Score(keep="/scratch/a.npy", reference=None),
    Share(ranks=2),
    Chat(model="tiny", host="127.0.0.1", port=7860, prompt_tokens=1024, new_tokens=256),
    Stop(),
)
EVENTS = (
    Entered(phase="load", at_s=12345.678901234),
    Confined(file_bytes=1, anon_bytes=2, shared_bytes=3),
    Shared(pids=[17, 18]),
    Chatting(url="http://127.0.0.1:7860/"),
    Lost(rank=1, exit_code=-9),
    LoadDone(seconds={"load_s": 1 / 3}, loaded=loaded(), phases=[PHASE]),
    GenerateDone(
        token_s=[0.1, 0.2], total_s=0.3, prompt_tokens=64, new_tokens=2, batch=1, text="你好 \u2028 \n", phases=[], energy_j=1.5
    ),
    ScoreDone(
        nll=1.0, positions=9, finite=True, agree=None, kl=0.25, answers=[Answer(question="?", answer="!", correct=False)], phases=[]
    ),
    Failed(
        phase="load", types=("OutOfMemoryError", "RuntimeError"), message='two\nlines "quoted"', traceback="...", phases=[PHASE]
    ),
)
DECODERS = pytest.mark.parametrize("decode", [decode_request, decode_event])


def test_the_samples_are_all_messages_there_are() -> None:
    kinds = {each for each in vars(protocol).values() if isinstance(each, type) and issubclass(each, Message)} - {Message}
    assert {type(message) for message in (*REQUESTS, *EVENTS)} == kinds


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_a_request_comes_back_as_it_was(message: Message) -> None:
    assert decode_request(encode(message)) == message


@pytest.mark.parametrize("message", EVENTS, ids=lambda message: type(message).__name__)
def test_an_event_comes_back_as_it_was(message: Message) -> None:
    assert decode_event(encode(message)) == message


@pytest.mark.parametrize("message", [*REQUESTS, *EVENTS], ids=lambda message: type(message).__name__)
def test_a_message_is_one_line(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")


@DECODERS
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b"Loading weights: 50%",
        b"\xff\xfe",
        b'{"kind": "dance"}',
        b'{"kind": "entered", "phase": "\xff", "at_s": 1}',
        b'{"kind": "load", "model": "\xff", "code": ""}',
        b'{"kind": "stop", "now": true}',
        b'{"kind": "entered", "phase": "load"}',
        b'{"kind": "entered", "phase": "load", "at_s": "soon"}',
        b'{"kind": "generate", "prompt_tokens": 1.5, "new_tokens": 1, "batch": 1}',
        b'{"kind": "stop"} {"kind": "stop"}',
        b'{"kind": "stop"',
        b"[" * 100_000,
        b'{"kind": "loaded", "seconds": ' + b"[" * 100_000,
    ],
    ids=lambda line: repr(line[:24]),
)
def test_nonsense_is_no_message(decode: Callable[[bytes], object], line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(line)


def test_a_request_is_no_event_nor_the_other_way_round() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_event(encode(Stop()))
    with pytest.raises(msgspec.ValidationError):
        decode_request(encode(EVENTS[0]))
