"""Whether the files of a checkpoint are of one download, by what their names, headers and index say of one another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sized

from harness.checkpoint.formats.files import quote
from harness.checkpoint.reader import Checkpoint

_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"(?P<whole>.*)-\d{1,18}-of-(?P<count>\d{1,18})\.\w+")


def odd(read: Checkpoint) -> tuple[str, ...]:
    """Say what looks as if files of several downloads were mixed, though a library would read them."""
    return tuple(said for said in (_counts(read), _misplaced(read), _repeated(read), _mixed_dtypes(read)) if said)


def _counts(read: Checkpoint) -> str | None:
    """Hold the names of shards against their number; without an index one was named, which may be one of several."""
    wholes: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for file in read.files if read.listed else ():
        if found := _PART.fullmatch(file.name):
            wholes[found["whole"]].append((int(found["count"]), file.name))
    for parts in wholes.values():
        counts = dict(reversed(parts))
        if len(counts) > 1:
            first, second = sorted(counts.values())[:2]
            return f"{shown(first)} and {shown(second)} are parts of different wholes, by their names: they may be of two downloads"
        [(count, name)] = counts.items()
        if count != len(parts):
            what = f"{shown(name)} is one of {count} by its name, and the index lists {len(parts)} of them"
            return f"{what}: they may be of two downloads"
    return None


def _misplaced(read: Checkpoint) -> str | None:
    here: dict[str, list[str]] = defaultdict(list)
    for tensor in (*read.tensors, *read.duplicates):
        here[tensor.whole or tensor.name].append(tensor.file)
    wrong = [name for name, file in read.listed.items() if name in here and file not in here[name]]
    if not wrong:
        return None
    name = wrong[0]
    what = f"the index says that {shown(name)} is in {shown(read.listed[name])}, and it is in {shown(here[name][0])}"
    return f"{what}{more(wrong)}: the files may be of two downloads"


def _repeated(read: Checkpoint) -> str | None:
    if not read.duplicates:
        return None
    last = {tensor.name: tensor.file for tensor in read.tensors}
    first = read.duplicates[0]
    where = f"{shown(first.file)} and in {shown(last[first.name])}"
    return f"{shown(first.name)} stands in {where}{more(read.duplicates)}: the later one counts"


def _mixed_dtypes(read: Checkpoint) -> str | None:
    """Find weights of one kind that have a dtype in one file and another in the next."""
    if len(read.files) < 2 or read.quantization is not None:
        return None
    kinds: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor in read.tensors:
        kinds[_NUMBER.sub("N", tensor.name)][tensor.dtype].add(tensor.file)
    for kind, dtypes in kinds.items():
        files = list(dtypes.values())
        if len(dtypes) == 2 and not files[0] & files[1]:
            one, other = (f"{dtype} in {shown(min(names))}" for dtype, names in dtypes.items())
            return f"{shown(kind)} is {one} and {other}: the files may be of two downloads"
    return None


def shown(name: str) -> str:
    """Show a name out of a file; those of tensors are longer than what is usually shown."""
    return quote(name, 160)


def more(found: Sized) -> str:
    """Say how many there are beside the first."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
