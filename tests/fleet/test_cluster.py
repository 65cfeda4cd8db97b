"""What is asked of Ray and what its answers mean, against a stub of its module; a real cluster runs in test_ray_engine."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from harness.core.errors import UsageError
from harness.fleet.ray_engine import cluster
from harness.fleet.ray_engine.machine import HeldMachine, MachineEvent
from tests.support import fleets

NODES = [
    {"NodeID": "a" * 20, "Alive": True, "Resources": {"machine": 1.0}, "NodeName": "lab-1", "Labels": {"rack": "2"}},
    {"NodeID": "b" * 20, "Alive": False, "Resources": {"machine": 1.0}, "NodeName": "lab-2"},
    {"NodeID": "c" * 20, "Alive": True, "Resources": {"CPU": 8.0}, "NodeName": ""},
    {"NodeID": "d" * 20, "Alive": True, "Resources": {"machine": 0.5}},
]


class RayError(Exception):
    pass


class AuthenticationError(Exception):
    pass


class Ray(ModuleType):
    """Answers as Ray does, and keeps what it was asked; `lost` is what an answer raises, `refuses` what a connection does."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = ModuleType("ray.exceptions")
        vars(self.exceptions).update(RayError=RayError, AuthenticationError=AuthenticationError)
        self.asked: list[Any] = []
        self.lost: Exception | None = None
        self.refuses: Exception | None = None
        self.up = False
        self.events = iter([MachineEvent("beat"), MachineEvent("result", b"1")])

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **given: Any) -> None:
        self.asked.append(("init", given))
        if self.refuses:
            raise self.refuses

    def shutdown(self) -> None:
        self.asked.append("shutdown")

    def nodes(self) -> list[dict[str, Any]]:
        return NODES

    def remote(self, *made: object) -> Ray:
        """Make a class an actor's, or an actor of it."""
        self.asked.append(("remote", *made))
        return self

    def options(self, **given: Any) -> Ray:
        self.asked.append(("options", given))
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("describe", "run"):
            return Method(self, name)
        raise AttributeError(name)

    def get(self, reference: Any) -> Any:
        if self.lost:
            raise self.lost
        return reference

    def kill(self, actor: Any) -> None:
        self.asked.append(("kill", actor))

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.asked.append(("wait", num_returns, timeout))
        return references[1:2], references[:1]


