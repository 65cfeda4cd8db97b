"""Parts of a page packed: what recurs in their lines is said once for all of the page, and unpacked by its script.

Most of what a page of many cases says of each is the same but for its numbers. So a part is not deflated as it is: a line that has
a pattern is written as the number of the pattern and what stands in its slots, which `unpacked` in templates/page.js reads back. A
page holds no control characters (`harness.core.text.visible`), by one of which all this is marked.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

_MARK = "\1"
_SLOT = re.compile(r"(\d[\d.,]*)")
# Shorter lines are no longer than what would stand for them; longer ones are drawings, no two of which have as many points.
_LEAST_LETTERS, _MOST_LETTERS = 8, 2_000


class PackedParts(NamedTuple):
    """Parts, each of which can be unpacked by itself, with the patterns that they share."""

    patterns: Markup
    parts: list[Markup]


def pack_parts(parts: Sequence[str]) -> PackedParts:
    """Pack parts of a page for blocks of data in it: base64 has no letter that ends one."""
    lines = [part.split("\n") for part in parts]
    counts = Counter(line for part in lines for line in part if len(line) >= _LEAST_LETTERS)
    split = {line: _SLOT.split(line) for line, count in counts.items() if count == 1 and len(line) <= _MOST_LETTERS}
    alike = Counter(_MARK.join(pieces[::2]) for pieces in split.values())
    common = Counter({text: count for found in (counts, alike) for text, count in found.items() if count > 1})
    patterns = [pattern for pattern, _ in common.most_common()]
    known = {pattern: f"{_MARK}{number:x}" for number, pattern in enumerate(patterns)}
    short = {line: known[line] for line in counts if line in known}
    for line, pieces in split.items():
        if pattern := known.get(_MARK.join(pieces[::2])):
            short[line] = _MARK.join([pattern, *pieces[1::2]])
    return PackedParts(_deflated("\n".join(patterns)), [_deflated(_shortened(part, short)) for part in lines])


def _shortened(lines: Sequence[str], short: Mapping[str, str]) -> str:
    return "\n".join([short.get(line, line) for line in lines])


def _deflated(text: str) -> Markup:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return Markup(base64.b64encode(deflate.compress(text.encode()) + deflate.flush()).decode())
