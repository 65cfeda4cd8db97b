"""Parts of a page, packed by what their lines share: read back they are as they were, and what recurs is written once."""

from __future__ import annotations

import base64
import zlib
from itertools import chain, zip_longest

import pytest

from harness.report.page.packing import pack_parts

MARK = "\1"


def inflated(text: str) -> str:
    return zlib.decompress(base64.b64decode(text), -zlib.MAX_WBITS).decode()


def whole(line: str, patterns: list[str]) -> str:
    """Read a line back as the script of a page does."""
    plain, *rest = line.split(MARK)
    if not rest:
        return plain
    texts = patterns[int(rest[0], 16)].split(MARK)
    return "".join(chain.from_iterable(zip_longest(texts, rest[1:], fillvalue="")))


ROWS = [f"<dd>{number}.5 GiB of 24 GiB at {7 * number:,} tokens a second</dd>" for number in range(60)]


@pytest.mark.parametrize(
    "parts",
    [
        ["\n".join(ROWS[:30]), "\n".join(ROWS[30:])],
        ["the same line of text\nof its own"] * 3,
        ["no number here", "1", "", "12,345.6 and 7\n\n8"],
        ["量化 4 位，需要 5.2 GiB 内存", "量化 8 位，需要 9.9 GiB 内存"],
    ],
)
def test_parts_are_read_back_as_they_were(parts: list[str]) -> None:
    packed = pack_parts(parts)
    patterns = inflated(packed.patterns).split("\n")
    assert ["\n".join(whole(line, patterns) for line in inflated(part).split("\n")) for part in packed.parts] == parts


def test_of_lines_that_differ_in_numbers_only_the_numbers_are_written() -> None:
    packed = pack_parts(["\n".join(ROWS)])
    assert inflated(packed.patterns).count("GiB of") == 1
    assert "GiB" not in inflated(packed.parts[0])
