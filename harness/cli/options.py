"""The options of the commands: rows of the table of a run, and rows of the command line alone, read by the same parsers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from harness.core.errors import did_you_mean
from harness.core.options import OPTION, Meaning, Option, name_in, positive_number, whole_number
from harness.core.text import print_note
from harness.core.training.setup import DEFAULT_OPTIMIZER, OPTIMIZERS, TRAINING_METHODS
from harness.core.units import parse_capacity
from harness.planning.training.zero import STAGES

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from harness.machine.described.memory import Disk, Ram
    from harness.machine.described.processors import Processor

HOST, FIRST_PORT = "127.0.0.1", 7860
# What pytest and other programs call what our commands have under another name; by its letters `--vram` would be `--ram`.
ELSEWHERE = {
    "vram": "--gpu",
    **dict.fromkeys(("dtype", "torch-dtype", "quant", "quantize", "quantization", "load-in-8bit", "load-in-4bit"), "--precision"),
    **dict.fromkeys(("device", "offload", "n-gpu-layers"), "--placement"),
    **dict.fromkeys(("ctx", "ctx-size", "max-model-len"), "--context"),
}


def _processor(text: str) -> Processor:
    from harness.machine.described.processors import find_processor  # with its table, which few commands need

    return find_processor(text)


def _ram(text: str) -> Ram:
    from harness.machine.described.memory import parse_ram

    return parse_ram(text)


def _disk(text: str) -> Disk:
    from harness.machine.described.memory import parse_disk

    return parse_disk(text)


_ROWS = (
    Option(name="file", help="GGUF file of MODEL, if it has several", metavar="NAME"),
    Option(name="revision", help="branch, tag or commit on the hub", metavar="NAME"),
    Option(
        name="json",
        help="print one JSON object",
        in_command={"watch": Meaning(help="print a JSON object a second, each on a line; with --once one", default=False)},
        switch=True,
    ),
    Option(
        name="pid",
        help="process to watch, with what it has started (default: the case of yours that began last)",
        parse=whole_number(1),
        metavar="N",
    ),
    Option(name="once", help="look once, and end", switch=True),
    Option(
        name="gpu",
        help='its GPU, "RTX 3060 12GB" or 8GiB (repeatable)',
        repeat=True,
        metavar="NAME|SIZE",
    ),
    Option(
        name="cpu",
        help='its processor, e.g. "Ryzen 5 5600"',
        parse=_processor,
        metavar="NAME",
    ),
    Option(
        name="ram",
        help='its RAM, 32GiB or "32GiB DDR4-3200 x2" (two channels)',
        parse=_ram,
        metavar="SIZE",
    ),
    Option(
        name="disk",
        help='its disk: free space, kind (nvme, sata, hdd) or both, "nvme 500GB"',
        parse=_disk,
        metavar="SIZE",
    ),
    Option(
        name="context",
        help="plan for this many tokens, prompt and answer together",
        parse=whole_number(3),
        metavar="N",
    ),
    Option(
        name="images",
        help="plan for this many images in each prompt, as large as the model's image processor lets through (default 0)",
        parse=whole_number(0),
        metavar="N",
    ),
    Option(name="code", help="print a script that loads the model and generates, for a case such as int8/direct", metavar="CASE"),
    Option(name="explain", help="show every term of the estimate for a case such as int8/direct", metavar="CASE"),
    Option(
        name="training",
        help=f"estimate training instead: {', '.join(TRAINING_METHODS)} on one card, or with DeepSpeed ZeRO {', '.join(STAGES)}",
        parse=name_in((*TRAINING_METHODS, *STAGES), "way of training"),
        metavar="WAY",
    ),
    Option(
        name="rank", help="with --training lora or qlora: rank of the adapters (default 16)", parse=whole_number(1), metavar="N"
    ),
    Option(
        name="target-modules",
        help="with --training lora or qlora: a Linear that gets an adapter, such as q_proj (repeatable; default all but the head)",
        repeat=True,
        metavar="NAME",
    ),
    Option(
        name="optimizer",
        help=f"with --training on one card: {', '.join(OPTIMIZERS)} (default {DEFAULT_OPTIMIZER})",
        parse=name_in(OPTIMIZERS, "optimizer"),
        metavar="NAME",
    ),
    Option(name="gradient-checkpointing", help="with --training on one card: compute activations twice, and keep few", switch=True),
    Option(
        name="sequence-length",
        help="with --training on one card: tokens of a sequence (default 1024, or the model's context if that is shorter)",
        parse=whole_number(2),
        metavar="N",
    ),
    Option(
        name="nodes",
        help="with --training zero2 or zero3: number of machines like this one (default 1)",
        parse=whole_number(1),
        metavar="N",
    ),
    Option(
        name="prove-min-ram",
        help="run the cases under RAM limits to find the smallest RAM that works, within 5 % (default placement: cpu)",
        switch=True,
    ),
    Option(
        name="best",
        help="search all precisions, placements and KV caches for the best in speed, quality and context",
        switch=True,
    ),
    Option(name="min-speed", help="with --best: tokens/s that a way must reach", parse=positive_number, metavar="N"),
    Option(name="all", help="show every way, with the reason of each that does not fit or cannot work", switch=True),
    Option(
        name="measure",
        help="measure the read bandwidth of RAM and disk again (1 to 3 s)",
        switch=True,
        in_command={
            "calibrate": Meaning(help="measure a small model and packed layers here (a minute), whatever results there are")
        },
    ),
    Option(name="dry-run", help="show what the results say and keep nothing", switch=True),
    Option(name="reset", help="forget what was kept for this machine", switch=True),
    Option(
        name="host",
        help=f"address to listen on (default {HOST}; 0.0.0.0 opens it to the whole network)",
        default=HOST,
        metavar="ADDRESS",
    ),
    Option(name="anyway", help="load what the plan says does not fit or may not; memory is still watched", switch=True),
    Option(
        name="port",
        help=f"port to listen on (default: the first free one from {FIRST_PORT})",
        parse=whole_number(1, 65535),
        metavar="N",
    ),
    Option(
        name="attempts",
        help="how often a case is handed out until it has come back (default 3)",
        default=3,
        parse=whole_number(1, 100),
        metavar="N",
    ),
    Option(name="shard", help="largest size of a file (default: as published)", parse=parse_capacity, metavar="SIZE"),
)
_OWN = {row.name: row for row in _ROWS}


class _Read(argparse.Action):
    """Read what is given by the row's parser: its sentence is the error. What was typed is kept, to be printed again."""

    def __init__(self, row: Option, **how: Any) -> None:
        super().__init__(**how, nargs=0 if row.switch else None, metavar=row.metavar, help=row.help.replace("%", "%%"))
        self.row = row

    def __call__(self, _: argparse.ArgumentParser, given: argparse.Namespace, value: Any, *__: object) -> None:
        read = self.row.read(True if self.row.switch else [value] if self.row.repeat else value)
        setattr(given, self.dest, (*(getattr(given, self.dest) or ()), *read) if self.row.repeat else read)
        typed = (self.row.flag,) if self.row.switch else (self.row.flag, value)
        given.typed = (*getattr(given, "typed", ()), (self.row.name, shlex.join(typed)))


