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
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from markupsafe import Markup

_MARK = "\1"
_SLOT = re.compile(r"(\d[\d.,]*)")
# Letters of a line that is written so: what stands for a shorter one is no shorter, and no two drawings have as many points.
_LEAST, _MOST = 8, 2_000


class PackedParts(NamedTuple):
    """Parts, each of which can be unpacked by itself, with the patterns that they share."""

    patterns: Markup
    parts: list[Markup]


def pack_parts(parts: Sequence[str]) -> PackedParts:
    """Pack parts of a page for blocks of data in it."""
    lines = [part.split("\n") for part in parts]
    counts = Counter(chain.from_iterable(lines))
    split = {line: _SLOT.split(line) for line, count in counts.items() if count == 1 and _LEAST < len(line) < _MOST}
    alike = Counter(_MARK.join(pieces[::2]) for pieces in split.values())
    common = {text: count for found in (counts, alike) for text, count in found.items() if count > 1 and len(text) > _LEAST}
    patterns = sorted(common, key=common.__getitem__, reverse=True)
    short = {pattern: f"{_MARK}{number:x}" for number, pattern in enumerate(patterns)}
    for line, pieces in split.items():
        if pattern := short.get(_MARK.join(pieces[::2])):
            short[line] = _MARK.join([pattern, *pieces[1::2]])
    return PackedParts(deflated("\n".join(patterns)), [deflated("\n".join(map(short.get, part, part))) for part in lines])


def deflated(text: str) -> Markup:
    """Deflate a text for a block of data, whose script unpacks it; base64 has no letter that ends one."""
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return Markup(base64.b64encode(deflate.compress(text.encode()) + deflate.flush()).decode())
