"""`fitmatrix fleet run`: a cluster of Ray on this machine with scripted workers, and what is refused before there is one."""

from __future__ import annotations

import importlib.util
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.errors import UsageError
from harness.fleet.contract import read_contract
from harness.fleet.ray_engine import cluster, driver
from harness.fleet.receipt import read_receipt, read_results
from tests.support import ray_runs

HAS_RAY = importlib.util.find_spec("ray") is not None
over_ray = pytest.mark.skipif(not HAS_RAY, reason="needs ray, the extra fleet")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path, below which sockets have room for theirs."""
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        yield Path(folder)


@pytest.mark.skipif(HAS_RAY, reason="ray is here")
def test_without_ray_it_says_what_to_install(place: Path) -> None:
    path = ray_runs.folder(place / "f", ["a"], ["one"])
    ray_runs.plan(path, ["a"], ["bf16"])
    status, said = ray_runs.finish(ray_runs.start(path, "run", "fleet"))
    assert (status, said) == (2, 'fitmatrix: fleet run measures over Ray, which is not installed: pip install "ray>=2.50"\n')


@over_ray
def test_shards_are_measured_and_every_case_is_counted_once(place: Path) -> None:
    """In an environment that Ray has not touched, and nothing is left behind."""
    path = ray_runs.folder(place / "f", ["a", "b"], ["one", "two"])
    ray_runs.plan(path, ["a", "b"], ["bf16", "int8"])
    status, said = ray_runs.finish(ray_runs.start(path, "run", "fleet", "--to", "all"))
    assert status == 0, said
    contract = read_contract(path / "fleet")
    assert {one.result.case for one in read_results(path / "all/results.jsonl")} == {one.case for one in contract.terms.cases}
    for issued in contract.issued:
        receipt = read_receipt(path / f"fleet/results/{issued.shard}/receipt-{issued.shard}.json")
        assert (receipt.threads, receipt.exit_status, receipt.problem) == ("", 0, "")
        assert receipt.machine
    assert not [one for one in (path / "tmp").iterdir() if one.name.startswith("fitmatrix-")]
    status, said = ray_runs.finish(ray_runs.start(path, "run", "fleet"))
    assert status == 0
    assert "here-1" not in said.replace("here-1:", "")  # nothing was measured again


@over_ray
def test_ctrl_c_keeps_what_came_and_the_same_command_goes_on(place: Path) -> None:
    path = ray_runs.folder(place / "f", ["a"], ["one"], bf16="brisk", int8="brisk", fp32="brisk", fp16="brisk")
    ray_runs.plan(path, ["a"], ["fp32", "bf16", "fp16", "int8"])
    process = ray_runs.start(path, "run", "fleet")
    results = path / "fleet/results/here-1/results.jsonl"
    receipt = results.with_name("receipt-here-1.json")
    deadline = time.monotonic() + 120
    while not (receipt.exists() and read_receipt(receipt).results) and time.monotonic() < deadline:  # it vouches for one
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, said = ray_runs.finish(process)
    assert status == 130, said
    assert "stopped; what came is kept" in said
    before = results.read_bytes()
    status, said = ray_runs.finish(ray_runs.start(path, "run", "fleet", "--to", "all"))
    assert status == 0, said
    assert results.read_bytes() == before
    assert re.search(r"here +4 +4 +0", said)
    assert before.splitlines()[0] in (path / "all/results.jsonl").read_bytes().splitlines()


@over_ray
@pytest.mark.parametrize(
    ("table", "why"),
    [
        ('ram = "9TiB"', "has .* of RAM, and class here 9.00 TiB"),
        ('ram = "9TiB"\nlabels = {"ray.io/accelerator-type" = "A100"}', "its label ray.io/accelerator-type is missing"),
        ('ram = "9TiB"\nlabels = {"ray.io/node-id" = "other"}', "its label ray.io/node-id is '[0-9a-f]+', and class here asks"),
    ],
)
def test_a_machine_of_no_class_gets_nothing_and_is_named(table: str, why: str, place: Path) -> None:
    path = ray_runs.folder(place / "f", ["a"], ["one"])
    (path / "fleet.toml").write_text(f"[class.here]\n{table}\n", encoding="utf-8")
    ray_runs.plan(path, ["a"], ["bf16"])
    status, said = ray_runs.finish(ray_runs.start(path, "run", "fleet"))
    assert status == 1
    assert re.search(f"can serve no class: {why}", said)
    assert not list((path / "fleet/results").glob("here*"))


@over_ray
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_is_asked_itself_whether_it_wants_a_token(mode: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own environment says nothing of it: here it is always that of who has a token."""
    with ray_runs.cluster(place, mode) as address:
        for name, value in ray_runs.token("token").items():
            monkeypatch.setenv(name, value)
        if mode == "token":
            assert cluster._wants_token(address)
            return
        with (
            pytest.raises(UsageError, match=r"this cluster lets in who has no token, .* or say --without-token"),
            cluster.cluster_at(address, without_token=False),
        ):
            pass


@over_ray
def test_an_address_where_nobody_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 20)
    with (
        pytest.raises(UsageError, match=r"--ray 127\.0\.0\.1:1: no cluster"),
        cluster.cluster_at("127.0.0.1:1", without_token=False),
    ):
        pass


def test_a_shard_file_that_was_changed_is_not_run(place: Path) -> None:
    path = ray_runs.folder(place / "f", ["a"], ["one"])
    ray_runs.plan(path, ["a"], ["bf16"])
    file = path / "fleet/shards/here-1.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"repeats": "2"', '"repeats": "9"'), encoding="utf-8")
    changed = driver.Driver(path / "fleet", path / "sent", lambda *_: None)
    with pytest.raises(UsageError, match="its file is not the shard that was handed out"):
        changed.run({})
