"""Parts of a page packed: what recurs in their lines is said once for all of the page, and unpacked by its script.

Most of what a page of many cases says of each is the same but for its numbers. So a part is not deflated as it is: a line that has
a pattern is written as the number of the pattern and what stands in its slots, which `unpacked` in templates/page.js reads back. A
page holds no control characters (`harness.core.text.visible`), by one of which all this is marked.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

_MARK = "\1"
_SLOT = re.compile(r"([0-9][0-9.,]*)")
# Letters of a line that is written so: what stands for a shorter one is no shorter, and no two drawings have as many points.
_LEAST, _MOST = 8, 2_000


class PackedParts(NamedTuple):
    """Parts, each of which can be unpacked by itself, with the patterns that they share."""

    patterns: Markup
    parts: list[Markup]


def pack_parts(parts: Iterable[str]) -> PackedParts:
    """Pack parts of a page for blocks of data in it, of each as much as can be done before the next one is there."""
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and most pages are small

    lines, counts, slots, alike = [], Counter[str](), dict[str, str](), defaultdict[str, list[str]](list)
    for part in parts:
        lines.append(found := part.split("\n"))
        counts.update(found)
        for line in [line for line in found if counts[line] == 1 and _LEAST < len(line) < _MOST]:
            pieces = _SLOT.split(line)
            alike[_MARK.join(pieces[::2])].append(line)
            slots[line] = _MARK.join(pieces[1::2])
    once = {text: [line for line in same if counts[line] == 1] for text, same in alike.items()}
    times = ((text, count) for found in (counts, {text: len(same) for text, same in once.items()}) for text, count in found.items())
    common = {text: count for text, count in times if count > 1 and len(text) > _LEAST}
    patterns = sorted(common, key=common.__getitem__, reverse=True)
    short = {pattern: f"{_MARK}{number:x}" for number, pattern in enumerate(patterns)}
    for text, same in once.items():
        if pattern := short.get(text):
            short.update((line, f"{pattern}{_MARK}{slots[line]}") for line in same)
    with ThreadPoolExecutor() as threads:  # zlib lets go of Python meanwhile
        packed = threads.map(deflated, ("\n".join(map(short.get, part, part)) for part in lines))
        return PackedParts(deflated("\n".join(patterns)), list(packed))


def deflated(text: str) -> Markup:
    """Deflate a text for a block of data, whose script unpacks it; base64 has no letter that ends one."""
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return Markup(base64.b64encode(deflate.compress(text.encode()) + deflate.flush()).decode())
