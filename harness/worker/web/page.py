"""The page of a chat, by gradio: the conversation, how the model is loaded and how it does, and how it is to answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import torch

from harness.core.units import format_rate, format_size
from harness.measure import sampler
from harness.measure.protocol import Chat, Chatting
from harness.worker.chat import NoAnswer, Reply, Said, Talk, TooLong, Wish, entry
from harness.worker.model import Model, loaded_facts
from harness.worker.web.door import Door

_EVERY_S = 2.0  # the memory that is shown is read anew
_FONTS = ("system-ui", "sans-serif")
# Where gradio's own have less contrast than WCAG AA asks for: 4.5 to 1.
_COLORS = {
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_hover": "#991b1b",
}
# How the button that ends an answer is while one is written, and while none is.
_ENDS: dict[str, Any] = {"variant": "stop", "interactive": True}
_IDLE: dict[str, Any] = {"variant": "secondary", "interactive": False}
_BUTTONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Send", {"variant": "primary"}),
    ("Stop", _IDLE),
    ("Regenerate", {"variant": "secondary"}),
    ("New conversation", {"variant": "secondary"}),
)
_STYLE = """
.figures { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; font-variant-numeric: tabular-nums; }
#about h1 { display: inline; margin: 0 0.75rem 0 0; font-size: 1.35rem; }
#talked [aria-label=Clear] { display: none; }
#talked { height: calc(100dvh - 25rem); min-height: 12rem; }
#note:empty { display: none; }
#about, .figures { padding: 0; }
.figures b { font-weight: 600; }
"""


def serve(model: Model, request: Chat) -> Chatting:
    """Serve the page from threads of this process, and return when it can be opened.

    Nothing leaves the machine: no link is shared, gradio counts no use, and no font is fetched.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio
    from starlette.middleware import Middleware

    theme = gradio.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace")).set(**_COLORS)
    facts = loaded_facts(model)
    kept = (facts.mapped_bytes or 0) + (facts.library_bytes or 0)
    _, url, _ = _page(_Events(Talk(model, request), request, kept)).launch(
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
        theme=theme,
        css=_STYLE,
        app_kwargs={"middleware": [Middleware(Door, name=request.host)]},
    )
    return Chatting(url=url)


def memory_now(kept_bytes: int) -> dict[str, int]:
    """Return by tier what this process holds, as the plan counts it; of a GPU what torch's allocator has.

    Of RAM that is what the kernel cannot drop, and `kept_bytes` of files that are used all the time: weights and libraries.
    """
    held = {"RAM": sampler.memory(os.getpid()).anon_bytes + kept_bytes}
    if torch.cuda.is_initialized():
        held |= {f"gpu:{index}": torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())}
    return {name: size for name, size in held.items() if size}


def _page(events: _Events) -> Any:
    """Lay the page out: what is loaded, the conversation, what to say, and how it is to be answered."""
    import gradio
    from gradio.events import api

    talk, request = events.talk, events.request
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gradio.Blocks(title=request.model, analytics_enabled=False, fill_height=True) as page:
        gradio.HTML(f"<h1>{escape(request.model)}</h1> <span>{talk.how}</span>", padding=False, elem_id="about")
        memory = gradio.HTML(events.memory(), padding=False)
        copies: list[Any] = (
            ["copy"] if request.host in ("127.0.0.1", "::1", "localhost") else []
        )  # browsers copy on their own machine alone
        talked = gradio.Chatbot(show_label=False, buttons=copies, height=None, placeholder="Say something.", elem_id="talked")
        figures = gradio.HTML(events.figures(None), padding=False)
        note = gradio.Markdown(elem_id="note")
        say: dict[str, Any] = {"label": "Message", "show_label": False, "placeholder": "Message"}
        box = gradio.Textbox(**say, max_lines=12, autofocus=True, elem_id="message")
        with gradio.Row():
            send, stop, again, clear = (gradio.Button(name, **look) for name, look in _BUTTONS)
        settings = _settings(talk)
        at_once: dict[str, Any] = {"queue": False, **private}
        written: dict[str, Any] = {"inputs": [talked, *settings], "outputs": [talked, figures, note, box, stop], **private}
        begun = [
            gradio.on([send.click, box.submit], events.put, [box, talked], [box, talked], **at_once),
            again.click(events.take_back, talked, talked, **at_once),
        ]
        for one in begun:  # a long prompt is read before the first word
            one.success(lambda: gradio.Button(**_ENDS), None, stop, **at_once)
        answers = [one.success(events.write_until_stopped, **written) for one in begun]
        for one in answers:
            one.then(lambda: gradio.Button(**_IDLE), None, stop, **at_once)
        # What is written is cancelled first, else its next word would come after what these show.
        cancelling: dict[str, Any] = {"fn": None, "cancels": answers, **at_once}
        stop.click(**cancelling).then(lambda: ("Stopped.", gradio.Button(**_IDLE)), None, [note, stop], **at_once)
        anew: list[Any] = [talked, figures, note, stop]
        clear.click(**cancelling).then(lambda: ([], events.figures(None), "", gradio.Button(**_IDLE)), None, anew, **at_once)
        gradio.Timer(_EVERY_S).tick(events.memory, None, memory, queue=False, **private)
        api(events.answer, api_name="chat")
    return page


