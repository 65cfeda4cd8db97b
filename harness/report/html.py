"""Text of results as HTML."""

from __future__ import annotations

import functools

from markupsafe import escape

from harness.core.text import visible

# Longer texts are hardly ever said twice.
_MOST_REMEMBERED = 200


def as_html(text: str) -> str:
    """Write a text as HTML, in an element or a quoted attribute, with what cannot be seen in it spelled out."""
    return _as_html(text) if len(text) <= _MOST_REMEMBERED else str(escape(visible(text)))


@functools.lru_cache(8192)
def _as_html(text: str) -> str:
    return str(escape(visible(text)))
