"""From files of results to a site's raw results, a file for each machine, and their register: each result read and checked once."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from harness.core.errors import StoreError
from harness.core.records import Result, encode_record
from harness.core.redact import cleaner, private_here
from harness.core.text import plural
from harness.report.site.old import Old
from harness.report.site.rows import grouped, raw_file
from harness.report.site.state import SiteState, keyed
from harness.report.tasks import shared
from harness.results import audit, collect, register
from harness.results.collect import Artifact, Contents
from harness.results.register import Entry, Joined, Refusal

# Refused lines of a file that are told one by one.
_MOST_TOLD = 20
# Sound results wait here until it is known which of them are published; no finished site has it.
_TAKEN = ".taken"


class _Span(NamedTuple):
    """Where results lie that follow each other in a file."""

    path: str
    at: int
    size: int


def gather(found: Sequence[Artifact], folder: Path, now: datetime, state: SiteState, old: Old) -> Joined:
    """Read files of results, check each result, join what holds and write it to `folder`/raw, a file for each machine.

    A file that was read before, without a refusal, is not read again while the `old` site, which `state` must be of, has its
    results. What one process holds is a result at a time, and the register.
    """
    taken, raw = folder / _TAKEN, folder / "raw"
    taken.mkdir()
    raw.mkdir()
    paths = list(dict.fromkeys(artifact.path for artifact in found if not artifact.damage))
    with shared(collect.contents, paths) as looked:
        contents = dict(zip(paths, looked, strict=True))
    keys = [_key(artifact, contents.get(artifact.path)) for artifact in found]
    known = state.kept("sources", list(filter(None, keys)), list[Entry])
    lines = _old_lines({entry.machine for kept in known.values() for entry in kept}, state, old)
    usable = {key: kept for key, kept in known.items() if all(one.digest in lines.get(one.machine, ()) for one in kept)}
    fresh = [(number, artifact) for number, artifact in enumerate(found) if keys[number] not in usable]
    entries = [_from(number, entry) for number, key in enumerate(keys) for entry in usable.get(key, ())]
    spans: dict[str, _Span] = {}
    refusals: list[Refusal] = []
    with shared(functools.partial(_take, folder=taken, now=now), fresh) as done:
        for (number, artifact), (encoded, refused) in zip(fresh, done, strict=True):
            if keys[number] and not refused and _is_unchanged(artifact, contents[artifact.path]):
                state.keep("sources", keys[number], encoded)
            ours = [_from(number, entry) for entry in msgspec.json.decode(encoded, type=list[Entry])]
            spans |= _spans(f"{taken}/{number}", {entry.digest: entry.size for entry in ours})
            entries += ours
            refusals += refused
    entries.sort(key=lambda entry: (entry.source, entry.line))

    def span_of(entry: Entry) -> _Span:
        if entry.digest not in spans:
            spans.update(_spans(f"{old.place}/{raw_file(entry.machine)}", lines[entry.machine]))
        return spans[entry.digest]

    def read(entry: Entry) -> Result:
        return msgspec.json.decode(_read(span_of(entry)), type=Result)

    joined = register.join([artifact.name for artifact in found], entries, refusals, read)
    changed = []
    for machine, ours in grouped(joined.entries, lambda entry: entry.machine).items():
        sizes = {entry.digest: entry.size for entry in ours}
        if list(lines.get(machine, ())) == list(sizes):
            old.lend(raw_file(machine), folder)
        else:
            changed.append((f"{folder}/{raw_file(machine)}", _runs(map(span_of, ours))))
            state.keep("raw", machine, msgspec.json.encode(sizes))
    with shared(_assemble, changed) as written:
        for _ in written:
            pass
    shutil.rmtree(taken)
    return joined


def _old_lines(machines: Iterable[str], state: SiteState, old: Old) -> dict[str, dict[str, int]]:
    """Return the digests and sizes of the raw results of these machines that the old site has, in the order of their lines."""
    kept = state.kept("raw", sorted(machines), dict[str, int])
    return {machine: sizes for machine, sizes in kept.items() if old.has_all({raw_file(machine): sum(sizes.values())})}


def _spans(path: str, sizes: Mapping[str, int]) -> dict[str, _Span]:
    """Return where results, whose sizes these are by their digests, lie in a file that holds them and nothing else."""
    ends = itertools.accumulate(sizes.values())
    return {digest: _Span(path, end - size, size) for (digest, size), end in zip(sizes.items(), ends, strict=True)}


def _runs(spans: Iterable[_Span]) -> list[_Span]:
    """Make one of spans that follow each other in their file."""
    runs: list[_Span] = []
    for span in spans:
        if runs and (runs[-1].path, runs[-1].at + runs[-1].size) == (span.path, span.at):
            runs[-1] = runs[-1]._replace(size=runs[-1].size + span.size)
        else:
            runs.append(span)
    return runs


def _read(span: _Span) -> bytes:
    with Path(span.path).open("rb") as file:
        file.seek(span.at)
        return file.read(span.size)


def _assemble(wanted: tuple[str, Sequence[_Span]]) -> None:
    """Write the raw results of a machine."""
    place, spans = wanted
    with Path(place).open("wb") as file:
        for span in spans:
            file.write(_read(span))


def _key(artifact: Artifact, contents: Contents | None) -> str:
    """Return what the entries of a file of results are kept under; empty if it cannot be read."""
    return keyed([contents.digest, artifact.member or ""]) if contents else ""


def _is_unchanged(artifact: Artifact, contents: Contents | None) -> bool:
    """Tell whether a file is still what was looked at: of one that grows while it is read more was taken than its digest tells."""
    try:
        return contents is not None and collect.stamp_of(artifact.path) == contents.stamp
    except OSError:
        return False


def _from(number: int, entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, source=number)


def _take(asked: tuple[int, Artifact], folder: Path, now: datetime) -> tuple[bytes, list[Refusal]]:
    """Write the sound results of a file, each once, into one in `folder`; return what is to know of each, encoded, and refusals."""
    number, artifact = asked
    entries: list[Entry] = []
    written: set[str] = set()
    refused: list[Refusal] = []
    clean, here = cleaner(), private_here()
    untold = 0
    with (folder / str(number)).open("wb") as file:
        try:
            for line, read in collect.read(artifact):
                result = audit.examine(read, now, here) if isinstance(read, Result) else read
                if isinstance(result, Result):
                    data = encode_record(result)
                    entries.append(register.entry_of(result, data, number, line, cleaned=result is not read))
                    if entries[-1].digest not in written:
                        file.write(data + b"\n")
                        written.add(entries[-1].digest)
                elif len(refused) < _MOST_TOLD:
                    refused.append(Refusal(source=number, line=line, why=clean(result)))
                else:
                    untold += 1
        except StoreError as error:
            why = str(error).removeprefix(f"{artifact.where}: ")
            refused.append(Refusal(source=number, line=None, why=clean(why)))
    if untold:
        refused.append(Refusal(source=number, line=None, why=f"refused as well: {plural(untold, 'more line')}", lines=untold))
    return msgspec.json.encode(entries), refused
