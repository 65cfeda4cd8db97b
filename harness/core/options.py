"""OPTIONS: the options of a run, declared once; pytest and the commands of `fitmatrix` take theirs from here.

A row knows its help, its parser and its default; where a command means something of its own by the same name, `in_command` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.errors import UsageError, did_you_mean
from harness.core.placements import PLACEMENTS
from harness.core.precisions import ALL, DEFAULT_PRECISIONS, PRECISIONS
from harness.core.records import USUAL_KV, Record, Workload
from harness.core.text import as_written
from harness.core.units import parse_capacity

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
    table: tuple[str, ...] = ()  #: the names that it takes, where no other text is a value
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
                raise UsageError(f"{as_written(value)} is neither true nor false")
            return value
        if self.repeat:
            several = [value] if isinstance(value, str) else value
            if not isinstance(several, (list, tuple)):
                raise UsageError(f"{as_written(value)} is neither a name nor a list of names")
            names = (self.every if self.every and one == ALL else (self.parse(str(one)),) for one in several)
            return tuple(name for group in names for name in group)
        if isinstance(value, (list, dict, bool)):
            raise UsageError(f"{as_written(value)} is not one value")
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


def positive_number(text: str) -> float:
    """Return a number above 0 that a text stands for."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise UsageError(f"{text} is out of range: more than 0")
    return value


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
        help=f"model to run: a catalog name, a hub id, a directory or a GGUF file (repeatable; default {DEFAULT_MODEL})",
        parse=_text,
        repeat=True,
        default=(DEFAULT_MODEL,),
        metavar="MODEL",
    ),
    Option(
        name="weights",
        help="real, or synthetic: random weights in the model's true shapes, generated without a download (default real)",
        parse=one_of("real", "synthetic"),
        default="real",
        metavar="KIND",
    ),
    Option(
        name="precision",
        help=f"precision of the weights: {', '.join(PRECISIONS)}, or all (repeatable; default {' '.join(DEFAULT_PRECISIONS)}, "
        "or the format of a quantized checkpoint)",
        parse=name_in(PRECISIONS, "precision"),
        repeat=True,
        table=(*PRECISIONS, ALL),
        every=tuple(PRECISIONS),
        default=DEFAULT_PRECISIONS,
        metavar="NAME",
    ),
    Option(
        name="placement",
        help=f"where the weights go: {', '.join(PLACEMENTS)} (repeatable; default all that differ on this machine)",
        parse=name_in(PLACEMENTS, "placement"),
        repeat=True,
        table=tuple(PLACEMENTS),
        default=tuple(PLACEMENTS),
        metavar="NAME",
    ),
    Option(
        name="kv",
        help=f"how the KV cache is kept: {', '.join(KV_FORMS)} (repeatable; default {USUAL_KV}, in the model's dtype)",
        parse=name_in(KV_FORMS, "form of the KV cache"),
        repeat=True,
        table=tuple(KV_FORMS),
        default=(USUAL_KV,),
        metavar="FORM",
    ),
    Option(
        name="attention",
        help=f"implementation of attention: {', '.join(ATTENTIONS)} (repeatable; default what transformers chooses)",
        parse=name_in(ATTENTIONS, "implementation of attention"),
        repeat=True,
        table=tuple(ATTENTIONS),
        default=(),
        metavar="NAME",
    ),
    Option(
        name="device-map",
        help='load with this device_map, JSON or TOML: module -> 0, "cuda:0", "cpu" or "disk" (placement file; no other unless '
        "named)",
        parse=Path,
        metavar="FILE",
    ),
    Option(
        name="prompt-tokens",
        help=f"tokens per prompt (default {_USUAL.prompt_tokens})",
        parse=whole_number(1),
        default=_USUAL.prompt_tokens,
        metavar="N",
        in_command={
            "chat": Meaning(
                help="tokens of conversation to keep; older turns are dropped (default: what fits, 8192 at most)", default=1024
            )
        },
    ),
    Option(
        name="new-tokens",
        help=f"tokens generated per prompt (default {_USUAL.new_tokens})",
        parse=whole_number(2),
        default=_USUAL.new_tokens,
        metavar="N",
        in_command={"chat": Meaning(help="most tokens of an answer (default 256)", default=256)},
    ),
    Option(
        name="batch",
        help=f"batch size (default {_USUAL.batch})",
        parse=whole_number(1),
        default=_USUAL.batch,
        metavar="N",
    ),
    Option(
        name="repeats",
        help=f"undisturbed rounds after a first one that warms up (default {_USUAL.repeats}); up to three times as many are run",
        parse=whole_number(1),
        default=_USUAL.repeats,
        metavar="N",
    ),
    Option(
        name="vram",
        help="emulate a GPU with this much memory, e.g. 8GiB (repeatable; default all of it)",
        parse=parse_capacity,
        repeat=True,
        default=(),
        metavar="SIZE",
    ),
    Option(
        name="ram",
        help="emulate a machine with this much RAM, e.g. 16GiB (default all of it)",
        parse=parse_capacity,
        metavar="SIZE",
    ),
    Option(name="case-timeout", help="time limit of a case in seconds (default 1800)", parse=_seconds, default=1800.0, metavar="S"),
    Option(
        name="phase-timeout",
        help="time limit of one phase of a case in seconds: loading, a round, the probe (default 900)",
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
            "plan": Meaning(
                help=f"correct estimated times with results of this machine in DIR (default {RESULTS})", default=RESULTS
            )
        },
    ),
    Option(
        name="baseline",
        help="earlier results to compare with, a file or a directory; regressions fail (default none)",
        parse=Path,
        metavar="FILE",
    ),
    Option(name="html", help="path of the page (default index.html in the results directory)", parse=Path, metavar="FILE"),
    Option(
        name="trust-remote-code",
        help="allow code shipped with the model to run (auto_map of its config or tokenizer, its own generate)",
        switch=True,
        default=False,
        in_command={"plan": Meaning(help="plan for a model with code of its own, without running any of it", default=False)},
    ),
    Option(
        name="resume",
        help="keep results that are still valid; run what is missing, has changed, crashed or failed",
        switch=True,
        default=False,
    ),
    Option(
        name="run-all",
        help="also run what the plan expects to fail and, with --resume, what ran out of memory",
        switch=True,
        default=False,
    ),
    Option(
        name="shard",
        help="run this part of a fleet's contract, a file of fitmatrix fleet plan, which decides all other options but --results, "
        "--html, --baseline and --resume (default none)",
        parse=Path,
        metavar="FILE",
    ),
    Option(
        name="calibrate",
        help="measure this machine once, for about a minute, before the first run here (once) or not (never); not with "
        "--resume, in a shard, or where a case has less than ten minutes (default once)",
        parse=one_of("once", "never"),
        default="once",
        metavar="WHEN",
    ),
    Option(name="fail-on-oom", help="fail the test if a case runs out of memory", switch=True, default=False),
)

OPTION: Mapping[str, Option] = {option.name: option for option in OPTIONS}
