"""OPTIONS: everything a run can be told, declared once; pytest and the commands of `fitmatrix` take theirs from here.

A row knows its help, its parser and its default; where a command means something of its own by the same name, `in_command` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.core.errors import UsageError, did_you_mean
from harness.core.placements import PLACEMENTS
from harness.core.precisions import ALL, DEFAULTS, PRECISIONS
from harness.core.records import Record, Workload
from harness.core.units import parse_size

DEFAULT_MODEL = "smollm2-135m"
RESULTS = Path("fitmatrix-results")
_USUAL = Workload()
_MOST = (1 << 31) - 1


class Meaning(Record, frozen=True, kw_only=True):
    """What a command means by an option of the same name, where that is not what a run means."""

    help: str
    default: Any = None


class Option(Record, frozen=True, kw_only=True):
    """One row."""

    name: str
    help: str
    parse: Callable[[str], Any] = str  #: turns the text of one value into the value; raises UsageError
    default: Any = None
    metavar: str | None = None
    repeat: bool = False  #: may be given several times
    every: tuple[str, ...] = ()  #: what "all" stands for
    switch: bool = False  #: takes no value
    in_command: Mapping[str, Meaning] = {}  #: command of `fitmatrix` -> its own meaning

    @property
    def flag(self) -> str:
        return "--" + self.name

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    def of_command(self, command: str) -> Option:
        """Return the row as a command of `fitmatrix` means it."""
        own = self.in_command.get(command)
        return msgspec.structs.replace(self, help=own.help, default=own.default) if own else self

    def read(self, value: Any, origin: str | None = None) -> Any:
        """Return the value that a text, or several, or a value from TOML stands for; `origin` is None for the command line.

        Raises:
            UsageError: it is none; the sentence names the option and a file that it comes from.
        """
        try:
            return self._read(value)
        except UsageError as error:
            raise UsageError(f"{self.flag}{f' ({origin})' if origin else ''}: {error}") from None

    def _read(self, value: Any) -> Any:
        if self.switch:
            if not isinstance(value, bool):
                raise UsageError(f"{value!r} is neither true nor false")
            return value
        if self.repeat:
            several = [value] if isinstance(value, str) else value
            if not isinstance(several, (list, tuple)):
                raise UsageError(f"{value!r} is neither a name nor a list of names")
            names = (self.every if self.every and one == ALL else (self.parse(str(one)),) for one in several)
            return tuple(name for group in names for name in group)
        if isinstance(value, (list, dict, bool)):
            raise UsageError(f"{value!r} is not one value")
        return self.parse(str(value))


def name_in(table: Collection[str], what: str) -> Callable[[str], str]:
    """Return a parser of the names in a table; `what` is what it holds."""

    def parse(text: str) -> str:
        if text not in table:
            raise UsageError(f"unknown {what} {text!r}: {did_you_mean(text, table)}")
        return text

    return parse


def whole_number(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdecimal():
            raise UsageError(f"{text!r} is not a whole number")
        if int(text) < least:
            raise UsageError(f"{text} is too small: at least {least}")
        if int(text) > most:
            raise UsageError(f"{text} is too large: at most {most}")
        return int(text)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise UsageError(f"{text!r} is none of {', '.join(words)}")
        return text

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < 1e9:
        raise UsageError(f"{text!r} is out of range: more than 0 seconds")
    return value


def _text(text: str) -> str:
    if not text.strip():
        raise UsageError("an empty name")
    return text


OPTIONS: tuple[Option, ...] = (
    Option(
        name="model",
        help=f"a model to run: a catalog name, a hub id, a directory or a GGUF file (repeatable; default {DEFAULT_MODEL})",
        parse=_text,
        repeat=True,
        default=(DEFAULT_MODEL,),
        metavar="MODEL",
    ),
    Option(
        name="weights",
        help="real ones, or synthetic: random weights of the model's true shape, made here without a download (default real)",
        parse=one_of("real", "synthetic"),
        default="real",
        metavar="KIND",
    ),
    Option(
        name="precision",
        help=f"how to hold the weights: {', '.join(PRECISIONS)}, or all (repeatable; default {' '.join(DEFAULTS)}, "
        "or what a quantized checkpoint is)",
        parse=name_in(PRECISIONS, "precision"),
        repeat=True,
        every=tuple(PRECISIONS),
        default=DEFAULTS,
        metavar="NAME",
    ),
    Option(
        name="placement",
        help=f"where to put them: {', '.join(PLACEMENTS)} (repeatable; default all that differ here)",
        parse=name_in(PLACEMENTS, "placement"),
        repeat=True,
        default=tuple(PLACEMENTS),
        metavar="NAME",
    ),
    Option(
        name="device-map",
        help='a device_map to load by, JSON or TOML: module -> 0, "cuda:0", "cpu" or "disk" (placement file, alone unless others '
        "are named)",
        parse=Path,
        metavar="FILE",
    ),
    Option(
        name="prompt-tokens",
        help=f"tokens of each prompt (default {_USUAL.prompt_tokens})",
        parse=whole_number(1),
        default=_USUAL.prompt_tokens,
        metavar="N",
        in_command={"chat": Meaning(help="tokens of the conversation to plan for; older turns go (default 1024)", default=1024)},
    ),
    Option(
        name="new-tokens",
        help=f"tokens to generate from each prompt (default {_USUAL.new_tokens})",
        parse=whole_number(2),
        default=_USUAL.new_tokens,
        metavar="N",
        in_command={"chat": Meaning(help="tokens of an answer at most (default 256)", default=256)},
    ),
    Option(
        name="batch",
        help=f"prompts generated from at once (default {_USUAL.batch})",
        parse=whole_number(1),
        default=_USUAL.batch,
        metavar="N",
    ),
    Option(
        name="repeats",
        help=f"undisturbed warm rounds, after one cold round (default {_USUAL.repeats}); up to three times as many run",
        parse=whole_number(1),
        default=_USUAL.repeats,
        metavar="N",
    ),
    Option(
        name="vram",
        help="let each case use so much of each GPU, as a card of that size, e.g. 8GiB (repeatable; default all)",
        parse=parse_size,
        repeat=True,
        default=(),
        metavar="SIZE",
    ),
    Option(
        name="ram",
        help="let each case use so much RAM, e.g. 16GiB (default all)",
        parse=parse_size,
        metavar="SIZE",
        in_command=dict.fromkeys(
            ("plan", "hardware"), Meaning(help="describe a machine with this much RAM instead of this one, e.g. 32GiB")
        ),
    ),
    Option(name="case-timeout", help="seconds that one case may take (default 1800)", parse=_seconds, default=1800.0, metavar="S"),
    Option(
        name="phase-timeout",
        help="seconds that one phase of a case may take: loading, a round, the probe (default 900)",
        parse=_seconds,
        default=900.0,
        metavar="S",
    ),
    Option(
        name="results",
        help=f"directory to append results.jsonl to (default {RESULTS})",
        parse=Path,
        default=RESULTS,
        metavar="DIR",
        in_command={
            "plan": Meaning(help=f"correct the seconds by results of this machine in DIR (default {RESULTS})", default=RESULTS)
        },
    ),
    Option(
        name="baseline",
        help="earlier results, a file or a directory: what got worse since fails (default none)",
        parse=Path,
        metavar="FILE",
    ),
    Option(name="html", help="where to write the page (default index.html in the results directory)", parse=Path, metavar="FILE"),
    Option(
        name="trust-remote-code",
        help="let code that comes with a model run (its config's or tokenizer's auto_map, a generate of its own)",
        switch=True,
        default=False,
        in_command={
            "plan": Meaning(help="plan and write code that lets the model's own code run; nothing runs here", default=False)
        },
    ),
    Option(
        name="resume",
        help="keep the results that still hold, and run what is missing, has changed, crashed or failed",
        switch=True,
        default=False,
    ),
    Option(
        name="run-all",
        help="also run what the plan expects to fail, and with --resume what ran out of memory",
        switch=True,
        default=False,
    ),
    Option(name="fail-on-oom", help="let running out of memory fail the test", switch=True, default=False),
)

OPTION: Mapping[str, Option] = {option.name: option for option in OPTIONS}
