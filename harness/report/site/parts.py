"""Long lists in parts by name, each on a page of its own that a browser opens at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from harness.core.text import line

T = TypeVar("T")


@dataclass(frozen=True)
class ListPart(Generic[T]):
    """One part of a list: what is in it, and the way to each part by its label, of which `at` is this one."""

    things: Sequence[T]
    ways: tuple[tuple[str, str], ...]
    at: int
    whole: int

    @property
    def link(self) -> str:
        """The page that it stands on, seen from the root of the site."""
        return self.ways[self.at][1]


def parts(things: Sequence[T], most: int, link: str, name: Callable[[T], str], more: str = "") -> list[ListPart[T]]:
    """Cut a list, sorted by `name`, into parts of `most` things or less; the first stands on the page `link`, in its place.

    The names of the others begin with `more`, else as that page's; no page of anything else has such a name: a slug has no tilde.
    """
    cuts = [things[at : at + most] for at in range(0, len(things), most)] or [things]
    base = more or link.removesuffix(".html")
    links = [link, *(f"{base}~{number}.html" for number in range(2, len(cuts) + 1))]
    ways = tuple((_label([name(thing) for thing in cut]), at) for cut, at in zip(cuts, links, strict=True))
    return [ListPart(cut, ways, number, len(things)) for number, cut in enumerate(cuts)]


def _label(names: Sequence[str]) -> str:
    """Name the first and the last of a part, by which a reader knows where to look."""
    if not names:
        return ""
    first, last = line(names[0], 40), line(names[-1], 40)
    return first if first == last else f"{first} … {last}"
