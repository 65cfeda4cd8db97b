"""Hold receipts against the contract: which cases have their one result, and everything that is not as it was agreed on.

The contract decides alone. A receipt is heard only if its shard was handed out, and of its results those count that lie beside it
unchanged, are of a case of that shard, and were measured on such a machine, with those versions, after the contract was made.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path

import msgspec

from harness.core.errors import HarnessError, StoreError, UsageError
from harness.core.records import Outcome, Record, Result
from harness.core.text import plural
from harness.fleet import conformity
from harness.fleet.contract import CONTRACT_SCHEMA, Contract, Issued
from harness.fleet.receipt import Line, Receipt, read_receipt, read_results
from harness.machine import atomic
from harness.machine.regular import open_regular
from harness.results.store import NAME

REPORT = "collected.json"


class Amiss(str, Enum):
    """What is not as it was agreed on."""

    MISSING = "missing"  # no result counts for a case
    UNEXPECTED = "unexpected"  # nobody asked for it
    TWICE = "twice"  # another result of the case counts
    ALTERED = "altered"  # the line is not the one that was vouched for
    WRONG_MACHINE = "wrong machine"
    OTHER_VERSION = "other version"
    WRONG_TIME = "wrong time"
    OTHER_THREADS = "other threads"
    ONE_NAME = "one name"  # of two machines
    ENDED = "ended"  # a machine said why nothing more came
    UNREADABLE = "unreadable"
    FLEET_FILE = "fleet file"  # a class has no cases, for its table was wrong


class Finding(Record, frozen=True, kw_only=True):
    """One thing that is amiss: with a case by its key, a shard, a class or a file, and why in words."""

    kind: Amiss
    of: str
    why: str


class CountedResult(Record, frozen=True, kw_only=True):
    """The one result of a case that counts: where its line is and how it came there."""

    key: str
    outcome: Outcome
    at: str
    digest: str
    shard: str
    attempt: int
    identity: str
    path: str
    offset: int
    length: int
    threads: int | None = None

    @property
    def rank(self) -> tuple[bool, int, str, str]:
        """What counts before another: what came to an end before a crash, an earlier attempt before a later one."""
        return self.outcome is Outcome.CRASH, self.attempt, self.at, self.digest


class Delivery(Record, frozen=True, kw_only=True):
    """A receipt whose shard was handed out, and where it was found."""

    issued: Issued
    receipt: Receipt
    path: str


class Collected(Record, frozen=True, kw_only=True):
    """What came back: the result that counts by key, in the contract's order, the receipts that were heard, and what is amiss."""

    counted: dict[str, CountedResult]
    deliveries: tuple[Delivery, ...]
    findings: tuple[Finding, ...]

    @property
    def missing(self) -> list[str]:
        """Return the keys of the cases that have no result."""
        return [found.of for found in self.findings if found.kind is Amiss.MISSING]


