"""How models that bring no chat template are asked, and whether one that uses tools does: a table, and pure functions over it.

A model with tools answers in two calls. First it writes what it thinks and a command, and stops; then it is given what the command
found, and answers. What it must write, and at which token it must stop, is data (`data/dialogues.toml`), as the questions are.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from harness.core.records import Answer, Record
from harness.data import DATA
from harness.measure.quality import Question, is_correct

_QUOTED = 60


class Turn(Record, frozen=True, kw_only=True):
    """What a model is to write in one call: `form`, a pattern whose group `said` counts, and then the token `end`.

    `shown` is the form in words; `tokens` is how many it has.
    """

    form: str
    shown: str
    end: str
    tokens: int


class Tool(Record, frozen=True, kw_only=True):
    """A question that takes two calls: `call` is to give commands, `answer` to use what is then written as their results.

    `title` says how it is asked. `command` is the pattern of one command, `command_shown` the same in words; `result` is what each
    is given, and `results` what stands around them all. Any of `ends` stops the model.
    """

    title: str
    question: Question
    prompt: str
    call: Turn
    command: str
    command_shown: str
    result: str
    results: str
    answer: Turn
    ends: tuple[str, ...]


class Dialogue(Record, frozen=True, kw_only=True):
    """How a family of models is asked; `data/dialogues.toml` says what the fields are."""

    tokens: tuple[str, ...]
    prompt: str
    answer: str
    again: str
    opening: str = ""
    name: str = ""
    models: str = ".*"
    system: str = ""
    ends: tuple[str, ...] = ()
    tool: Tool | None = None

    def ask(self, question: Question) -> str:
        """Return the prompt of a question."""
        return self.format_prompt(question.prompt)

    def format_prompt(self, *said: str) -> str:
        """Return the prompt of the last of `said`: a person's questions, and between them the model's answers."""
        first, *rest = said
        form = self.opening or self.prompt if rest else self.prompt
        parts = [form.format(system=self.system, question=first)]
        for earlier, (answer, question) in enumerate(zip(rest[::2], rest[1::2], strict=True), start=1):
            parts += [self.answer.format(answer=answer), self.again.format(question=question, earlier=earlier, round=earlier + 1)]
        return "".join(parts)


class Written(NamedTuple):
    """What a model wrote in one call, and the token that ended it: None if it did not stop by itself."""

    text: str
    end: str | None


def _read_dialogues() -> tuple[Dialogue, ...]:
    table = msgspec.toml.decode((DATA / "dialogues.toml").read_bytes(), type=dict[str, Dialogue])
    return tuple(replace(entry, name=name) for name, entry in table.items())


DIALOGUES = _read_dialogues()


def choose(model: str, vocabulary: Container[str]) -> Dialogue | None:
    """Return how a model of this name and vocabulary was taught to be asked; None: plainly."""
    name = model.rpartition("/")[2].casefold()
    fitting = (one for one in DIALOGUES if re.fullmatch(one.models, name) and all(token in vocabulary for token in one.tokens))
    return next(fitting, None)


def first_prompt(asked: Dialogue, tool: Tool) -> str:
    """Return what the model sees in the first call."""
    return tool.prompt.format(system=asked.system, question=tool.question.prompt)


def second_prompt(asked: Dialogue, tool: Tool, called: Written) -> str:
    """Return what the model sees in the second call: all of the first, what it wrote there, and the results of its commands."""
    results = "".join(tool.result.format(command=command) for command in _commands(tool, called))
    return first_prompt(asked, tool) + called.text + tool.results.format(results=results)


def fault_of_call(tool: Tool, called: Written) -> str:
    """Say what is wrong with the first call; empty if it is a command of the form that is allowed, rightly ended."""
    fault = _fault(tool.call, called)
    if fault or _commands(tool, called):
        return fault
    return f"its command {_quote(_content(tool.call, called))} is not of the form {tool.command_shown}"


def fault_of_answer(tool: Tool, answered: Written) -> str:
    """Say what is wrong with the second call; empty if it is an answer that the results hold, rightly ended."""
    fault = _fault(tool.answer, answered)
    if not fault and not is_correct(tool.question, answered.text):
        fault = f"it answers {_quote(answered.text)}, which does not use them"
    return f"given the results, {fault}" if fault else ""


def mark(tool: Tool, called: Written, answered: Written | None) -> Answer:
    """Make an answer of the probe from both calls; of the first alone where that was wrong already."""
    calls = [called] if answered is None else [called, answered]
    fault = fault_of_call(tool, called) or (fault_of_answer(tool, answered) if answered is not None else "")
    return Answer(
        question=f"{tool.question.prompt} ({tool.title})",
        answer="\n".join((one.text + (one.end or "")).strip() for one in calls),
        correct=not fault,
        wrong=f"{tool.title}: {fault}" if fault else "",
    )


def _fault(turn: Turn, written: Written) -> str:
    if written.end is None:
        return f"it does not stop at {turn.end} within {turn.tokens} tokens"
    if written.end != turn.end:
        return f"it stops at {written.end} instead of {turn.end}"
    if not _content(turn, written):
        return f"it writes {_quote(written.text)} instead of {turn.shown}"
    return ""


def _content(turn: Turn, written: Written) -> str:
    found = re.fullmatch(turn.form, written.text, re.DOTALL)
    return found["said"].strip() if found else ""


def _commands(tool: Tool, called: Written) -> list[str]:
    """Return the commands of a call, which commas part; none if one of them has another form."""
    said = _content(tool.call, called)
    if not re.fullmatch(rf"{tool.command}(\s*,\s*{tool.command})*", said):
        return []
    return re.findall(tool.command, said)


def _quote(text: str) -> str:
    """Put what a model wrote into a sentence: one line, not too long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED else f"{line[:_QUOTED]}...")
