"""`fleet run` as a command, over a cluster that is scripted: its options, what it prints and how it ends. It needs no Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cli.entry import main
from harness.fleet import shards
from harness.fleet.contract import CONTRACT, utc
from harness.fleet.ray_engine import cluster, driver
from tests.support.fleets import contract, machine_class
from tests.support.scripted_cluster import ScriptedCluster


class Fleet:
    """A contract of two shards of two cases each, in a folder of its own, and what the command asked of the cluster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked, self.monkeypatch = folder, list[Any](), monkeypatch
        made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b"), made_at=utc())
        shards.write_issued(folder / "fleet" / CONTRACT, made, cut)
        (folder / "cases").mkdir()
        (folder / "cases/test_load.py").touch()
        self.script()

        @contextlib.contextmanager
        def cluster_at(address: str | None, *, without_token: bool) -> Iterator[None]:
            self.asked.append((address, without_token))
            yield

        monkeypatch.setattr(cluster, "cluster_at", cluster_at)
        monkeypatch.chdir(folder)

    def script(self, *how: str) -> None:
        """Let the one machine of the cluster do so with the shards that it gets; one without a word is measured whole."""
        self.monkeypatch.setattr(driver, "cluster", ScriptedCluster(self.folder, {"x": list(how)}))


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, monkeypatch)


@pytest.mark.parametrize("named", ["fleet", f"fleet/{CONTRACT}"])
def test_results_lie_beside_the_contract_and_the_machine_is_told_once_for_each_shard(
    named: str, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fleet", "run", named, "--to", "all"]) == 0
    assert fleet.asked == [(None, False)]
    assert sorted(path.name for path in (fleet.folder / "fleet/results").iterdir() if path.is_dir()) == ["small-1", "small-2"]
    assert len((fleet.folder / "all/results.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("node x: ")]
    assert told[1:] == ["node x: small-1", "node x: free", "node x: small-2", "node x: free"]


def test_options_reach_the_cluster_and_the_folder(fleet: Fleet) -> None:
    assert main(["fleet", "run", "fleet", "--ray", "lab:6379", "--without-token", "--results", "sent"]) == 0
    assert fleet.asked == [("lab:6379", True)]
    assert (fleet.folder / "sent/small-1/results.jsonl").is_file()
    assert not (fleet.folder / "fleet/results").exists()
    assert not (fleet.folder / "results.jsonl").exists()


def test_what_is_missing_and_why_is_said_and_makes_the_status_1(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.script("full")
    assert main(["fleet", "run", "fleet"]) == 1
    assert "node x: small-1: the disk is full" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_keeps_what_came_and_the_same_command_goes_on(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = driver.Driver.run

    def stopped(self: driver.Driver, files: dict[str, str]) -> Any:
        fleet.script("whole", "full")
        whole(self, files)
        raise KeyboardInterrupt

    monkeypatch.setattr(driver.Driver, "run", stopped)
    assert main(["fleet", "run", "fleet"]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped; what came is kept, and the same command goes on with the rest" in said
    kept = (fleet.folder / "fleet/results/small-1/results.jsonl").read_bytes()
    monkeypatch.setattr(driver.Driver, "run", whole)
    fleet.script()
    assert main(["fleet", "run", "fleet", "--to", "all"]) == 0
    assert (fleet.folder / "fleet/results/small-1/results.jsonl").read_bytes() == kept
    assert len((fleet.folder / "all/results.jsonl").read_text(encoding="utf-8").splitlines()) == 4
