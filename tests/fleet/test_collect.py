"""Receipts held against the contract: every case is counted once or named as missing, and whatever is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.placements import PLACEMENTS
from harness.core.records import Case, Outcome, Result, encode_record
from harness.core.units import GIB
from harness.fleet import conformity, shards
from harness.fleet.collect import Amiss, Collected, collect, write_counted
from harness.fleet.contract import Contract, Shard
from harness.fleet.receipt import find_receipts
from harness.results import store
from harness.results.store import NAME
from tests.support import builders
from tests.support.fleets import NOW, contract, deliver, machine_class, measured

BF16, INT8 = "small:tiny/bf16/cpu", "small:tiny/int8/cpu"


def kinds(found: Collected) -> dict[str, Amiss]:
    return {one.of: one.kind for one in found.findings}


def held(agreed: Contract, *paths: Path) -> Collected:
    """Collect, and see that every case is counted once or missing."""
    found = collect(agreed, paths, NOW)
    assert sorted([*found.counted, *found.missing]) == sorted(one.key for one in agreed.terms.cases)
    return found


@pytest.fixture
def agreed() -> tuple[Contract, Shard]:
    """A contract with one shard of two cases."""
    made, (shard,) = contract()
    return made, shard


def test_what_was_asked_for_and_came_is_counted_and_nothing_is_amiss(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    found = held(agreed[0], deliver(tmp_path, agreed[1]))
    assert list(found.counted) == [BF16, INT8]
    assert not found.findings


def test_what_did_not_come_is_missing_and_says_of_which_shard(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    assert "never heard of; 2 attempts left" in held(agreed[0]).findings[0].why
    one = [measured(agreed[1].cases[0])]
    assert "ended without it" in held(agreed[0], deliver(tmp_path / "a", agreed[1], one)).findings[0].why
    died = deliver(tmp_path / "b", agreed[1], one, ended_at=None)
    assert "last heard of at 2026-11-24T09:00:00Z" in held(agreed[0], died).findings[0].why


def test_a_worker_cannot_authorize_itself(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    """Neither by a shard that it wrote, nor by one of another contract, nor by results that its shard does not ask for."""
    made, shard = agreed
    own = deliver(tmp_path / "own", replace(shard, attempt=2))
    other = deliver(tmp_path / "other", shard, contract="f" * 64)
    more = measured(builders.case("int4"))
    extra = deliver(tmp_path / "extra", shard, [more])
    found = held(made, own, other, extra)
    assert not found.counted
    assert {of: kind for of, kind in kinds(found).items() if kind is not Amiss.MISSING} == {
        str(own): Amiss.UNEXPECTED,
        str(other): Amiss.UNEXPECTED,
        "small:tiny/int4/cpu": Amiss.UNEXPECTED,
    }
    why = {one.of: one.why for one in found.findings}
    assert why[str(own)] == "is a receipt for a shard 'small-1' that this contract did not hand out"
    assert why[str(other)] == f"is a receipt for contract ffffffffffff, and this is {made.digest[:12]}"


def test_a_changed_line_is_altered_and_does_not_count(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    made, shard = agreed
    path = deliver(tmp_path, shard)
    changed = measured(shard.cases[0], metrics={"decode_tok_s": 1e6})
    (tmp_path / NAME).write_bytes(encode_record(changed) + b"\n" + encode_record(measured(shard.cases[1])) + b"\n")
    found = held(made, path)
    assert list(found.counted) == [INT8]
    assert Amiss.ALTERED in {one.kind for one in found.findings if one.of == BF16}


def test_results_that_are_gone_or_no_file_are_named_and_the_others_count(tmp_path: Path) -> None:
    made, (one, other) = contract(machine_class("a"), machine_class("b"))
    gone = deliver(tmp_path / "a", one)
    (tmp_path / "a" / NAME).unlink()
    nothing = tmp_path / "receipt-x.json"
    nothing.write_text("{", encoding="utf-8")
    found = held(made, gone, deliver(tmp_path / "b", other), nothing)
    assert list(found.counted) == ["b:tiny/bf16/cpu", "b:tiny/int8/cpu"]
    assert {kinds(found)["a-1"], kinds(found)[str(nothing)]} == {Amiss.UNREADABLE}


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"machine": builders.machine(ram_bytes=8 * GIB)}, Amiss.WRONG_MACHINE, "has 8.00 GiB of RAM"),
        ({"machine": builders.machine(builders.gpu())}, Amiss.WRONG_MACHINE, "has 1 GPU, and class small none"),
        ({"environment": {"torch": "2.12.0"}}, Amiss.OTHER_VERSION, "torch is 2.12.0, and the contract says 2.13.0"),
        ({"environment": {}}, Amiss.OTHER_VERSION, "torch is absent"),
        ({"at": "2019-01-01T00:00:00Z"}, Amiss.WRONG_TIME, "before the contract"),
        ({"at": "2036-01-01T00:00:00Z"}, Amiss.WRONG_TIME, "in the future"),
        ({"case": builders.case("bf16", batch=4)}, Amiss.UNEXPECTED, "another workload"),
    ],
)
def test_a_result_that_is_not_as_agreed_is_named_and_the_others_count(
    wrong: dict[str, object], kind: Amiss, said: str, agreed: tuple[Contract, Shard], tmp_path: Path
) -> None:
    made, shard = agreed
    found = held(made, deliver(tmp_path, shard, [measured(shard.cases[0], **wrong), measured(shard.cases[1])]))
    assert list(found.counted) == [INT8]
    (why,) = [one.why for one in found.findings if one.kind is kind]
    assert said in why
    assert "shard small-1" in why or kind is Amiss.UNEXPECTED


def test_a_machine_says_why_it_stopped_and_what_it_measured_counts(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    made, shard = agreed
    full = "results.jsonl: cannot append the result: the disk is full"
    found = held(made, deliver(tmp_path, shard, [measured(shard.cases[0])], problem=full))
    assert list(found.counted) == [BF16]
    assert ("small-1", full) in {(one.of, one.why) for one in found.findings if one.kind is Amiss.ENDED}


def test_two_machines_of_one_name_are_named(tmp_path: Path) -> None:
    made, cut = contract(machine_class(machines=("lab-1", "lab-2")), models=("tiny", "other"))
    paths = [
        deliver(tmp_path / str(number), shard, machine="lab-1", identity=f"machine-{number}") for number, shard in enumerate(cut)
    ]
    found = held(made, *paths)
    assert len(found.counted) == 4
    assert kinds(found) == {"lab-1": Amiss.ONE_NAME}


def with_threads(case: Case, threads: int | None) -> Result:
    return measured(case, loaded=replace(builders.loaded(), threads=threads))


def test_a_result_with_other_threads_than_its_class_does_not_count(tmp_path: Path) -> None:
    """As one that a worker of Ray measured in the environment that Ray gives it, with one OpenMP thread."""
    made, (shard,) = contract(machine_class(threads=8))
    found = held(made, deliver(tmp_path, shard, [with_threads(shard.cases[0], 1), with_threads(shard.cases[1], 8)]))
    assert list(found.counted) == [INT8]
    (why,) = [one.why for one in found.findings if one.kind is Amiss.OTHER_THREADS]
    assert why == "measured with 1 thread, and class small has 8: OMP_NUM_THREADS decides (shard small-1)"


def test_a_result_with_other_threads_than_most_of_its_class_is_named_and_counts(tmp_path: Path) -> None:
    made, (shard,) = contract(precisions=("fp32", "bf16", "int8", "int4"))
    told = [with_threads(case, threads) for case, threads in zip(shard.cases, (8, 1, 8, None), strict=True)]
    found = held(made, deliver(tmp_path, shard, told))
    assert len(found.counted) == 4
    assert {one.of: one.why for one in found.findings} == {BF16: "measured with 1 thread, and most results of class small with 8"}


def test_processes_that_share_a_model_share_its_threads() -> None:
    made, (shard,) = contract(machine_class(threads=8))
    parallel = next(name for name, row in PLACEMENTS.items() if row.parallel)
    of = replace(shard.cases[0], placement=parallel)
    assert conformity.other_threads(made.terms.classes[0], with_threads(of, 1)) is None


def test_a_class_that_the_fleet_file_has_wrong_is_named_again() -> None:
    made, _ = contract(faults={"bad": "no card is called 'RTX 9999'"})
    assert kinds(held(made))["bad"] is Amiss.FLEET_FILE


def test_of_two_results_one_counts_the_earlier_attempt_unless_it_crashed(tmp_path: Path) -> None:
    made, (first,) = contract(precisions=("bf16",))
    made, (second,) = shards.issue(made, [BF16])
    assert (second.name, second.attempt) == ("small-1-try2", 2)
    crash = measured(first.cases[0], outcome=Outcome.CRASH)
    for results, counted in (([measured(first.cases[0])], 1), ([crash], 2)):
        paths = [deliver(tmp_path / f"{counted}-1", first, results), deliver(tmp_path / f"{counted}-2", second)]
        for order in (paths, paths[::-1]):
            found = held(made, *order)
            assert found.counted[BF16].attempt == counted
            assert [one.kind for one in found.findings] == [Amiss.TWICE]


def test_a_delivery_that_was_copied_counts_once(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    made, shard = agreed
    found = held(made, deliver(tmp_path / "a", shard), deliver(tmp_path / "b", shard))
    assert len(found.counted) == 2
    assert {one.why.partition(" came")[0] for one in found.findings} == {"the same result"}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["whole", "part", "altered", "stranger", "crash"])), max_size=6))
@settings(max_examples=25)
def test_whatever_comes_every_case_is_counted_once_or_missing(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[int, str]]
) -> None:
    made, cut = contract(machine_class(machines=("1", "2", "3")), models=("a", "b", "c"))
    folder, paths = tmp_path_factory.mktemp("sent"), []
    for number, (index, how) in enumerate(sent):
        shard, place = cut[index], folder / str(number)
        results = [measured(case, outcome=Outcome.CRASH if how == "crash" else Outcome.OK) for case in shard.cases]
        paths.append(
            deliver(place, replace(shard, attempt=9) if how == "stranger" else shard, results[: 1 if how == "part" else 2])
        )
        if how == "altered":
            (place / NAME).write_bytes((place / NAME).read_bytes().replace(b'"outcome":"ok"', b'"outcome":"oom"'))
    found = held(made, *paths)
    came = {shard for shard, how in sent if how in ("whole", "crash")}
    assert all(shard.key(case) in found.counted for index in came for shard in [cut[index]] for case in shard.cases)
    assert not [one for one in found.counted.values() if one.outcome is Outcome.OOM]


def test_the_results_that_count_are_written_as_they_came(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    made, shard = agreed
    found = held(made, deliver(tmp_path / "sent", shard))
    place = write_counted(found, tmp_path / "all")
    assert place.read_bytes() == (tmp_path / "sent" / NAME).read_bytes()
    assert [one.case for one in store.read(place)[0]] == list(shard.cases)
    report = json.loads((tmp_path / "all" / "collected.json").read_text(encoding="utf-8"))
    assert list(report["counted"]) == [BF16, INT8]
    assert write_counted(found, tmp_path / "all") == place  # again, over its own
    with pytest.raises(Exception, match="has results that were not collected"):
        write_counted(found, tmp_path / "sent")


def test_receipts_are_found_below_directories_and_once(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    path = deliver(tmp_path / "deep" / "er", agreed[1])
    assert find_receipts([tmp_path, path]) == [path.resolve()]


def missing(found: Collected) -> dict[str, str]:
    return {one.of: one.why for one in found.findings if one.kind is Amiss.MISSING}


def test_machines_without_a_name_are_not_of_one_name(tmp_path: Path) -> None:
    made, cut = contract(machine_class(machines=("1", "2")), models=("tiny", "other"))
    paths = [deliver(tmp_path / str(number), shard, identity=f"machine-{number}") for number, shard in enumerate(cut)]
    assert not held(made, *paths).findings


def test_what_is_missing_is_told_by_the_shard_that_was_handed_out_last(tmp_path: Path) -> None:
    made, (first,) = contract(precisions=("bf16",), attempts=2)
    made, (second,) = shards.issue(made, [BF16])
    assert missing(held(made)) == {BF16: "shard small-1-try2 was never heard of; given up after 2 attempts"}
    ended = deliver(tmp_path / "ended", second, [])
    runs = deliver(tmp_path / "runs", second, [], ended_at=None)
    came = deliver(tmp_path / "came", second, [measured(first.cases[0], environment={})])
    assert "try2 was last heard of at 2026-11-24T09:00:00Z: it runs, or its machine died;" in missing(held(made, runs))[BF16]
    assert "try2 ended without it;" in missing(held(made, runs, ended))[BF16]
    assert "what shard small-1-try2 brought does not count;" in missing(held(made, ended, came))[BF16]


def test_a_case_that_no_shard_had_says_so() -> None:
    made, _ = contract(precisions=("bf16",))
    assert missing(held(replace(made, issued=()))) == {BF16: "no shard with it was handed out"}


def test_results_that_cannot_be_read_are_named_once(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    path = deliver(tmp_path, agreed[1])
    (tmp_path / NAME).unlink()
    assert [one.kind for one in held(agreed[0], path).findings] == [Amiss.UNREADABLE, Amiss.MISSING, Amiss.MISSING]


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"schema": 1}', b'{"schema": 9}', "a folder", "a receipt of another file"])
def test_a_receipt_that_cannot_be_read_is_named_once(text: bytes | str, agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    path = tmp_path / "receipt-x.json"
    if text == "a folder":
        path.mkdir()
    elif isinstance(text, bytes):
        path.write_bytes(text)
    else:
        deliver(tmp_path, agreed[1], file="../x").rename(path)
    (wrong,) = [one for one in held(agreed[0], path).findings if one.kind is Amiss.UNREADABLE]
    assert wrong.of == str(path)
    assert wrong.why
    assert str(path) not in wrong.why


def test_lines_stay_apart_though_a_file_does_not_end_its_last(tmp_path: Path) -> None:
    made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b"))
    paths = [deliver(tmp_path / shard.name, shard) for shard in cut]
    for path in paths:
        path.with_name(NAME).write_bytes(path.with_name(NAME).read_bytes().strip())
    lines = write_counted(held(made, *paths), tmp_path / "all").read_bytes().splitlines(keepends=True)
    assert [(line[:1], line[-2:]) for line in lines] == [(b"{", b"}\n")] * 4


def test_what_cannot_be_written_leaves_nothing_behind(agreed: tuple[Contract, Shard], tmp_path: Path) -> None:
    path = deliver(tmp_path / "sent", agreed[1])
    found = held(agreed[0], path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--to .*/file is a file; name a directory"):
        write_counted(found, tmp_path / "file")
    path.with_name(NAME).unlink()
    with pytest.raises(FileNotFoundError):
        write_counted(found, tmp_path / "all")
    assert not [*(tmp_path / "all").iterdir()]
