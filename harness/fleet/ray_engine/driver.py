"""The driver: hands shards to machines as they become free, keeps what streams back, and hands out again what is lost."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from harness.core.errors import UsageError
from harness.core.text import line, plural
from harness.core.units import format_size
from harness.fleet import conformity, shards, status
from harness.fleet.collect import Collected, collect
from harness.fleet.contract import CONTRACT, SHARDS, Contract, Issued, Shard, digest_of, read_contract
from harness.fleet.ray_engine import cluster
from harness.fleet.ray_engine.cluster import Actor, MachineLost
from harness.fleet.ray_engine.machine import MachineEvent
from harness.fleet.receipt import Receipt, file_name, find_receipts
from harness.machine import atomic
from harness.results.store import NAME

Tell = Callable[[str, str, int, int], None]  #: hears of a machine: its name, what it does, cases done, cases in all
_WAIT_S = 1.0
_GREET_S = 5.0
_LOST_MOST = 5  # actors of one node that may be lost before it is left alone


@dataclass
class FleetMachine:
    """One machine: its actor, what it measures, how often its actor was lost, and the classes that it cannot serve."""

    actor: Actor
    shard: Shard | None = None
    known: bool = False
    lost: int = 0
    refused: set[str] = field(default_factory=set)


class Driver:
    """Runs the shards of a contract over a cluster; what came is in `folder`, a directory for each shard."""

    def __init__(self, place: Path, folder: Path, tell: Tell) -> None:
        """Read the contract. Raises UsageError, OSError: there is none."""
        self.place = place / CONTRACT if place.is_dir() else place
        self.contract: Contract = read_contract(self.place)
        self.folder, self._tell = folder, tell
        self._cases: Mapping[str, str] = {}
        self.notes: list[str] = []  #: what is amiss with machines, a sentence each
        self._queue: deque[Shard] = deque()
        self._held: list[FleetMachine] = []
        self._done: dict[str, set[str]] = {}
        self._left_alone: set[str] = set()
        self._greeted_s = -_GREET_S

    def run(self, cases: Mapping[str, str]) -> Collected:
        """Measure by test files until every case has its result or its attempts, or no machine is left that could show it.

        Raises:
            UsageError: no machine of the cluster is of a class of the contract.
            KeyboardInterrupt: what came until then is kept, and the next run goes on with the rest.
        """
        self._cases = cases
        with self._alone():
            self.contract = read_contract(self.place)  # another driver may have handed out shards until now
            self._fill()
            return self._run()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only driver of this folder: the machines of an earlier one ended with it, so nothing of it runs any more.

        Raises:
            UsageError: another driver runs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".driver.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another fitmatrix fleet run writes to {self.folder}; wait for it, or name another --results"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _run(self) -> Collected:
        if not cluster.machines():
            raise UsageError("no node of the cluster is a machine of a fleet; start them with --resources='{\"machine\": 1}'")
        try:
            self._greet()
            while self._is_work_left():
                self._greet()
                self._assign()
                for actor in cluster.wait([one.actor for one in self._held if one.shard or not one.known], _WAIT_S):
                    self._hear(next(one for one in self._held if one.actor is actor))
        finally:
            for one in self._held:
                one.actor.end()
        return self.collected()

    def _greet(self) -> None:
        """Hold the machines that have come since, now and then."""
        if time.monotonic() - self._greeted_s < _GREET_S:
            return
        self._greeted_s = time.monotonic()
        known = {one.actor.node for one in self._held} | self._left_alone
        self._held += [FleetMachine(self._actor(node)) for node in cluster.machines() if node not in known]

    def collected(self) -> Collected:
        """Hold what came so far against the contract."""
        return collect(self.contract, find_receipts([self.folder] if self.folder.exists() else []), datetime.now(timezone.utc))

    def _actor(self, node: str) -> Actor:
        return cluster.Actor(node, cluster.name_of_node(node))

    def _fill(self) -> None:
        """Queue what was handed out and never begun; hand out again what else is missing."""
        found, now = self.collected(), datetime.now(timezone.utc)
        waiting = {one.shard for one in status.progress(self.contract, found.deliveries, now) if one.state is status.State.WAITING}
        left = set(found.missing)
        for issued in self.contract.issued:
            if issued.shard in waiting and left.issuperset(issued.keys):
                self._queue.append(self._read(issued))
                left.difference_update(issued.keys)
        coming = {shard.key(case) for shard in self._queue for case in shard.cases}
        self._hand_out(key for key in status.to_hand_out(self.contract, found, now, expected=()).again if key not in coming)

    def _read(self, issued: Issued) -> Shard:
        shard = shards.read_shard(self.place.parent / SHARDS / f"{issued.shard}.json")
        if digest_of(shard) != issued.digest:
            raise UsageError(f"{issued.shard}: its file is not the shard that was handed out; plan the fleet anew")
        return shard

    def _hand_out(self, keys: Iterable[str]) -> None:
        self.contract, cut = shards.issue(self.contract, keys)
        shards.write_issued(self.place, self.contract, cut)
        self._queue.extend(cut)

    def _is_work_left(self) -> bool:
        """Say whether something runs, or is queued for which there is a machine or may be one."""
        if any(one.shard or not one.known for one in self._held):
            return True
        return any(shard.machine_class.name not in one.refused for shard in self._queue for one in self._held)

    def _assign(self) -> None:
        """Give each machine that is free the first shard that it can serve."""
        for one in self._held:
            if not one.known or one.shard is not None:
                continue
            shard = next((shard for shard in self._queue if shard.machine_class.name not in one.refused), None)
            if shard is not None:
                self._queue.remove(shard)
                one.shard = shard
                self._done[shard.name] = set()
                one.actor.start(shard, self._cases)
                self._tell(one.actor.name, shard.name, 0, len(shard.cases))

    def _hear(self, one: FleetMachine) -> None:
        """Take what came of a machine."""
        try:
            if not one.known:
                self._meet(one)
            elif (event := one.actor.next_event()) is None:
                self._over(one)
            else:
                self._keep(one, event)
        except MachineLost as error:
            self._lose(one, str(error))

    def _meet(self, one: FleetMachine) -> None:
        """Hold a machine against the classes and versions of the contract before it gets anything."""
        found, now = one.actor.description(), datetime.now(timezone.utc)
        one.known = True
        wrong = conformity.other_version(self.contract.terms.versions, found.versions)
        late = conformity.wrong_time(found.clock, self.contract.terms.made_at, now)
        wrong = wrong or (f"its clock: {late}" if late else None)
        labels = cluster.labels_of_node(one.actor.node)
        differs = {
            kind.name: wrong or conformity.other_label(kind, labels) or conformity.not_of_class(kind, found.machine)
            for kind in self.contract.terms.classes
        }
        one.refused = {name for name, why in differs.items() if why}
        if len(one.refused) == len(differs):
            self.notes.append(f"{one.actor.name} can serve no class: {next(iter(differs.values()))}")
        held = f"Ray holds {format_size(found.ray_bytes)} of its RAM"
        self._tell(one.actor.name, f"ready, {held}" if len(one.refused) < len(differs) else "of no class", 0, 0)

    def _keep(self, one: FleetMachine, event: MachineEvent) -> None:
        """Put an event on the disk before anything else is heard of the shard."""
        shard = one.shard
        assert shard is not None
        place = self.folder / shard.name
        if event.kind == "result":
            place.mkdir(parents=True, exist_ok=True)
            with (place / NAME).open("ab") as file:
                file.write(event.data)
                file.flush()
                os.fsync(file.fileno())
        elif event.kind == "receipt":
            atomic.write_bytes(place / file_name(shard.name), event.data)
            self._done[shard.name] = set(msgspec.json.decode(event.data, type=Receipt).results)
            self._tell(one.actor.name, shard.name, len(self._done[shard.name]), len(shard.cases))
        elif event.kind == "log":
            atomic.write_bytes(place / "log", event.data)

    def _over(self, one: FleetMachine) -> None:
        """Free a machine whose shard has ended, and hand out again what it did not bring."""
        shard, one.shard = one.shard, None
        assert shard is not None
        receipt = self.folder / shard.name / file_name(shard.name)
        problem = msgspec.json.decode(receipt.read_bytes(), type=Receipt).problem if receipt.is_file() else "it left no receipt"
        if problem:
            self.notes.append(f"{one.actor.name}: {shard.name}: {line(problem)}")
            one.refused.add(shard.machine_class.name)
        elif len(self._done[shard.name]) < len(shard.cases):
            count = f"{len(self._done[shard.name])} of {plural(len(shard.cases), 'case')}"
            self.notes.append(f"{one.actor.name}: {shard.name} brought {count}: see {self.folder / shard.name / 'log'}")
        self._again(shard)
        self._tell(one.actor.name, "free", 0, 0)

    def _lose(self, one: FleetMachine, why: str) -> None:
        """Note that an actor is gone, hand out again what it had, and hold the machine anew while its node lives."""
        shard, one.shard = one.shard, None
        self.notes.append(f"{one.actor.name}: lost{f' while it measured {shard.name}' if shard else ''}: {line(why)}")
        self._tell(one.actor.name, "lost", 0, 0)
        one.actor.end()  # what failed in it may have left it alive, and it would keep the machine
        if shard is not None:
            self._again(shard)
        one.lost += 1
        if one.lost <= _LOST_MOST and one.actor.node in cluster.machines():
            one.actor, one.known = self._actor(one.actor.node), False
        else:
            self._held.remove(one)
            self._left_alone.add(one.actor.node)

    def _again(self, shard: Shard) -> None:
        """Hand out once more the cases of a shard that have not come, as long as there are attempts left."""
        missing = [key for key in map(shard.key, shard.cases) if key not in self._done[shard.name]]
        issued = self.contract.by_key() if missing else {}
        if keys := [key for key in missing if len(issued[key]) < self.contract.terms.attempts]:
            self._hand_out(keys)
