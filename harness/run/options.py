"""OPTIONS: everything a run can be told, declared once.

Each value comes from the default, then `[tool.fitmatrix]` of pyproject.toml, then the command line; `Options.origin` says
which. The pytest plugin adds the options from this table and hands back what was given; it knows none of them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.catalog.resolve import DEFAULT
from harness.core.errors import UsageError, did_you_mean
from harness.core.placements import PLACEMENTS
from harness.core.precisions import ALL, DEFAULTS, PRECISIONS
from harness.core.records import Record
from harness.core.units import parse_size
from harness.results.compare import thresholds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Option(Record, frozen=True, kw_only=True):
    """One row.

    `parse` turns the text of one value into the value; `repeat` collects several, "all" stands for `every`; `switch` takes none.
    """

    name: str
    help: str
    parse: Callable[[str], Any] = str
    default: Any = None
    metavar: str | None = None
    repeat: bool = False
    every: tuple[str, ...] = ()
    switch: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def _from_table(table: Mapping[str, Any], what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in table:
            raise UsageError(f"unknown {what} {text!r}: {did_you_mean(text, table)}")
        return text

    return parse


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"{text!r} is not a whole number") from None
        if value < least:
            raise UsageError(f"{value} is too small: at least {least}")
        return value

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
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
        help=f"model to run: a catalog name, a hub id, a directory or a GGUF file (repeatable; default {DEFAULT})",
        parse=_text,
        repeat=True,
        default=(DEFAULT,),
        metavar="MODEL",
    ),
    Option(
        name="weights",
        help="real, or synthetic: random weights in the model's true shapes, generated without a download (default real)",
        parse=_one_of("real", "synthetic"),
        default="real",
        metavar="KIND",
    ),
    Option(
        name="precision",
        help=f"precision of the weights: {', '.join(PRECISIONS)}, or all (repeatable; default {' '.join(DEFAULTS)}, "
        "or the format of a quantized checkpoint)",
        parse=_from_table(PRECISIONS, "precision"),
        repeat=True,
        every=tuple(PRECISIONS),
        default=DEFAULTS,
        metavar="NAME",
    ),
    Option(
        name="placement",
        help=f"where the weights go: {', '.join(PLACEMENTS)} (repeatable; default all that differ on this machine)",
        parse=_from_table(PLACEMENTS, "placement"),
        repeat=True,
        default=tuple(PLACEMENTS),
        metavar="NAME",
    ),
    Option(
        name="device-map",
        help='load with this device_map, JSON or TOML: module -> 0, "cuda:0", "cpu" or "disk" (placement file, alone unless '
        "others are named)",
        parse=Path,
        metavar="FILE",
    ),
    Option(name="prompt-tokens", help="tokens per prompt (default 64)", parse=_at_least(1), default=64, metavar="N"),
    Option(name="new-tokens", help="tokens generated per prompt (default 16)", parse=_at_least(2), default=16, metavar="N"),
    Option(name="batch", help="batch size (default 1)", parse=_at_least(1), default=1, metavar="N"),
    Option(
        name="repeats",
        help="undisturbed warm rounds after one cold round (default 5); up to three times as many are run",
        parse=_at_least(1),
        default=5,
        metavar="N",
    ),
    Option(
        name="vram",
        help="emulate a GPU with this much memory, e.g. 8GiB (repeatable; default all of it)",
        parse=parse_size,
        repeat=True,
        default=(),
        metavar="SIZE",
    ),
    Option(
        name="ram", help="emulate a machine with this much RAM, e.g. 16GiB (default all of it)", parse=parse_size, metavar="SIZE"
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
        help="directory to append results.jsonl to (default fitmatrix-results)",
        parse=Path,
        default=Path("fitmatrix-results"),
        metavar="DIR",
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
    Option(name="fail-on-oom", help="fail the test if a case runs out of memory", switch=True, default=False),
)

_BY_KEY = {option.key: option for option in OPTIONS}


class Options:
    """The values of one run, as attributes named like the options, and where each came from; `gate` holds the thresholds."""

    def __init__(self, *, config: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None) -> None:
        """Take `[tool.fitmatrix]` as it was read and what the command line gave (None: not given).

        Raises:
            UsageError: an unknown key or a value that cannot be.
        """
        self.origin: dict[str, str] = {}
        self._values: dict[str, Any] = {option.key: option.default for option in OPTIONS}
        own = {key.replace("-", "_"): value for key, value in (config or {}).items() if key != "gate"}
        self.gate = thresholds((config or {}).get("gate", {}))
        self._take(own, "[tool.fitmatrix]")
        self._take({key: value for key, value in (given or {}).items() if value is not None}, "command line")

    def _take(self, values: Mapping[str, Any], origin: str) -> None:
        for key, value in values.items():
            option = _BY_KEY.get(key)
            if option is None:
                raise UsageError(f"{origin}: unknown option {key!r}: {did_you_mean(key, _BY_KEY)}")
            try:
                self._values[key] = _parsed(option, value)
            except UsageError as error:
                raise UsageError(f"{option.flag} ({origin}): {error}") from None
            self.origin[key] = origin

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def command(self) -> str:
        """Return the options of the command line that repeats this run, those of single cases left out."""
        skip = {"model", "precision", "placement", "device_map", "vram", "ram", "results", "html", "resume", "baseline"}
        words: list[str] = []
        for option in OPTIONS:
            value = self._values[option.key]
            if option.key not in skip and value != option.default:
                words += [option.flag] if option.switch else [option.flag, str(value)]
        return " ".join(words)


def _parsed(option: Option, value: Any) -> Any:
    if option.switch:
        if not isinstance(value, bool):
            raise UsageError(f"{value!r} is neither true nor false")
        return value
    if option.repeat:
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, (list, tuple)):
            raise UsageError(f"{value!r} is neither a name nor a list of names")
        names = (option.every if option.every and one == ALL else (option.parse(str(one)),) for one in several)
        return tuple(dict.fromkeys(name for group in names for name in group))
    if isinstance(value, (list, dict, bool)):
        raise UsageError(f"{value!r} is not one value")
    return option.parse(str(value))


def read_config(root: Path) -> dict[str, Any]:
    """Return `[tool.fitmatrix]` of `root`/pyproject.toml, or nothing if there is none.

    Raises:
        UsageError: the file is not TOML.
    """
    path = root / "pyproject.toml"
    if not path.is_file():
        return {}
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    table = tools.get("fitmatrix", {}) if isinstance(tools, dict) else tools
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [tool.fitmatrix] is not a table")
    return table
