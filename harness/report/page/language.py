"""The page's other languages: tables of what it says, by the English text, which templates/language.js shows instead of it."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping

from markupsafe import Markup

from harness.data import DATA

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHINESE = "zh"


@functools.cache
def table(language: str, *more: str) -> Mapping[str, str]:
    """Return what the page says in a language, by the English text; what `more` pages say beside it as well, such as "site"."""
    said: dict[str, str] = {}
    for name in (language, *(f"{language}_{page}" for page in more)):
        said |= tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))
    return said


@functools.cache
def block(language: str, *more: str) -> Markup:
    """Write such a table as JSON for a block of data in a page; without "<", nothing in it can end the block."""
    text = json.dumps(table(language, *more), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