class Method:
    """A method of an actor."""

    def __init__(self, ray: Ray, name: str) -> None:
        self._ray, self._name = ray, name

    def options(self, **given: Any) -> Method:
        self._ray.asked.append((self._name, given))
        return self

    def remote(self, *given: Any) -> Any:
        self._ray.asked.append((self._name, given))
        return self._ray.events if self._name == "run" else object()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    stub, strategies = Ray(), ModuleType("ray.util.scheduling_strategies")
    vars(strategies)["NodeAffinitySchedulingStrategy"] = lambda node_id, soft: (node_id, soft)
    for name, module in (("ray", stub), ("ray.util", ModuleType("ray.util")), (strategies.__name__, strategies)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in cluster._QUIET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    stub.asked.clear()
    return stub


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray status` answers who has no token, and how it was asked."""
    found: dict[str, Any] = {"returncode": 0, "stdout": "", "stderr": ""}

    def run(command: list[str], *, env: dict[str, str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        found["command"], found["env"] = command[1:], env
        if found["returncode"] is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, found["returncode"], found["stdout"], found["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_a_machine_is_a_node_that_lives_and_has_the_resource_once(ray: Ray) -> None:
    assert cluster.machines() == ["a" * 20]
    assert cluster.name_of_node("a" * 20) == "lab-1"
    assert cluster.name_of_node("b" * 20) == "lab-2"
    assert cluster.name_of_node("c" * 20) == "c" * 12, "a node without a name is called by its id"
    assert cluster.name_of_node("e" * 20) == "e" * 12, "one that is gone too"
    assert cluster.labels_of_node("a" * 20) == {"rack": "2"}
    assert cluster.labels_of_node("b" * 20) == cluster.labels_of_node("e" * 20) == {}
    assert ray.asked == []


def test_without_an_address_a_cluster_of_this_machine_alone_is_started_and_left(ray: Ray) -> None:
    with cluster.cluster_at(None, without_token=False):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        [(_, given)] = ray.asked
    assert given["address"] == "local"
    assert given["resources"] == {"machine": 1}
    assert (given["include_dashboard"], given["log_to_driver"]) == (False, False)
    assert ray.asked[1:] == ["shutdown"]


def test_what_is_set_already_stays_and_a_cluster_that_is_up_is_not_left(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with cluster.cluster_at(None, without_token=False):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    ray.asked.clear()
    ray.up = True
    with cluster.cluster_at(None, without_token=False):
        pass
    assert ray.asked == []


def test_who_stops_in_the_midst_leaves_the_cluster(ray: Ray) -> None:
    with pytest.raises(KeyboardInterrupt), cluster.cluster_at(None, without_token=False):
        raise KeyboardInterrupt
    assert ray.asked[-1] == "shutdown"


def test_a_cluster_at_an_address_is_joined_as_it_is(ray: Ray, stranger: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked first as a stranger would; the token that we have is not shown."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    stranger |= {"returncode": 1, "stderr": "ray.exceptions.AuthenticationError: no token"}
    with cluster.cluster_at("lab:6379", without_token=False):
        assert ray.asked == [("init", {"address": "lab:6379", "log_to_driver": False, "logging_level": "error"})]
    assert stranger["command"] == ["-m", "ray.scripts.scripts", "status", "--address", "lab:6379"]
    assert "RAY_AUTH_TOKEN_PATH" not in stranger["env"]
    assert stranger["env"]["RAY_AUTH_MODE"] == "disabled"
    with cluster.cluster_at("auto", without_token=False):
        assert stranger["command"] == ["-m", "ray.scripts.scripts", "status"]


def test_a_cluster_without_tokens_is_joined_only_by_who_says_so(ray: Ray, stranger: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="lets in who has no token"), cluster.cluster_at("lab:6379", without_token=False):
        pass
    assert ray.asked == []
    stranger.pop("command")
    with cluster.cluster_at("lab:6379", without_token=True):
        assert ray.asked[0][1]["address"] == "lab:6379"
    assert "command" not in stranger, "who says so need not ask"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"returncode": None}, "no cluster answers there within 60 s"),
        (
            {"returncode": 1, "stderr": "first\nrefused: x\n"},
            r"no cluster can be reached there \(refused: x\)",
        ),
        ({"returncode": 1, "stdout": "said here"}, r"\(said here\)"),
        ({"returncode": 1}, r"\(it said nothing\)"),
    ],
)
def test_an_address_where_nobody_answers(answer: dict[str, Any], why: str, ray: Ray, stranger: dict[str, Any]) -> None:
    stranger |= answer
    with pytest.raises(UsageError, match=why), cluster.cluster_at("lab:6379", without_token=False):
        pass
    assert ray.asked == []


@pytest.mark.parametrize(
    ("refuses", "why"),
    [
        (AuthenticationError("no"), "--ray local: the cluster wants a token"),
        (ConnectionError("first\nsecond"), r"--ray local: no cluster can be reached there \(first\)"),
        (ValueError("bad"), r"\(bad\)"),
    ],
)
def test_what_ray_refuses_is_one_sentence(refuses: Exception, why: str, ray: Ray) -> None:
    ray.refuses = refuses
    with pytest.raises(UsageError, match=why), cluster.cluster_at(None, without_token=False):
        pass
    assert "shutdown" not in ray.asked


def test_an_actor_holds_its_machine_alone_and_runs_nothing_twice(ray: Ray) -> None:
    actor = cluster.Actor("a" * 20, "lab-1")
    assert ray.asked[0] == ("remote", HeldMachine)
    assert ray.asked[2] == ("remote", "lab-1", "a" * 20)
    options = ray.asked[1][1]
    assert options["resources"] == {"machine": 1}
    assert (options["max_restarts"], options["max_task_retries"], options["num_cpus"]) == (0, 0, 0)
    assert options["scheduling_strategy"] == ("a" * 20, False), "there and nowhere else"
    assert (actor.node, actor.name) == ("a" * 20, "lab-1")
    assert actor.awaited is actor.described
    assert actor.description() is actor.described
    actor.end()
    assert ray.asked[-1][0] == "kill"


def test_events_come_one_by_one_until_the_shard_is_over(ray: Ray) -> None:
    actor = cluster.Actor("a" * 20, "lab-1")
    shard = fleets.contract()[1][0]
    actor.start(shard, {"test_own.py": "pass"})
    assert ray.asked[-2:] == [("run", {"num_returns": "streaming"}), ("run", (shard, {"test_own.py": "pass"}))]
    assert actor.awaited is ray.events
    assert actor.next_event() == MachineEvent("beat")
    assert actor.next_event() == MachineEvent("result", b"1")
    assert actor.next_event() is None
    assert actor.awaited is actor.described


def test_a_machine_that_is_gone_is_said_in_the_first_line_of_ray_s_words(ray: Ray) -> None:
    actor = cluster.Actor("a" * 20, "lab-1")
    ray.lost = RayError("\nthe actor died\nbecause of many things")
    with pytest.raises(cluster.MachineLost, match=r"^the actor died$"):
        actor.description()


def test_waiting_tells_of_whom_something_came(ray: Ray) -> None:
    one, other = cluster.Actor("a" * 20, "lab-1"), cluster.Actor("d" * 20, "lab-2")
    assert cluster.wait([one, other], 2.5) == [other]
    assert ray.asked[-1] == ("wait", 1, 2.5)
