"""`fitmatrix fleet collect`, `status` and `resume` on deliveries that machines have sent: what they say and how they end."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path

import pytest

from harness.fleet import shards
from harness.fleet.contract import CONTRACT, Contract, Shard, read_contract, utc
from harness.results import store
from tests.support.fleets import contract, deliver, machine_class, measured
from tests.support.spoken import Said, saying


@pytest.fixture
def fleet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return saying(capsys, "fleet")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Contract, list[Shard]]:
    """A contract made now over a class with two shards of two cases, in the directory fleet."""
    made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b"), made_at=utc(datetime.now(timezone.utc)), attempts=2)
    shards.write_issued(tmp_path / "fleet" / CONTRACT, made, cut)
    return made, cut


def send(shard: Shard, name: str, cases: int = 2, **changes: object) -> Path:
    """Write what a machine would send this moment: results of so many cases of a shard, and the receipt."""
    now = utc(datetime.now(timezone.utc))
    moments = {"started_at": now, "heard_at": now, "ended_at": now}
    return deliver(Path("sent") / name, shard, [measured(case, at=now) for case in shard.cases[:cases]], **{**moments, **changes})


def test_collect_counts_by_class_and_ends_with_1_as_long_as_a_case_is_missing(
    fleet: Said, made: tuple[Contract, list[Shard]]
) -> None:
    """What is said of several in the same words is said once; of different ones, each."""
    send(made[1][0], "one")
    (Path("sent") / "receipt-x.json").write_text("{", encoding="utf-8")
    status, out, _ = fleet("collect", "fleet", "sent", "--to", "all")
    assert status == 1
    assert "small      4        2        2" in out
    assert "missing     small:b/bf16/cpu and 1 other: shard small-2 was never heard of; 1 attempt left" in out
    assert "unreadable  " in out
    assert "2 results in all/results.jsonl" in out
    assert out.endswith("\n\nTo hand out what is missing:  fitmatrix fleet resume fleet sent\n")
    assert len(store.read(Path("all/results.jsonl"))[0]) == 2
    send(made[1][1], "two")
    (Path("sent") / "receipt-x.json").unlink()
    status, out, _ = fleet("collect", "fleet", "sent")
    assert (status, "missing " in out.splitlines()[-1]) == (0, False)
    assert "small      4        4        0" in out
    assert fleet("resume", "fleet", "sent") == (0, "nothing is missing: every case has a result that counts\n", "")


def test_status_says_why_a_shard_stopped_and_what_is_no_receipt_of_this_contract(
    fleet: Said, made: tuple[Contract, list[Shard]]
) -> None:
    send(made[1][0], "one", 1, problem="the disk is full", machine="lab-1")
    strange = send(made[1][1], "two", contract="f" * 64)
    status, out, _ = fleet("status", "fleet", "sent")
    assert status == 0
    assert "lab-1" in out
    assert re.search(r"^small-1 +stopped +lab-1 +1 of 2 +20\d\d-\d\d-\d\dT", out, re.MULTILINE)
    assert re.search(r"^small-2 +not heard of +0 of 2$", out, re.MULTILINE)
    assert "small-1: the disk is full" in out
    assert "two/receipt-small-2.json: is a receipt for contract ffffffffffff" in out
    status, out, _ = fleet("status", "fleet", "sent", "--json")
    assert status == 0
    told = json.loads(out)
    assert [(one["shard"], one["state"], one["done"], one["cases"]) for one in told["shards"]] == [
        ("small-1", "stopped", 1, 2), ("small-2", "not heard of", 0, 2),
    ]  # fmt: skip
    assert [one["of"] for one in told["strange"]] == [str(strange.resolve())]


def test_resume_tells_what_is_handed_out_what_runs_and_what_is_given_up(fleet: Said, made: tuple[Contract, list[Shard]]) -> None:
    send(made[1][0], "one", 1)
    send(made[1][1], "two", 1, ended_at=None)
    status, out, err = fleet("resume", "fleet", "sent")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "fleet/shards/small-1-try2.json: 1 case for small, attempt 2",
        "1 case handed out again, 1 still to come from shards that run",
        "",
        "On its machine:  pytest cases/ --shard fleet/shards/small-1-try2.json --results sent/small-1-try2",
    ]
    waited = "0 cases handed out again, 1 still to come from shards that run, 1 from shards that were not heard of yet\n"
    assert fleet("resume", "fleet", "sent", "--wait") == (0, waited, "")
    assert len(read_contract(Path("fleet")).issued) == 3
    status, out, err = fleet("resume", "fleet/contract.json", "sent")
    assert (status, err) == (1, "fitmatrix: small:a/int8/cpu: given up after 2 attempts\n")
    assert out == "0 cases handed out again, 1 still to come from shards that run\n"
    assert len(read_contract(Path("fleet")).issued) == 3
