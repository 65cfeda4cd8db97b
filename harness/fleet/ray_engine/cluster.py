"""A cluster of Ray: reached, with an actor for each machine in it. The only module that imports ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from harness.core.errors import UsageError
from harness.fleet.contract import Shard
from harness.fleet.ray_engine.machine import Described, HeldMachine, MachineEvent

MACHINE = "machine"  #: the resource that each machine of a fleet has one of: ray start --resources='{"machine": 1}'

# Nothing runs twice by itself: attempts are the contract's, and numbered.
_ONCE = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 0}
_DRIVER_STORE_BYTES = 80_000_000
_ANSWER_S = 60
_TURNED_AWAY = "AuthenticationError"  # the class that Ray raises; a test holds it against a cluster with tokens
_QUIET = {"RAY_memory_monitor_refresh_ms": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class MachineLost(Exception):
    """A machine's actor is gone, with its process or its node."""


def ray_module() -> Any:
    """Import ray. Raises UsageError: it is not installed."""
    try:
        import ray
    except ImportError:
        raise UsageError('fleet run measures over Ray, which is not installed: pip install "ray>=2.50"') from None
    return ray


@contextmanager
def cluster_at(address: str | None, *, without_token: bool) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine alone if there is no address; leave it at the end.

    Raises:
        UsageError: there is none, it has another version of Ray or Python, or whoever reaches its ports could run code on it.
    """
    ray = ray_module()
    if address is not None and not without_token and not _wants_token(address):
        raise UsageError(
            f"--ray {address}: this cluster lets in who has no token, and whoever reaches it runs code on it; start its nodes with "
            "RAY_AUTH_MODE=token, or say --without-token"
        )
    if ray.is_initialized():
        yield
        return
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    alone = {"resources": {MACHINE: 1}, "object_store_memory": _DRIVER_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **({} if address else alone))
    except getattr(ray.exceptions, "AuthenticationError", ()):
        raise UsageError(
            f"--ray {address or 'local'}: the cluster wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
        ) from None
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"--ray {address or 'local'}: no cluster can be reached there ({first})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _wants_token(address: str) -> bool:
    """Ask a cluster as a stranger would, whatever our own environment says: whether it turns away who has no token.

    Raises:
        UsageError: nobody answers there.
    """
    where = [] if address == "auto" else ["--address", address]
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")} | {
        "RAY_AUTH_MODE": "disabled"
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", *where]
    try:
        done = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"--ray {address}: no cluster answers there within {_ANSWER_S} s; is it the address of its head?"
        ) from None
    if done.returncode and _TURNED_AWAY not in done.stderr:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UsageError(f"--ray {address}: no cluster can be reached there ({last})")
    return done.returncode != 0


def machines() -> list[str]:
    """Return the ids of the nodes that live and have the resource of a machine."""
    ray = ray_module()
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(MACHINE, 0) >= 1]


def name_of_node(node: str) -> str:
    """Return what a node is called in its cluster."""
    ray = ray_module()
    return next((str(one.get("NodeName") or node[:12]) for one in ray.nodes() if one["NodeID"] == node), node[:12])


def labels_of_node(node: str) -> dict[str, str]:
    """Return what a node is labeled with, by `ray start --labels` and by Ray itself, which names the first card."""
    ray = ray_module()
    return next(({**one.get("Labels", {})} for one in ray.nodes() if one["NodeID"] == node), {})


class Actor:
    """A machine, held by an actor on its node."""

    def __init__(self, node: str, name: str) -> None:
        ray = ray_module()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        self.node, self.name = node, name
        self._actor = ray.remote(HeldMachine).options(**_ONCE, resources={MACHINE: 1}, scheduling_strategy=there).remote(name, node)
        self.described: Any = self._actor.describe.remote()
        self._stream: Any = None

    def start(self, shard: Shard, cases: Mapping[str, str]) -> None:
        """Begin to measure a shard; `next_event` tells how it goes."""
        self._stream = self._actor.run.options(num_returns="streaming").remote(shard, cases)

    @property
    def awaited(self) -> Any:
        """What to wait for: the next event, or the description of the machine."""
        return self._stream if self._stream is not None else self.described

    def description(self) -> Described:
        """Return what the machine is, once it is awaited. Raises MachineLost."""
        found: Described = self._got(self.described)
        return found

    def next_event(self) -> MachineEvent | None:
        """Return the next event, None once the shard is over. Raises MachineLost."""
        try:
            reference = next(self._stream)
        except StopIteration:
            self._stream = None
            return None
        event: MachineEvent = self._got(reference)
        return event

    def _got(self, reference: Any) -> Any:
        ray = ray_module()
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            raise MachineLost(str(error).strip().partition("\n")[0]) from None

    def end(self) -> None:
        """End the actor, and with it what it measures."""
        ray_module().kill(self._actor)


def wait(actors: Sequence[Actor], timeout_s: float) -> list[Actor]:
    """Return the actors of which something came, at once or within a time."""
    by_id = {id(one.awaited): one for one in actors}
    ready, _ = ray_module().wait([one.awaited for one in actors], num_returns=1, timeout=timeout_s)
    return [by_id[id(one)] for one in ready if id(one) in by_id]
