"""How the names in a model's files become those of its skeleton when transformers loads it: its renamings and conversions, as data.

They are read from transformers when a skeleton is built (`worker.read_key_mapping`) and applied here, without it, by the rules of
its `core_model_loading`: every renaming in turn, then one conversion at most, then the prefix of the base model is put before the
name or taken away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from harness.core.records import Record

Shape = tuple[int, ...]
# Names out of hostile files may be endless, and patterns slow on them; those of real tensors have less than 200 letters.
MOST_LETTERS = 300


class Renaming(Record, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    r"""One step: the first match of `pattern` in a name becomes `target`, in which `\1` stands for the group in what matched.

    `pattern` is a choice of groups named g0, g1 and so on. Of `scopes`, the longest first, a name must begin with one, and the
    pattern is sought behind it.
    """

    pattern: str
    target: str
    scopes: tuple[str, ...] = ()

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def apply(self, name: str) -> tuple[str, int] | None:
        """Return the new name, and which group of the pattern matched; None if none did."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None) if self.scopes else ""
        if scope is None:
            return None
        rest = name.removeprefix(scope)
        match = self._compiled.search(rest)
        if match is None:
            return None
        group = next(key for key, text in match.groupdict().items() if text is not None)
        target = self.target
        if r"\1" in target:
            target = target.replace(r"\1", match.group(self._compiled.groupindex[group] + 1))
        return scope + rest.replace(match.group(0), target, 1), int(group[1:])


class Conversion(Renaming, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """A step that makes tensors of tensors: of those whose names have its `sources`, in order, those with its `targets`.

    `steps` are transformers' operations with the dimension that they work along. They keep every element, whatever they do.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]

    def fault(self, parts: Mapping[int, Sequence[Shape]], wanted: Sequence[Shape]) -> bool:
        """Say whether tensors of the shapes `parts`, by the source that they have, cannot become those that are `wanted`."""
        if any(len(set(shapes)) > 1 for shapes in parts.values()):
            return True
        if len(wanted) == 1 and [name for name, _ in self.steps] == ["MergeModulelist", "Concatenate"]:
            along = self.steps[1][1]
            stacked = [(len(shapes), *shapes[0]) for _, shapes in sorted(parts.items())]
            return len(stacked) != len(self.sources) or _joined(stacked, along) != wanted[0]
        if len(wanted) == 1 and [name for name, _ in self.steps] == ["MergeModulelist"]:
            return [(len(shapes), *shapes[0]) for shapes in parts.values()] != list(wanted)
        held = sum(math.prod(shape) for shapes in parts.values() for shape in shapes)
        return held != sum(math.prod(shape) for shape in wanted)


def _joined(shapes: Sequence[Shape], along: int) -> Shape | None:
    """Return the shape of tensors put together along a dimension; None if the others differ."""
    others = {(*shape[:along], *shape[along + 1 :]) for shape in shapes}
    if len(others) > 1 or along >= len(shapes[0]):
        return None
    return (*shapes[0][:along], sum(shape[along] for shape in shapes), *shapes[0][along + 1 :])


class Place(Record, frozen=True):
    """Where a stored tensor goes: the name in the model, and, where it is converted, by what and as which of its sources."""

    name: str
    conversion: int | None = None
    source: int = 0


class Naming(Record, frozen=True, kw_only=True, omit_defaults=True):
    """All that brings the names of files to those of a skeleton.

    `may_miss` and `may_have` are patterns of what transformers neither misses in the files nor minds there. `names` are those of a
    GGUF file, each with its name in the model; nothing else happens to them, and others are left out without a word.
    """

    prefix: str = ""
    renamings: tuple[Renaming, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    may_miss: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()
    names: dict[str, str] = {}

    def place(self, stored: str, wanted: Collection[str]) -> Place:
        """Say where a stored tensor goes, among the names that are `wanted`."""
        name = self.names.get(stored, stored)
        if len(name) > MOST_LETTERS:
            return Place(name)
        for renaming in self.renamings:
            found = renaming.apply(name)
            name = found[0] if found else name
        place = Place(self._prefixed(name, wanted))
        for number, conversion in enumerate(self.conversions):
            found = conversion.apply(name)
            if found is not None:
                place = Place(self._prefixed(found[0], wanted), number, found[1])
                break
        if place.name not in wanted and stored in wanted:
            return Place(self._prefixed(stored, wanted))
        return place

    def _prefixed(self, name: str, wanted: Collection[str]) -> str:
        inner = name.removeprefix(f"{self.prefix}.")
        if self.prefix and inner != name and inner in wanted:
            return inner
        outer = f"{self.prefix}.{name}"
        return outer if outer in wanted else name

    def others(self, place: Place) -> tuple[str, ...]:
        """Name all that a conversion makes where it makes `place`."""
        if place.conversion is None:
            return (place.name,)
        first, *rest = self.conversions[place.conversion].targets
        return (place.name, *(place.name.replace(first, other) for other in rest))