class _Collector:
    """Takes deliveries one by one; what the lines of results show is kept, their figures are not: there may be gigabytes."""

    def __init__(self, contract: Contract, now: datetime) -> None:
        self._contract, self._now = contract, now
        self._expected = {one.key: one.case for one in contract.terms.cases}
        self.counted: dict[str, CountedResult] = {}
        self.findings: dict[Finding, None] = {}

    def note(self, kind: Amiss, of: str, why: str) -> None:
        self.findings[Finding(kind=kind, of=of, why=why)] = None

    def take(self, delivery: Delivery) -> None:
        """Count the results that a receipt vouches for, and note what it vouches for wrongly."""
        shard, receipt = delivery.issued, delivery.receipt
        if receipt.problem:
            self.note(Amiss.ENDED, shard.shard, receipt.problem)
        place = Path(delivery.path).with_name(receipt.file)
        asked = set(shard.keys)
        for key in receipt.results.keys() - asked:
            self.note(Amiss.UNEXPECTED, key, f"shard {shard.shard} does not ask for it ({delivery.path})")
        left = {digest: key for key, digest in receipt.results.items() if key in asked}
        try:
            for found in read_results(place) if left else ():
                if found.digest not in left:
                    continue
                key = left.pop(found.digest)
                if self._is_agreed(key, found, delivery):
                    self._count(_counted(key, found, delivery, place))
        except StoreError as error:
            self.note(Amiss.UNREADABLE, shard.shard, str(error))
            return
        for digest, key in left.items():
            self.note(Amiss.ALTERED, key, f"{place} has no line of it with the SHA-256 {digest[:12]} of the receipt")

    def _is_agreed(self, key: str, found: Line, delivery: Delivery) -> bool:
        """Say whether a result is what was asked for, and note why not; the receipt's own word on that is worth nothing."""
        wrong = next(self._objections(key, found.result, delivery.issued), None)
        if wrong is not None:
            self.note(wrong[0], key, f"{wrong[1]} (shard {delivery.issued.shard})")
        return wrong is None

    def _objections(self, key: str, result: Result, issued: Issued) -> Iterator[tuple[Amiss, str]]:
        terms = self._contract.terms
        if result.case != self._expected[key]:
            yield Amiss.UNEXPECTED, f"the line of this name holds {result.case.id} with another workload or limit"
        if other := conformity.not_of_class(self._contract.machine_class(issued.machine_class), result.machine):
            yield Amiss.WRONG_MACHINE, f"the machine {other}"
        if other := conformity.other_version(terms.versions, result.environment):
            yield Amiss.OTHER_VERSION, other
        if other := conformity.other_threads(self._contract.machine_class(issued.machine_class), result):
            yield Amiss.OTHER_THREADS, other
        if wrong := conformity.wrong_time(result.at, terms.made_at, self._now):
            yield Amiss.WRONG_TIME, f"{wrong}: its clock is wrong, or it was not measured for this contract"

    def _count(self, found: CountedResult) -> None:
        other = self.counted.setdefault(found.key, found)
        if other is found:
            return
        first, second = sorted((found, other), key=lambda one: one.rank)
        self.counted[found.key] = first
        same = "the same result" if first.digest == second.digest else f"one of {second.at} by shard {second.shard}"
        self.note(Amiss.TWICE, found.key, f"{same} came as well; that of {first.at} by shard {first.shard} counts")


def _counted(key: str, found: Line, delivery: Delivery, place: Path) -> CountedResult:
    return CountedResult(
        key=key,
        outcome=found.result.outcome,
        at=found.result.at,
        digest=found.digest,
        shard=delivery.issued.shard,
        attempt=delivery.issued.attempt,
        identity=delivery.receipt.identity,
        path=str(place),
        offset=found.offset,
        length=found.length,
        threads=conformity.threads_of(found.result),
    )


def collect(contract: Contract, paths: Iterable[Path], now: datetime) -> Collected:
    """Hold receipts against a contract; one that is wrong holds up none of the others.

    Each key of the contract is counted once or missing, whatever the receipts say.
    """
    collector = _Collector(contract, now)
    deliveries, strange = hear(contract, paths)
    collector.findings.update(dict.fromkeys(strange))
    for delivery in deliveries:
        collector.take(delivery)
    _note_names(deliveries, collector)
    for name, why in contract.terms.faults.items():
        collector.note(Amiss.FLEET_FILE, name, why)
    heard = defaultdict[str, list[Delivery]](list)
    for delivery in deliveries:
        heard[delivery.issued.shard].append(delivery)
    counted: dict[str, CountedResult] = {}
    for key, issued in contract.by_key().items():
        if key in collector.counted:
            counted[key] = collector.counted[key]
        else:
            collector.note(Amiss.MISSING, key, _why_missing(key, issued, heard, contract.terms.attempts))
    _note_threads(contract, counted, collector)
    return Collected(counted=counted, deliveries=tuple(deliveries), findings=tuple(collector.findings))


def hear(contract: Contract, paths: Iterable[Path]) -> tuple[list[Delivery], list[Finding]]:
    """Read receipts; return those of shards that were handed out, and why each of the rest is not heard."""
    known = {one.digest: one for one in contract.issued}
    deliveries: list[Delivery] = []
    strange: list[Finding] = []
    for path in paths:
        try:
            receipt = read_receipt(path)
        except (HarnessError, OSError) as error:
            strange.append(Finding(kind=Amiss.UNREADABLE, of=str(path), why=_without(path, error)))
            continue
        issued = known.get(receipt.shard_digest)
        if issued is not None and receipt.contract == contract.digest:
            deliveries.append(Delivery(issued=issued, receipt=receipt, path=str(path)))
            continue
        what = f"a shard {receipt.shard!r} that this contract did not hand out"
        if receipt.contract != contract.digest:
            what = f"contract {receipt.contract[:12]}, and this is {contract.digest[:12]}"
        strange.append(Finding(kind=Amiss.UNEXPECTED, of=str(path), why=f"is a receipt for {what}"))
    return deliveries, strange


