"""Text from a model, a log or a name, made safe to look at: what cannot be seen is spelled out."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import unicodedata
from typing import Any

# Colors and cursor moves of a terminal say nothing on a page.
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_JOINERS = "\u200c\u200d"
MORE = "..."
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    """Spell out control, format and bidi characters; keep line breaks, tabs and the joiners that scripts and emoji need."""
    if text.isprintable() or text.replace("\n", "").replace("\t", "").isprintable():
        return text
    text = _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(_spelled(char) for char in text)


def line(text: str, most: int = 0) -> str:
    """Write a name on one line, with what cannot be seen spelled out, its middle left out beyond `most` letters."""
    shown = visible(text).replace("\n", "\N{SYMBOL FOR NEWLINE}").replace("\t", "\N{SYMBOL FOR HORIZONTAL TABULATION}")
    if not most or len(shown) <= most:
        return shown
    tail = (most - len(MORE)) // 2
    return shown[: most - len(MORE) - tail] + MORE + shown[len(shown) - tail :]


def as_written(value: Any) -> str:
    """Quote a value as the file of JSON or TOML has it that it comes from, so that it is found there: true, not True."""
    return repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def print_note(text: str, name: str = "fitmatrix: ") -> None:
    """Print a sentence on standard error: in one line, which a terminal breaks at blanks, never in the midst of a word."""
    if sys.stderr is None:  # closed before we began
        return
    said, columns = line(f"{name}{text}"), _columns()
    if len(said) >= columns > 0:
        said = textwrap.fill(said, columns, break_long_words=False, break_on_hyphens=False)
    print(said, file=sys.stderr, flush=True)


def _columns() -> int:
    """Return how wide the terminal behind standard error is; 0 if there is none, or it does not tell."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    except OSError:
        return 0


def _spelled(char: str) -> str:
    if char in "\n\t" or char in _JOINERS or unicodedata.category(char) not in _HIDDEN:
        return char
    if char < " ":
        return chr(0x2400 + ord(char))
    return f"‹U+{ord(char):04X}›"


def plural(count: int, noun: str) -> str:
    """Write "1 case" or "3 cases"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
