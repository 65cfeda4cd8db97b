"""Talk to a loaded model in a browser: a page by gradio, on this machine, that shows the answer as it is written."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from harness.measure.protocol import Chat, Chatting
from harness.worker import quality_probe
from harness.worker.model import Model, pad_id
from harness.worker.web.door import Door

Said = Mapping[str, Any]


class TooLong(ValueError):
    """What a person says takes more tokens than the plan has room for."""


class _Streamer(TextIteratorStreamer):
    """Hands the text over as it is written, without the token that ends it."""

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends = ends

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value[-1]) not in self._ends:
            super().put(value)  # type: ignore[no-untyped-call]  # transformers' own

    def close(self, *_: object) -> None:
        """End the text, also where generating failed: whoever waits for it goes on."""
        self.on_finalized_text("", stream_end=True)


class Talk:
    """How one model is talked to. `how` says it in a sentence; one answer at a time is written, in a thread of its own."""

    def __init__(self, model: Model, request: Chat) -> None:
        self._model = model
        self._asked = quality_probe.dialogue_of(model, request.model)
        self._ends = quality_probe.ending_ids(model, self._asked.ends if self._asked else ())
        context = getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._answer_most = min(request.new_tokens, context // 2)
        self._prompt_most = min(request.prompt_tokens, context - self._answer_most)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")

    @property
    def how(self) -> str:
        """How the model is asked."""
        if self._model.tokenizer.chat_template:
            return "It is asked by its chat template."
        if self._asked is not None:
            return "It is asked in the dialogue that it was taught."
        return "It was not taught to talk: it goes on from what you write, and forgets it."

    def answer(self, message: str, history: Sequence[Said] = ()) -> Iterator[str]:
        """Yield the greedy answer, a little longer each time.

        Raises:
            TooLong: the message alone is longer than what was planned for.
        """
        inputs = self._inputs(_in_turns([*map(_plain, history), {"role": "user", "content": message}]))
        streamer, unheard = _Streamer(self._model.tokenizer, self._ends), threading.Event()
        writing = self._writer.submit(self._write, inputs, streamer, unheard)
        writing.add_done_callback(streamer.close)
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text.strip()
            writing.result()
        finally:
            unheard.set()  # the page was closed, or its stop button pressed

    def _write(self, inputs: Mapping[str, torch.Tensor], streamer: _Streamer, unheard: threading.Event) -> None:
        self._model.module.generate(  # type: ignore[operator]  # transformers' stubs take the mixin's method for a tensor
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._answer_most,
            pad_token_id=pad_id(self._model),
            eos_token_id=sorted(self._ends) or None,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: unheard.is_set()]),
        )

    def _inputs(self, said: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Encode the conversation, its oldest turns left out until it is no longer than planned."""
        while True:
            inputs = quality_probe.encode_text(self._model, [self._prompt(said)])
            length = inputs["input_ids"].shape[1]
            if length <= self._prompt_most:
                return inputs
            if len(said) == 1:
                room = self._prompt_most
                raise TooLong(f"this takes {length} tokens, and there is room for {room}: shorten it, or raise --prompt-tokens")
            said = said[2:]

    def _prompt(self, said: list[dict[str, str]]) -> str:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template:
            return quality_probe.in_template(tokenizer, said)
        return self._asked.format_prompt(*(one["content"] for one in said)) if self._asked else said[-1]["content"]


def _plain(said: Said) -> dict[str, str]:
    """Take the words out of an entry of gradio's history: a text, or a list of parts."""
    content = said["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return {"role": str(said["role"]), "content": "".join(parts)}


def _in_turns(said: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out what was not answered: models know only conversations in which a person and they take turns."""
    return [one for one, then in pairwise([*said, {"role": ""}]) if one["role"] != then["role"]]


def serve(model: Model, request: Chat) -> Chatting:
    """Serve the page from threads of this process, and return when it can be opened.

    Nothing leaves the machine: no link is shared, and gradio counts no use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio
    from starlette.middleware import Middleware

    talk = Talk(model, request)

    def answer(message: str, history: list[Said]) -> Iterator[str]:
        try:
            yield from talk.answer(message, history)
        except TooLong as error:
            raise gradio.Error(str(error)) from None

    page = gradio.ChatInterface(
        answer, title=request.model, description=talk.how, api_name="chat", flagging_mode="never", analytics_enabled=False
    )
    _, url, _ = page.launch(
        server_name=request.host,
        server_port=request.port,
        share=False,
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Door, name=request.host)]},
    )
    return Chatting(url=url)
