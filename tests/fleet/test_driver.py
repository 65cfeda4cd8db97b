"""What the driver makes of what machines send, over a cluster that is scripted: it needs no Ray, and no case is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.units import GIB
from harness.fleet import shards
from harness.fleet.collect import Amiss, Collected
from harness.fleet.contract import CONTRACT, read_contract, utc
from harness.fleet.ray_engine import driver
from tests.support import builders
from tests.support.fleets import contract, machine_class
from tests.support.scripted_cluster import ScriptedCluster


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripts: Mapping[str, Sequence[str]],
    labels: Mapping[str, dict[str, str]] | None = None,
    **described: Any,
) -> tuple[driver.Driver, Collected, ScriptedCluster]:
    """Run a contract, else two shards of two cases each, over scripted nodes; `described` changes what the first node is."""
    if not (tmp_path / CONTRACT).exists():
        made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b"), made_at=utc())
        shards.write_issued(tmp_path / CONTRACT, made, cut)
    cluster = ScriptedCluster(tmp_path, scripts)
    cluster.labels = {**(labels or {})}
    first = next(iter(scripts))
    cluster.described[first] = replace(cluster.described[first], **described)
    monkeypatch.setattr(driver, "cluster", cluster)
    driven = driver.Driver(tmp_path, tmp_path / "results", lambda *_: None)
    found = driven.run({"test_load.py": ""})
    assert all(actor.is_ended for actor in cluster.actors)
    assert sorted([*found.counted, *found.missing]) == sorted(one.key for one in read_contract(tmp_path).terms.cases)
    return driven, found, cluster


def test_shards_go_to_machines_as_they_become_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": [], "y": []})
    assert cluster.began == [("x", "small-1", "whole"), ("y", "small-2", "whole")]
    assert len(found.counted) == 4
    assert not found.findings
    assert not driven.notes
    assert (tmp_path / "results/small-1/log").read_bytes() == b"the end"


def test_one_machine_takes_one_shard_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for _, name, _ in run(tmp_path, monkeypatch, {"x": []})[2].began] == ["small-1", "small-2"]


@pytest.mark.parametrize("how", ["half", "lost"])
def test_what_is_lost_is_handed_out_again_and_nothing_else(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that came without its receipt counts for nothing, so its case is measured again, and counted once."""
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": [how]})
    assert not found.missing
    (again,) = [one for one in driven.contract.issued if one.attempt == 2]
    assert again.keys == ("small:a/int8/cpu",)
    assert [found.counted[key].attempt for key in again.keys] == [2]
    assert [how for _, _, how in cluster.began] == [how, "whole", "whole"]
    assert len(driven.notes) == 1


def test_a_machine_whose_disk_is_full_gets_no_more_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": ["full"], "y": []})
    assert [node for node, name, _ in cluster.began if name != "small-1"] == ["y", "y"]
    assert not found.missing
    assert driven.notes == ["node x: small-1: the disk is full"]
    assert {one.kind for one in found.findings} == {Amiss.ENDED}


def test_a_machine_that_leaves_no_receipt_gets_no_more_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": ["silent"], "y": []})
    assert [(node, how) for node, _, how in cluster.began] == [("x", "silent"), ("y", "whole"), ("y", "whole")]
    assert not found.missing
    assert driven.notes == ["node x: small-1: it left no receipt"]


def test_attempts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": ["lost"] * 9, "y": []})
    assert [how for _, _, how in cluster.began].count("lost") <= 3
    assert all(len(issued) <= 3 for issued in driven.contract.by_key().values())
    assert len(found.counted) >= 3


def test_attempts_are_those_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, cut = contract(made_at=utc(), attempts=1)
    shards.write_issued(tmp_path / CONTRACT, made, cut)
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": ["half"]})
    assert (len(cluster.began), len(driven.contract.issued), len(found.missing)) == (1, 1, 1)


def test_a_node_that_is_gone_gets_no_other_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ScriptedCluster, "machines", lambda self: ["y"] if any(how == "lost" for *_, how in self.began) else ["x", "y"]
    )
    _, found, cluster = run(tmp_path, monkeypatch, {"x": ["lost"], "y": []})
    assert not found.missing
    assert [actor.node for actor in cluster.actors] == ["x", "y"]


