"""From files of results to a site's raw results and their register: each result read, checked and written once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from harness.core.errors import StoreError
from harness.core.records import Result, encode_record
from harness.core.redact import cleaner
from harness.core.text import plural
from harness.report.site.state import SiteState, keyed
from harness.report.site.tasks import Old, link, shared
from harness.results import audit, collect, register
from harness.results.collect import Artifact, Contents
from harness.results.register import Entry, Joined, Refusal

# Refused lines of a file that are told one by one.
_MOST_TOLD = 20
_LINKS = 5_000  # in one piece of work


def gather(found: Sequence[Artifact], folder: Path, now: datetime, state: SiteState, old: Old) -> Joined:
    """Read files of results, check each result, keep what holds in `folder`/raw and join it.

    A file that was read before, without a refusal, is not read again while the `old` site has its results. What one process holds
    is a result at a time, and the register.
    """
    (folder / "raw").mkdir()
    paths = list(dict.fromkeys(artifact.path for artifact in found if not artifact.damage))
    with shared(collect.contents, paths) as looked:
        contents = dict(zip(paths, looked, strict=True))
    keys = [_key(artifact, contents.get(artifact.path)) for artifact in found]
    known = state.kept("sources", list(filter(None, keys)), list[Entry])
    usable = {key: kept for key, kept in known.items() if old.has_all({f"raw/{one.digest}.json": one.size for one in kept})}
    fresh = [(number, artifact) for number, artifact in enumerate(found) if keys[number] not in usable]
    entries = [_from(number, entry) for number, key in enumerate(keys) for entry in usable.get(key, ())]
    reused = {entry.digest for entry in entries}
    refusals: list[Refusal] = []
    with shared(functools.partial(_take, folder=folder / "raw", now=now), fresh) as taken:
        for (number, artifact), (encoded, refused) in zip(fresh, taken, strict=True):
            if keys[number] and not refused and _is_unchanged(artifact, contents[artifact.path]):
                state.keep("sources", keys[number], encoded)
            entries += (_from(number, entry) for entry in msgspec.json.decode(encoded, type=list[Entry]))
            refusals += refused
    entries.sort(key=lambda entry: (entry.source, entry.line))

    def read(entry: Entry) -> Result:
        place = old.place if entry.digest in reused and old.place else folder
        return msgspec.json.decode((place / "raw" / f"{entry.digest}.json").read_bytes(), type=Result)

    joined = register.join([artifact.name for artifact in found], entries, refusals, read)
    _keep_only(joined, folder, old, reused)
    return joined


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


def _keep_only(joined: Joined, folder: Path, old: Old, reused: set[str]) -> None:
    """Leave in `folder`/raw the results that are published, those that were not read anew taken from the old site."""
    kept = {f"{entry.digest}.json" for entry in joined.entries}
    here = {file.name for file in (folder / "raw").iterdir()}
    for name in here - kept:
        (folder / "raw" / name).unlink()
    wanted = [f"{entry.digest}.json" for entry in joined.entries if entry.digest in reused and f"{entry.digest}.json" not in here]
    if wanted and old.place:
        pieces = [wanted[at : at + _LINKS] for at in range(0, len(wanted), _LINKS)]
        with shared(functools.partial(_link, old=f"{old.place}/raw", new=f"{folder}/raw"), pieces, few=2) as done:
            for _ in done:
                pass


def _link(names: Sequence[str], old: str, new: str) -> None:
    for name in names:
        link(f"{old}/{name}", f"{new}/{name}")


def _take(asked: tuple[int, Artifact], folder: Path, now: datetime) -> tuple[bytes, list[Refusal]]:
    """Write each sound result of a file into `folder`; return what is to know of each, encoded, and what was refused."""
    number, artifact = asked
    entries: list[Entry] = []
    refused: list[Refusal] = []
    clean = cleaner()
    untold = 0
    try:
        for line, read in collect.read(artifact):
            result = audit.examine(read, now) if isinstance(read, Result) else read
            if isinstance(result, Result):
                data = encode_record(result)
                entry = register.entry_of(result, data, number, line, cleaned=result is not read)
                (folder / f"{entry.digest}.json").write_bytes(data + b"\n")
                entries.append(entry)
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
