"""A shard on its machine, without pytest: what is checked before it begins, and what its receipt vouches for at each moment."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.records import Result, encode_record
from harness.fleet import lease
from harness.fleet.contract import Shard, utc
from harness.fleet.receipt import Receipt, digest_of_line, file_name, read_receipt
from harness.fleet.shard_run import ShardRun
from harness.results.store import NAME
from tests.support import builders
from tests.support.fleets import MEASURED, VERSIONS, contract, machine_class, measured

NOW = datetime.now(timezone.utc)
OTHER = builders.case("fp32", model="stranger")


@pytest.fixture(autouse=True)
def _own_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.LEASE, str(tmp_path / "lease"))


@pytest.fixture
def shard() -> Shard:
    return contract()[1][0]


def receipt_of(folder: Path, shard: Shard) -> Receipt:
    return read_receipt(folder / file_name(shard.name))


def write(folder: Path, *results: Result) -> None:
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_bytes(b"".join(encode_record(one) + b"\n" for one in results))


def test_what_lay_there_is_vouched_for_from_the_beginning_and_nothing_else_of_the_file(shard: Shard, tmp_path: Path) -> None:
    """As after --resume on a machine that dies again at once: of its own cases what is not older than the contract."""
    kept, old = measured(shard.cases[0]), measured(shard.cases[1], at="2026-11-01T00:00:00Z")
    write(tmp_path / "sent", kept, old, measured(OTHER))
    run, vouched = ShardRun(shard, tmp_path / "sent"), {shard.key(shard.cases[0]): digest_of_line(encode_record(kept))}
    with run.begun(builders.machine(), VERSIONS, shard.cases):
        assert receipt_of(tmp_path / "sent", shard).results == vouched
        run.add(measured(OTHER))
        assert receipt_of(tmp_path / "sent", shard).results == vouched
        new = measured(shard.cases[1], at=MEASURED)
        run.add(new)
        both = vouched | {shard.key(shard.cases[1]): digest_of_line(encode_record(new))}
        assert receipt_of(tmp_path / "sent", shard).results == both
        assert receipt_of(tmp_path / "sent", shard).ended_at is None
    write(tmp_path / "sent", kept, old, new, measured(OTHER))
    run.end(0, None)
    ended = receipt_of(tmp_path / "sent", shard)
    assert (ended.results, ended.exit_status, ended.problem) == (both, 0, "")
    assert ended.ended_at is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine_class": machine_class(ram_bytes=64 << 30)}, "this machine has 16.0 GiB of RAM, and class small 64.0 GiB"),
        ({"versions": {"torch": "1.0"}}, "torch is 2.13.0, and the contract says 1.0; install that version, or plan"),
        ({"made_at": utc(NOW + timedelta(hours=2))}, r"the clock here says \S+, before its contract of \S+; set it"),
        ({"cases": (OTHER,)}, r"stranger/fp32/cpu is no case here \(1 are not\); plan the fleet anew"),
    ],
)
def test_a_machine_that_is_not_as_agreed_says_so_in_its_receipt_and_gives_itself_back(
    changes: dict[str, object], said: str, shard: Shard, tmp_path: Path
) -> None:
    other, folder = replace(shard, **changes), tmp_path / "sent"
    folder.mkdir()
    run = ShardRun(other, folder)
    with pytest.raises(UsageError, match=f"--shard small-1: .*{said}"), run.begun(builders.machine(), VERSIONS, shard.cases):
        pass
    problem = receipt_of(folder, other).problem
    assert problem.startswith("--shard small-1: ")
    run.end(4, None)
    assert (receipt_of(folder, other).problem, receipt_of(folder, other).exit_status) == (problem, 4)
    assert lease.is_free()


def test_a_contract_made_a_little_later_than_the_clock_here_is_run(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    soon = replace(shard, made_at=utc(NOW + timedelta(minutes=4)))
    with ShardRun(soon, tmp_path / "sent").begun(builders.machine(), VERSIONS, shard.cases):
        assert receipt_of(tmp_path / "sent", soon).problem == ""


def test_a_disk_that_filled_is_the_problem_that_the_last_receipt_tells(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    run = ShardRun(shard, tmp_path / "sent")
    with run.begun(builders.machine(), VERSIONS, shard.cases):
        pass
    run.end(1, "the disk is full")
    assert receipt_of(tmp_path / "sent", shard).problem == "the disk is full"
