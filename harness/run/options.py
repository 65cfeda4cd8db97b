"""The options of one run: each value comes from the default, `[tool.fitmatrix]` of pyproject.toml, or the command line.

`Options.origin` says which. The pytest plugin adds the options from the table OPTIONS and hands back what was given; it knows none
of them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import UsageError, did_you_mean
from harness.core.options import OPTIONS
from harness.results.compare import thresholds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_LINE = "command line"
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
        self._take({key: value for key, value in (given or {}).items() if value is not None}, COMMAND_LINE)

    def _take(self, values: Mapping[str, Any], origin: str) -> None:
        for key, value in values.items():
            option = _BY_KEY.get(key)
            if option is None:
                raise UsageError(f"{origin}: unknown option {key!r}: {did_you_mean(key, _BY_KEY)}")
            read = option.read(value, None if origin == COMMAND_LINE else origin)
            self._values[key] = tuple(dict.fromkeys(read)) if option.repeat else read
            self.origin[key] = origin

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def command(self) -> str:
        """Return the options of the command line that repeats this run, those of single cases left out."""
        skip = {
            "model",
            "precision",
            "placement",
            "device_map",
            "kv",
            "attention",
            "vram",
            "ram",
            "results",
            "html",
            "resume",
            "baseline",
            "shard",
            "calibrate",
        }
        words: list[str] = []
        for option in OPTIONS:
            value = self._values[option.key]
            if option.key not in skip and value != option.default:
                words += [option.flag] if option.switch else [option.flag, str(value)]
        return " ".join(words)


def following_names(words: Sequence[str]) -> dict[str, list[str]]:
    """Return by key the names that follow a value of an option of names, as "int4" in `--precision bf16 int4`."""
    found: dict[str, list[str]] = {}
    option, is_value = None, False
    for word in words:
        flag, is_joined, _ = word.partition("=")
        if is_value:
            is_value = False
        elif word.startswith("-"):
            option = next((row for row in OPTIONS if row.repeat and row.table and row.flag == flag), None)
            is_value = option is not None and not is_joined
        elif option is not None and word in option.table:
            found.setdefault(option.key, []).append(word)
        else:
            option = None
    return found


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
