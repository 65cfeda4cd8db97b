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
def table(language: str) -> Mapping[str, str]:
    """Return what the page says in a language, by the English text."""
    text = (DATA / f"{language}.toml").read_text(encoding="utf-8")
    said: dict[str, str] = tomllib.loads(text)
    return said


@functools.cache
def block(language: str) -> Markup:
    """Write the table of a language as JSON for a block of data in a page; without "<", nothing in it can end the block."""
    text = json.dumps(table(language), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
