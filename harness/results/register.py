"""The register of what is published: what counts once, what is refused as it contradicts another, where each comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from harness.checkpoint.formats.files import quote
from harness.core.records import Record, Result, encode_record
from harness.results.audit import digest, identity

# The packages whose versions decide how a model loads and runs.
VERSIONS = ("fitmatrix", "torch", "transformers", "accelerate", "bitsandbytes")


class PublishedResult(Record, frozen=True, kw_only=True):
    """A result that is published: on which line of its machine's file, and the digest of that; `result` may lack much of it."""

    result: Result
    digest: str
    line: int


class Entry(Record, frozen=True, kw_only=True, array_like=True, gc=False):
    """A published result in the register of a site: all that joining needs of it, and where the rest lies.

    `digest` and `size` are those of the whole result as it is published. `source` is the number of the file it was read from and
    `line` its line there; `cleaned` tells whether anything private was taken out of it here. `machine` tells its machine from
    others, `claim` what it is a result of: two of one claim that differ contradict each other. There are a hundred thousand, and
    Python need not search them for cycles.
    """

    digest: str
    size: int
    source: int
    line: int
    cleaned: bool
    at: str
    id: str
    run: str
    machine: str
    claim: str
    versions: tuple[str, ...]


class Refusal(Record, frozen=True, kw_only=True):
    """A line that is not published, and why; `line` is None where it is a whole file, or all of `lines` that are not told alone."""

    source: int
    line: int | None
    why: str
    lines: int = 1


class ResultsFile(Record, frozen=True, kw_only=True):
    """A file of results: its name, how many of its results are published, were there already or refused, and what ran."""

    name: str
    results: int = 0
    repeated: int = 0
    refused: int = 0
    cleaned: int = 0
    runs: tuple[str, ...] = ()
    first: str = ""
    last: str = ""
    versions: tuple[str, ...] = ()


class Joined(Record, frozen=True, kw_only=True):
    """What is published, oldest first, what is not, and the files that both come from."""

    entries: tuple[Entry, ...]
    refusals: tuple[Refusal, ...]
    sources: tuple[ResultsFile, ...]

    @property
    def refused(self) -> int:
        """How many lines are not published."""
        return sum(refusal.lines for refusal in self.refusals)

    def where(self, refusal: Refusal) -> str:
        """Name the place of a refused line: "artifacts/gpu-1/results.jsonl:3"."""
        return format_place(self.sources[refusal.source].name, refusal.line)


def format_place(name: str, line: int | None) -> str:
    """Name a line of a file."""
    return name if line is None else f"{name}:{line}"


def machine_key(identity: str) -> str:
    """Return what an entry tells the machine by that has this `audit.identity`; as a name of a file it is plain."""
    return digest(identity.encode())


def entry_of(result: Result, data: bytes, source: int, line: int, cleaned: bool = False) -> Entry:
    """Enter a result into the register; `data` is what is published of it."""
    machine = identity(result.machine)
    claim = "\0".join([machine, result.run, encode_record(result.case).decode(), result.weights])
    return Entry(
        digest=digest(data),
        size=len(data) + 1,  # its line has an end
        source=source,
        line=line,
        cleaned=cleaned,
        at=result.at,
        id=result.id,
        run=result.run,
        machine=machine_key(machine),
        claim=digest(claim.encode()),
        versions=tuple(f"{name} {result.environment[name]}" for name in VERSIONS if name in result.environment),
    )


def join(sources: Sequence[str], entries: Iterable[Entry], refusals: Iterable[Refusal], read: Callable[[Entry], Result]) -> Joined:
    """Count what is there twice once, refuse what contradicts another, and say of each source what came of it.

    Two results are the same if all they say is. Two results of one case in one run on one machine, with weights of one kind, that
    are not the same contradict each other: nothing tells which is true, so neither is published. `read` returns the result of an
    entry, by which it is said how two differ.
    """
    by_digest: dict[str, Entry] = {}
    repeated = [0] * len(sources)
    for entry in entries:
        if by_digest.setdefault(entry.digest, entry) is not entry:
            repeated[entry.source] += 1
    by_claim: dict[str, list[Entry]] = {}
    for entry in by_digest.values():
        by_claim.setdefault(entry.claim, []).append(entry)
    alone = (group[0] for group in by_claim.values() if len(group) == 1)
    kept = sorted(alone, key=lambda entry: (entry.at, entry.id, entry.line, entry.digest))
    against = (group for group in by_claim.values() if len(group) > 1)
    wrong = [*refusals, *(one for group in against for one in _contradictions(sources, group, read))]
    wrong.sort(key=lambda refusal: (refusal.source, refusal.line or 0))
    return Joined(entries=tuple(kept), refusals=tuple(wrong), sources=tuple(_sources(sources, kept, wrong, repeated)))


def _contradictions(sources: Sequence[str], group: Sequence[Entry], read: Callable[[Entry], Result]) -> Iterator[Refusal]:
    for entry, other in zip(group, [*group[1:], group[0]], strict=True):
        where, difference = format_place(sources[other.source], other.line), _difference(read(entry), read(other))
        why = f"contradicts {where}, the same case of the same run ({quote(entry.id)}): {difference}; neither is published"
        yield Refusal(source=entry.source, line=entry.line, why=why)


def _difference(one: Result, other: Result) -> str:
    for key in sorted(one.metrics.keys() | other.metrics.keys()):
        here, there = one.metrics.get(key), other.metrics.get(key)
        if here != there:
            return f"{quote(key)} is {here} here and {there} there"
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    return f"they differ in {', '.join(names[:3])}"


def _sources(
    names: Sequence[str], kept: Iterable[Entry], wrong: Iterable[Refusal], repeated: Sequence[int]
) -> Iterator[ResultsFile]:
    ours: list[list[Entry]] = [[] for _ in names]
    refused = [0] * len(names)
    for entry in kept:
        ours[entry.source].append(entry)
    for refusal in wrong:
        refused[refusal.source] += refusal.lines
    for number, name in enumerate(names):
        entries = ours[number]
        yield ResultsFile(
            name=name,
            results=len(entries),
            repeated=repeated[number],
            refused=refused[number],
            cleaned=sum(entry.cleaned for entry in entries),
            runs=tuple(dict.fromkeys(entry.run for entry in entries)),
            first=min((entry.at for entry in entries), default=""),
            last=max((entry.at for entry in entries), default=""),
            versions=tuple(sorted({version for entry in entries for version in entry.versions})),
        )