class CommandParser(argparse.ArgumentParser):
    """Parses the words of a command; a mistake is one sentence that names the command and what was probably meant.

    Options and the rest may stand in any order: argparse alone takes what is optional, or may be several, once. A repeatable option
    that takes names of a table takes all such names that follow it.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the parsed words and no others: what is not known is a mistake."""
        words = sys.argv[1:] if args is None else args
        if self._subparsers:
            return super().parse_known_args([self._command(words), *words[1:]], namespace)
        given, left = super().parse_known_args(self._options_first(words), namespace)
        if left:
            self.error(f"{left[0]!r} is one word too many")
        return given, left

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Write help; argparse's own says nothing of what cannot be written."""
        (file or sys.stdout).write(message)

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with status 2."""
        print_note(f"{message} ({self.prog} --help)", name=f"{self.prog}: ")
        sys.exit(2)

    def _command(self, words: Sequence[str]) -> str:
        """Return the first word, which is a command or an option of ours."""
        (commands,) = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        if not words:
            self.error(f"say which: {', '.join(commands.choices)}")
        if words[0] not in commands.choices and not words[0].startswith("-"):
            self.error(f"no command {words[0]!r}: {did_you_mean(words[0], commands.choices)}")
        return self._known(words[0])

    def _options_first(self, words: Sequence[str]) -> list[str]:
        options, others, left = list[str](), list[str](), deque(words)
        while left:
            word = left.popleft()
            if word == "--":
                return [*options, *others, word, *left]
            if not word.startswith("-") or word == "-":
                others.append(word)
                continue
            flag, is_joined, value = word.partition("=")
            action = self._option_string_actions[self._known(flag)]
            if action.nargs is None and not is_joined:
                is_joined, value = "=", self._value(action, left)
            options.append(action.option_strings[-1] + is_joined + value)
            if isinstance(action, _Read) and action.row.repeat:
                while left and left[0] in action.row.table:
                    options.append(f"{action.row.flag}={left.popleft()}")
        return [*options, *others]

    def _known(self, word: str) -> str:
        """Return a word as it is, or an option of this name, or the only one that begins so."""
        if not word.startswith("-"):
            return word
        known = self._option_string_actions
        alike = sorted(name for name in known if word.startswith("--") and name.startswith(word))
        meant = [word] if word in known else alike
        if len(meant) > 1:
            self.error(f"{word} can mean {' or '.join(meant)}: write out which")
        if not meant:
            ours = ELSEWHERE.get(word.removeprefix("--"), "")
            asked, names = (ours, [ours]) if ours in known else (word, [name for name in known if name.startswith("--")])
            self.error(f"no option {word}: {did_you_mean(asked, names)}")
        return meant[0]

    def _value(self, action: argparse.Action, left: deque[str]) -> str:
        if not left or left[0] in self._option_string_actions:
            self.error(f"{action.option_strings[-1]} needs a value: {action.option_strings[-1]} {action.metavar}")
        return left.popleft()


def typed_options(given: argparse.Namespace, *names: str) -> str:
    """Return the options of these rows as they were typed, in shell quotes and each with a blank before it."""
    return "".join(f" {words}" for name, words in getattr(given, "typed", ()) if name in names)


def add_options(parser: argparse._ActionsContainer, command: str, *names: str) -> None:
    """Add the options of these names to a command, in this order; what is not given is None, a switch False.

    They are rows of OPTIONS, as the command means them, or of the command line alone.
    """
    for name in names:
        row = (_OWN.get(name) or OPTION[name]).of_command(command)
        parser.add_argument(row.flag, dest=row.key, action=_Read, row=row, default=False if row.switch else None)


def add_run_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add options as `pytest cases/` means them, whatever a command of ours means by the same name."""
    for row in map(OPTION.__getitem__, names):
        parser.add_argument(row.flag, dest=row.key, action=_Read, row=row, default=False if row.switch else None)


def given_or_default(given: argparse.Namespace, command: str, name: str) -> Any:
    """Return what an option was given, or its default in this command."""
    row = (_OWN.get(name) or OPTION[name]).of_command(command)
    value = getattr(given, row.key)
    return row.default if value is None else value