def _without(path: Path, error: HarnessError | OSError) -> str:
    """Say what is wrong with a file that is named already."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error).removeprefix(f"{path}: ")


def _note_names(deliveries: Sequence[Delivery], collector: _Collector) -> None:
    """Note the names that several machines go by; their results count, for each says of itself what it is."""
    owners: dict[str, set[str]] = defaultdict(set)
    for delivery in deliveries:
        if delivery.receipt.machine:
            owners[delivery.receipt.machine].add(delivery.receipt.identity)
    for name, identities in owners.items():
        if len(identities) > 1:
            collector.note(Amiss.ONE_NAME, name, f"{len(identities)} machines go by this name: {', '.join(sorted(identities))}")


def _note_threads(contract: Contract, counted: Mapping[str, CountedResult], collector: _Collector) -> None:
    """Note the results with another number of threads than most of their class; they count: where one is agreed on all have it."""
    for kind in contract.terms.classes:
        told = [
            (one.key, found.threads)
            for one in contract.terms.cases
            if one.machine_class == kind.name and (found := counted.get(one.key)) is not None and found.threads is not None
        ]
        usual = Counter(threads for _, threads in told).most_common(1)
        for key, threads in told:
            if threads != usual[0][0]:
                others = f"most results of class {kind.name} with {usual[0][0]}"
                collector.note(Amiss.OTHER_THREADS, key, f"measured with {plural(threads, 'thread')}, and {others}")


def _why_missing(key: str, issued: Sequence[Issued], heard: Mapping[str, Sequence[Delivery]], attempts: int) -> str:
    if not issued:
        return "no shard with it was handed out"
    last = issued[-1]
    receipts = [delivery.receipt for delivery in heard.get(last.shard, ())]
    if not receipts:
        why = f"shard {last.shard} was never heard of"
    elif all(receipt.ended_at is None for receipt in receipts):
        why = (
            f"shard {last.shard} was last heard of at {max(receipt.heard_at for receipt in receipts)}: it runs, or its machine died"
        )
    elif any(key in receipt.results for receipt in receipts):
        why = f"what shard {last.shard} brought does not count"
    else:
        why = f"shard {last.shard} ended without it"
    left = attempts - len(issued)
    return f"{why}; {plural(left, 'attempt')} left" if left > 0 else f"{why}; given up after {plural(len(issued), 'attempt')}"


def write_counted(collected: Collected, folder: Path) -> Path:
    """Write the results that count, a line for each case as it came, and beside them what is amiss; return the file of results.

    Raises:
        UsageError: the folder is a file, or has results that this did not write.
        OSError: it cannot be written; what was there stays as it was.
    """
    place, report = folder / NAME, folder / REPORT
    if folder.is_file():
        raise UsageError(f"--to {folder} is a file; name a directory")
    if place.exists() and not report.exists():
        raise UsageError(f"--to {folder} has results that were not collected ({NAME} without {REPORT}); name another directory")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=folder, prefix=f".{NAME}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for one in collected.counted.values():
                with open_regular(Path(one.path)) as source:
                    source.seek(one.offset)
                    file.write(source.read(one.length).strip() + b"\n")
        atomic.write_bytes(report, msgspec.json.encode(as_plain(collected)) + b"\n")
        Path(draft).replace(place)
    finally:
        Path(draft).unlink(missing_ok=True)
    return place


def as_plain(collected: Collected) -> dict[str, object]:
    """Return what came back as plain values: the digest of each result that counts, and what is amiss."""
    counted = {
        key: {"sha256": one.digest, "outcome": one.outcome, "shard": one.shard, "attempt": one.attempt, "machine": one.identity}
        for key, one in collected.counted.items()
    }
    return {"schema": CONTRACT_SCHEMA, "counted": counted, "findings": msgspec.to_builtins(collected.findings)}
