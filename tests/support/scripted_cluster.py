"""A cluster of Ray that is scripted: machines that send what a shard brings without measuring, in place of `ray_engine.cluster`.

`python -m tests.support.scripted_cluster WORDS` is `fitmatrix WORDS` with such a cluster of one machine.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from harness.cli.entry import main
from harness.core.records import encode_record
from harness.core.units import GIB
from harness.fleet import shards
from harness.fleet.contract import CONTRACT, Shard, utc
from harness.fleet.ray_engine import cluster, driver
from harness.fleet.ray_engine.cluster import MachineLost
from harness.fleet.ray_engine.machine import Described, MachineEvent
from harness.fleet.receipt import digest_of_line, read_receipt
from tests.support import builders
from tests.support.fleets import VERSIONS, contract, deliver, machine_class, measured

WAYS = ("fp32", "bf16", "fp16", "int8", "int4", "fp8", "fp4", "nf4-dq", "quanto-int8", "quanto-int4")


class ScriptedActor:
    """A machine that does with each shard what its node's script says next: whole, half, lost, full, silent."""

    def __init__(self, cluster: ScriptedCluster, node: str, name: str) -> None:
        self.cluster, self.node, self.name = cluster, node, name
        self.events: deque[MachineEvent | MachineLost] = deque()
        self.is_ended = False

    def description(self) -> Described:
        if self.cluster.scripts[self.node][:1] == ["unreachable"]:
            self.cluster.scripts[self.node].pop(0)
            raise MachineLost("the node died")
        return self.cluster.described[self.node]

    def start(self, shard: Shard, cases: Mapping[str, str]) -> None:
        assert cases == {"test_load.py": ""}
        script = self.cluster.scripts[self.node]
        how = script.pop(0) if script else "whole"
        self.cluster.began.append((self.node, shard.name, how))
        self.events = deque(self.cluster.events(shard, how))

    def next_event(self) -> MachineEvent | None:
        if not self.events:
            return None
        event = self.events.popleft()
        if isinstance(event, MachineLost):
            raise event
        return event

    def end(self) -> None:
        self.is_ended = True


class ScriptedCluster:
    """Stands in the place of `ray_engine.cluster`."""

    def __init__(self, folder: Path, scripts: Mapping[str, Sequence[str]]) -> None:
        self.folder = folder
        self.scripts = {node: [*script] for node, script in scripts.items()}
        here = Described(machine=builders.machine(), versions={**VERSIONS}, clock=utc(), ray_bytes=GIB)
        self.described = dict.fromkeys(scripts, here)
        self.labels: dict[str, dict[str, str]] = {}
        self.began: list[tuple[str, str, str]] = []
        self.actors: list[ScriptedActor] = []
        self.alive = [*scripts]

    def machines(self) -> list[str]:
        return self.alive

    def name_of_node(self, node: str) -> str:
        return f"node {node}"

    def labels_of_node(self, node: str) -> dict[str, str]:
        return self.labels.get(node, {})

    def Actor(self, node: str, name: str) -> ScriptedActor:  # noqa: N802 - as the class is called
        self.actors.append(ScriptedActor(self, node, name))
        return self.actors[-1]

    def wait(self, actors: Sequence[ScriptedActor], timeout_s: float) -> list[ScriptedActor]:
        assert actors, "nothing to wait for: the driver would spin"
        assert timeout_s > 0
        return [*actors]

    def events(self, shard: Shard, how: str) -> list[MachineEvent | MachineLost]:
        """Return what a machine sends of a shard."""
        if how == "silent":
            return []
        cases = {"full": shard.cases[:1], "half": shard.cases[:1], "lost": shard.cases[:1]}.get(how, shard.cases)
        lines = [encode_record(measured(case, at=utc())) for case in cases]
        path = deliver(self.folder / "sent", shard, [], problem="the disk is full" if how == "full" else "", ended_at=None)
        receipt = read_receipt(path)
        sent: list[MachineEvent | MachineLost] = []
        for case, line in zip(cases, lines, strict=True):
            receipt = replace(receipt, results=receipt.results | {shard.key(case): digest_of_line(line)})
            sent += [MachineEvent("result", line + b"\n"), MachineEvent("beat"), MachineEvent("receipt", encode_record(receipt))]
        if how == "lost":
            # Lines whose receipt did not come any more.
            unvouched = [MachineEvent("result", encode_record(measured(case, at=utc())) + b"\n") for case in shard.cases[1:]]
            return [*sent, *unvouched, MachineLost("the actor died")]
        return [*sent, MachineEvent("receipt", encode_record(replace(receipt, ended_at=utc()))), MachineEvent("log", b"the end")]


def alone(path: Path, models: int, machines: int) -> tuple[float, int]:
    """Run a contract with a shard for each model over so many scripted machines, which send all at once, in a process of its own.

    Return the seconds of its processor and the bytes that it holds at the end, those of the scripted machines among them.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_drive, args=(path, models, machines, theirs))
    process.start()
    theirs.close()
    found: tuple[float, int] = ours.recv()
    process.join()
    return found


def _drive(path: Path, models: int, machines: int, pipe: Connection) -> None:
    names = [f"m{number}" for number in range(models)]
    made, cut = contract(machine_class(machines=tuple(names)), models=names, precisions=WAYS, made_at=utc())
    shards.write_issued(path / CONTRACT, made, cut)
    pytest.MonkeyPatch().setattr(driver, "cluster", ScriptedCluster(path, {str(number): () for number in range(machines)}))
    driven = driver.Driver(path, path / "results", lambda *_: None)
    started = time.process_time()
    assert len(driven.run({"test_load.py": ""}).counted) == models * len(WAYS)
    pipe.send((time.process_time() - started, psutil.Process().memory_info().rss))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(driver, "cluster", ScriptedCluster(Path.cwd(), {"1": ()}))
        patched.setattr(cluster, "cluster_at", lambda *_, **__: nullcontext())
        sys.exit(main(sys.argv[1:]))
