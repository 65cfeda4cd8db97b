"""Talk to a loaded model: what it is shown of a conversation, how it is asked, and its answer as it is written."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from harness.measure.beacon import Pulse
from harness.measure.protocol import Chat
from harness.worker import quality_probe
from harness.worker.model import Model, ModelFault, pad_id

Said = Mapping[str, Any]
# No tokenizer makes a token of more letters than this but of blanks: what is longer is too long, and is not even tokenized.
_LETTERS_A_TOKEN = 128


class TooLong(ValueError):
    """What a person says takes more tokens than the plan has room for."""


class NoAnswer(RuntimeError):
    """The model failed while it answered: memory ran out, or torch refused; the next answer may succeed."""


class Wish(NamedTuple):
    """How an answer is wanted; without a temperature it is greedy. `most_tokens` is None for what was planned."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    most_tokens: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what generate is told of it."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "do_sample": self.temperature > 0,
            **(sampled if self.temperature > 0 else {}),
            "repetition_penalty": self.repetition_penalty,
        }


PLAINLY = Wish()


class Reply(NamedTuple):
    """An answer until now; `decode_s` is the time since its first token, and `is_cut` says that it had to end."""

    text: str
    prompt_tokens: int
    new_tokens: int
    decode_s: float
    dropped_turns: int
    is_cut: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """How fast it is written, None before there is anything to time."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


class _Streamer(TextIteratorStreamer):
    """Hands the text over as it is written, without the token that ends it, and counts and times the tokens."""

    def __init__(self, tokenizer: Any, ends: set[int], pulse: Pulse | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._pulse = ends, pulse
        self.tokens, self.has_ended = 0, False
        self.first_s = self.last_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.tokens, self.has_ended = self.tokens + 1, int(value[-1]) in self._ends
            if self._pulse is not None:
                self._pulse.token()
        if self.next_tokens_are_prompt or not self.has_ended:
            super().put(value)  # type: ignore[no-untyped-call]  # transformers' own

    def close(self, *_: object) -> None:
        """End the text, also where generating failed: whoever waits for it goes on."""
        self.on_finalized_text("", stream_end=True)
        if self._pulse is not None:
            self._pulse.finish()


class Talk:
    """How one model is talked to. `how` says it in a sentence; one answer at a time is written, in a thread of its own."""

    def __init__(self, model: Model, request: Chat) -> None:
        self._model = model
        self._asked = quality_probe.dialogue_of(model, request.model)
        self._ends = quality_probe.ending_ids(model, self._asked.ends if self._asked else ())
        context = getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.answer_most = min(request.new_tokens, context // 2)
        self.prompt_most = min(request.prompt_tokens, context - self.answer_most)
        self._knows_more = self.prompt_most < context - self.answer_most
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")

    @property
    def how(self) -> str:
        """How the model is asked."""
        if self._model.tokenizer.chat_template:
            return "Prompted by its chat template."
        if self._asked is not None:
            return "Prompted in the dialogue format that it was trained on."
        return "Not trained to chat: it continues what you write, and forgets it."

    @property
    def takes_system(self) -> bool:
        """Whether a system prompt reaches the model: its template has a place for one."""
        mark = "fitmatrix-system"
        try:
            return bool(self._model.tokenizer.chat_template) and mark in self._prompt([_turn("system", mark), _turn("user", "a")])
        except ModelFault:
            return False

    def answer(self, message: str, history: Sequence[Said] = (), wish: Wish = PLAINLY) -> Iterator[Reply]:
        """Yield the answer, a little longer each time, and at last with how it ended.

        Raises:
            TooLong: the message alone is longer than what was planned for.
            NoAnswer: generating failed; what it had allocated is free again.
        """
        inputs, dropped = self._inputs(_in_turns([*map(entry, history), _turn("user", message)]), wish.system.strip())
        streamer, unheard = _Streamer(self._model.tokenizer, self._ends, self._model.pulse), threading.Event()
        most = min(wish.most_tokens or self.answer_most, self.answer_most)
        prompt = inputs["input_ids"].shape[1]
        if self._model.pulse is not None:
            self._model.pulse.prompt(prompt)
        writing = self._writer.submit(self._write, inputs, streamer, unheard, {**wish.arguments(), "max_new_tokens": most})
        writing.add_done_callback(streamer.close)
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield Reply(text.strip(), prompt, streamer.tokens, streamer.last_s - streamer.first_s, dropped)
            if failure := writing.exception():
                raise _no_answer(failure) from None
        finally:
            unheard.set()  # the page was closed, or its stop button pressed
        is_cut = streamer.tokens >= most and not streamer.has_ended
        yield Reply(text.strip(), prompt, streamer.tokens, streamer.last_s - streamer.first_s, dropped, is_cut)

    def _write(self, inputs: Mapping[str, Any], streamer: _Streamer, unheard: threading.Event, how: Mapping[str, Any]) -> None:
        self._model.module.generate(  # type: ignore[operator]  # transformers' stubs take the mixin's method for a tensor
            **inputs,
            **how,
            num_beams=1,
            pad_token_id=pad_id(self._model),
            **self._model.cache,
            eos_token_id=sorted(self._ends) or None,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: unheard.is_set()]),
        )

    def _inputs(self, said: list[dict[str, str]], system: str) -> tuple[dict[str, torch.Tensor], int]:
        """Encode the conversation, its oldest turns left out until it is no longer than planned; and say how many were."""
        before = [_turn("system", system)] if system and self.takes_system else []
        dropped = 0
        while True:
            letters = sum(len(one["content"]) for one in (*before, *said))
            size, room = f"{letters:,} letters", f"{self.prompt_most:,} tokens"
            if letters <= self.prompt_most * _LETTERS_A_TOKEN:
                inputs = quality_probe.encode_text(self._model, [self._prompt([*before, *said])])
                length = inputs["input_ids"].shape[1]
                if length <= self.prompt_most:
                    return inputs, dropped
                size, room = f"{length:,} tokens", f"{self.prompt_most:,}"
            if len(said) == 1:
                more = ", or raise --prompt-tokens" if self._knows_more else ""
                raise TooLong(f"this takes {size}, and there is room for {room}: shorten it{more}")
            said, dropped = said[2:], dropped + 1

    def _prompt(self, said: list[dict[str, str]]) -> str:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template:
            return quality_probe.in_template(tokenizer, said)
        return self._asked.format_prompt(*(one["content"] for one in said)) if self._asked else said[-1]["content"]


def _no_answer(failure: BaseException) -> BaseException:
    """Let go of what a failure holds, and say of those that torch and Python raise where memory runs out what they say."""
    if not isinstance(failure, (RuntimeError, MemoryError)):
        return failure
    # Its frames hold the KV cache and the activations, which is the memory that the next answer needs.
    traceback.clear_frames(failure.__traceback__)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return NoAnswer((str(failure).strip() or "out of memory").splitlines()[0])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def entry(said: Said) -> dict[str, str]:
    """Take the words out of an entry of gradio's history: a text, or a list of parts."""
    content = said["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return _turn(str(said["role"]), "".join(parts))


def _in_turns(said: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out what was not answered: models know only conversations in which a person and they take turns."""
    return [one for one, then in pairwise([*said, {"role": ""}]) if one["role"] != then["role"]]