def _settings(talk: Talk) -> list[Any]:
    """Lay out how an answer is wanted, in the order of Wish."""
    import gradio

    with gradio.Accordion("Settings", open=False):
        hint = "said before everything else" if talk.takes_system else "the prompt format of this model has no place for one"
        system = gradio.Textbox(label="System prompt", info=hint, lines=2, interactive=talk.takes_system)
        with gradio.Row():
            temperature = gradio.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token each time")
            top_p = gradio.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: no limit")
            top_k = gradio.Slider(0, 200, 0, step=1, label="Top-k", info="0: no limit")
        with gradio.Row():
            penalty = gradio.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none")
            most = gradio.Slider(2, talk.answer_most, talk.answer_most, step=1, label="Tokens of an answer", info="at most")
    return [system, temperature, top_p, top_k, penalty, most]


class _Events:
    """What the page does: each method takes and returns what its parts show."""

    def __init__(self, talk: Talk, request: Chat, kept_bytes: int) -> None:
        self.talk, self.request, self._kept_bytes = talk, request, kept_bytes

    def answer(self, message: str) -> Iterator[str]:
        """Answer one message, for programs."""
        import gradio

        try:
            for reply in self.talk.answer(message):
                yield reply.text
        except (TooLong, NoAnswer) as error:
            raise gradio.Error(str(error)) from None

    def put(self, message: str, said: list[Said]) -> tuple[str, list[Said]]:
        """Add what a person says to the conversation; nothing said is nothing added."""
        return ("", [*said, {"role": "user", "content": message}]) if message.strip() else (message, said)

    def take_back(self, said: list[Said]) -> list[Said]:
        """Take the last answer out of the conversation, to be given again."""
        return said[:-1] if said and said[-1]["role"] == "assistant" else said

    def write(self, said: list[Said], *wanted: Any) -> Iterator[tuple[Any, ...]]:
        """Answer what was said last, as the settings want it: the conversation, its figures, a note, and what stands in the box."""
        import gradio

        if not said or said[-1]["role"] != "user":
            yield said, gradio.skip(), "", gradio.skip()
            return
        *before, last = said
        system, temperature, top_p, top_k, penalty, most = wanted
        wish = Wish(str(system), float(temperature), float(top_p), int(top_k), float(penalty), int(most))
        reply: Reply | None = None
        try:
            for reply in self.talk.answer(entry(last)["content"], before, wish):
                answered = [*said, {"role": "assistant", "content": reply.text}] if reply.text else said
                yield answered, self.figures(reply), _note(reply), gradio.skip()
        except TooLong as error:
            yield before, gradio.skip(), f"Not sent: {error}.", entry(last)["content"]
        except NoAnswer as error:
            why = escape(str(error).removesuffix("."))
            yield said, gradio.skip(), f"No answer: {why}. Shorten the conversation and try again.", gradio.skip()

    def write_until_stopped(self, said: list[Said], *wanted: Any) -> Iterator[tuple[Any, ...]]:
        """Write as `write` does, and keep the button that ends it in reach."""
        import gradio

        for shown in self.write(said, *wanted):
            yield (*shown, gradio.Button(**_ENDS))

    def memory(self) -> str:
        """Say what is loaded, and what it takes now beside what was planned."""
        planned = {"RAM" if name == "cpu" else name: size for name, size in self.request.planned_bytes.items()}
        now = [
            f"{escape(name)} <b>{format_size(size)}</b> now"
            + (f", {format_size(planned[name])} planned at most" if name in planned else "")
            for name, size in memory_now(self._kept_bytes).items()
        ]
        return _line([f"loaded as <b>{escape(self.request.case)}</b>", *now])

    def figures(self, reply: Reply | None) -> str:
        """Say how fast an answer was written, and how much of the context is used."""
        used = reply.prompt_tokens + reply.new_tokens if reply else 0
        room = self.talk.prompt_most + self.talk.answer_most
        rate = reply.tokens_per_s if reply else None
        dropped = [f"{reply.dropped_turns} oldest turns left out"] if reply and reply.dropped_turns else []
        return _line([f"<b>{format_rate(rate)}</b>" if rate else "", f"<b>{used:,}</b> of {room:,} tokens of context", *dropped])


def _line(parts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(f"<span>{part}</span>" for part in parts if part)}</div>'


def _note(reply: Reply) -> str:
    if reply.is_cut:
        return f"Cut at {reply.new_tokens:,} tokens."
    return "" if reply.text or not reply.new_tokens else "The model ended its answer without a word."