def test_a_node_that_dies_again_and_again_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is seen to live each time that the driver looks for machines."""
    monkeypatch.setattr(driver, "_GREET_S", 0.0)
    _, found, cluster = run(tmp_path, monkeypatch, {"x": ["unreachable"] * 99, "y": []})
    assert not found.missing
    assert len([actor for actor in cluster.actors if actor.node == "x"]) == 6


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"machine": builders.machine(ram_bytes=8 * GIB)}, "can serve no class: has 8.00 GiB of RAM"),
        ({"versions": {"torch": "2.12.0"}}, "can serve no class: torch is 2.12.0, and the contract says 2.13.0"),
        ({"clock": "2019-01-01T00:00:00Z"}, "can serve no class: its clock: 2019-01-01T00:00:00Z is before the contract"),
    ],
)
def test_a_machine_that_is_not_as_agreed_gets_nothing(
    described: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": [], "y": []}, **described)
    assert {node for node, _, _ in cluster.began} == {"y"}
    assert not found.missing
    assert said in driven.notes[0]
    assert driven.notes[0].startswith("node x ")


def test_a_class_takes_the_nodes_that_are_labeled_as_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [machine_class("new", labels={"card": ("A100", "H100")}), machine_class("old", labels={"card": ("T4",)})]
    made, cut = contract(*kinds, made_at=utc())
    shards.write_issued(tmp_path / CONTRACT, made, cut)
    labels = {"x": {"card": "T4"}, "y": {"card": "H100"}, "z": {}}
    driven, found, cluster = run(tmp_path, monkeypatch, {node: [] for node in labels}, labels=labels)
    assert not found.missing
    assert sorted((node, name.partition("-")[0]) for node, name, _ in cluster.began) == [("x", "old"), ("y", "new")]
    assert driven.notes == ["node z can serve no class: its label card is missing, and class new asks for 'A100' or 'H100'"]


def test_without_a_machine_of_the_class_it_ends_and_the_next_run_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, _ = run(tmp_path, monkeypatch, {"x": []}, versions={})
    assert len(found.missing) == 4
    _, found, cluster = run(tmp_path, monkeypatch, {"x": []})
    assert not found.missing
    assert [name for _, name, _ in cluster.began] == ["small-1", "small-2"]


def test_what_has_come_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, {"x": []})
    driven, found, cluster = run(tmp_path, monkeypatch, {"x": []})
    assert not cluster.began
    assert len(found.counted) == 4
    assert len(driven.contract.issued) == 2


def test_a_shard_that_nobody_began_is_not_run_once_its_cases_have_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `fleet resume` on a shard that was lost: two shards with the same cases wait."""
    made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b"), made_at=utc())
    made, again = shards.issue(made, [one.key for one in made.terms.cases])
    shards.write_issued(tmp_path / CONTRACT, made, [*cut, *again])
    _, found, cluster = run(tmp_path, monkeypatch, {"x": []})
    assert len(cluster.began) == 2
    assert not found.findings


def test_a_node_that_comes_later_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_GREET_S", 0.0)
    alive = ["x"]
    monkeypatch.setattr(ScriptedCluster, "machines", lambda self: [*alive, *(["y"] if self.began else [])])
    _, found, cluster = run(tmp_path, monkeypatch, {"x": ["lost"], "y": []})
    assert not found.missing
    assert "y" in {node for node, _, _ in cluster.began}


def test_two_drivers_of_one_folder_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven, _, _ = run(tmp_path, monkeypatch, {"x": []})
    with driven._alone(), pytest.raises(UsageError, match="another fitmatrix fleet run writes to"):
        run(tmp_path, monkeypatch, {"x": []})


def test_a_driver_that_waited_goes_on_from_what_another_handed_out_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cut = contract(made_at=utc())
    shards.write_issued(tmp_path / CONTRACT, made, cut)
    waiting = driver.Driver(tmp_path, tmp_path / "results", lambda *_: None)
    _, _, cluster = run(tmp_path, monkeypatch, {"x": ["half"]})
    before, began = read_contract(tmp_path), [*cluster.began]
    assert [one.attempt for one in before.issued] == [1, 2]
    waiting.run({"test_load.py": ""})
    assert (read_contract(tmp_path), cluster.began) == (before, began)
    assert waiting.collected().missing == []


def test_a_cluster_without_machines_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedCluster, "machines", lambda _: [])
    with pytest.raises(UsageError, match="no node of the cluster is a machine of a fleet"):
        run(tmp_path, monkeypatch, {"x": []})
