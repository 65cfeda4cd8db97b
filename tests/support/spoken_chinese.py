"""What a page says of a text in Chinese: the look-up of `language.js`, so that its tables are held against it without a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping

_UNITS = r"(?:[KMGT]iB|bytes|tokens/s|GB/s|ms|s|min|h|J|%)(?:/s)?(?![\w/])"
_NUMBER = rf"[≥±÷×+−-]?(?:≥ )?\d[\d,.]*(?: ?{_UNITS})?(?: \d+ (?:s|min)\b)?"
_SLOT = re.compile(r"\{(\w+)\}")
_PARTED = re.compile(r"(\{\w+\}|\(s\))")


class Phrases:
    """The texts of a table, found as a page finds them: slots take a quantity, a text of the table again, or anything."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = table
        self._slotted = [(_pattern(key), _SLOT.findall(key), key) for key in table if _PARTED.search(key)]
        self._kept: dict[str, str | None] = {}

    def phrase(self, text: str) -> str | None:
        """Return the Chinese of a text; None if the page leaves it in English."""
        if text not in self._kept:
            self._kept[text] = (
                self._table.get(text)
                or self._joined(text, r"; ", "；")
                or self._filled(text)
                or self._joined(text, r"(?<=\.) ", "")
                or self._joined(text, r", ", "，")
            )
        return self._kept[text]

    def _joined(self, text: str, between: str, mark: str) -> str | None:
        parts = re.split(between, text)
        said = [self.phrase(part) for part in parts] if len(parts) > 1 else [None]
        return None if None in said else mark.join(str(one) for one in said)

    def _filled(self, text: str) -> str | None:
        for pattern, slots, key in self._slotted:
            found = pattern.fullmatch(text)
            if found is None:
                continue
            values = {
                slot: self.phrase(value) if re.fullmatch(r"word\d?", slot) else value
                for slot, value in zip(slots, found.groups(), strict=True)
            }
            if None not in values.values():
                pieces = _SLOT.split(self._table[key])
                return "".join(str(values[piece]) if number % 2 else piece for number, piece in enumerate(pieces))
        return None


def _pattern(key: str) -> re.Pattern[str]:
    pieces = ("s?" if piece == "(s)" else _shape(piece) for piece in _PARTED.split(key))
    return re.compile("".join(pieces), re.DOTALL)


def _shape(piece: str) -> str:
    slot = _SLOT.fullmatch(piece)
    if slot is None:
        return re.escape(piece)
    return "(\ufffc)" if slot[1][0].isdigit() else f"({_NUMBER})" if re.fullmatch(r"n\d?", slot[1]) else "([^\ufffc]+?)"
