"""Receipts and the files beside them: lines with their places and digests, receipts wherever they are named, and what is none."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.errors import StoreError, UsageError
from harness.core.records import encode_record
from harness.fleet import contract as contracts
from harness.fleet import shards
from harness.fleet.collect import collect, write_counted
from harness.fleet.contract import CONTRACT, read_contract, write_record
from harness.fleet.receipt import digest_of_line, find_receipts, read_receipt, read_results
from harness.results import store
from harness.results.store import NAME
from tests.support import builders
from tests.support.fleets import NOW, contract, deliver, measured

CASES = [builders.case(precision) for precision in ("fp32", "bf16", "int8", "int4")]


def test_each_line_is_where_it_says_and_what_is_no_result_is_passed_over(tmp_path: Path) -> None:
    """Between whole lines: an empty one, one that was cut short, two results on one line, one from Windows."""
    lines = [encode_record(measured(case)) for case in CASES]
    text = lines[0] + b"\n\n" + lines[1][:40] + b"\n" + lines[0] + lines[1] + b"\n" + lines[2] + b"\r\n" + lines[3] + b"\n"
    (tmp_path / NAME).write_bytes(text)
    found = [*read_results(tmp_path / NAME)]
    assert [one.result.case for one in found] == [CASES[0], CASES[2], CASES[3]]
    assert [text[one.offset : one.offset + one.length].strip() for one in found] == [lines[0], lines[2], lines[3]]
    assert [one.digest for one in found] == [digest_of_line(lines[0]), digest_of_line(lines[2]), digest_of_line(lines[3])]


def test_a_line_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = encode_record(measured(CASES[0]))
    monkeypatch.setattr(store, "LONGEST_BYTES", len(line) + 10)
    (tmp_path / NAME).write_bytes(line + b"\n" + line + b" " * 100 + b"\n")
    assert len([*read_results(tmp_path / NAME)]) == 2  # the blanks behind it are another line
    (tmp_path / NAME).write_bytes(b" " * 100 + line + b"\n")
    assert not [*read_results(tmp_path / NAME)]


def test_results_that_cannot_be_read_are_an_error_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read: No such file or directory"):
        next(read_results(tmp_path / NAME))


def test_a_receipt_that_is_named_in_several_ways_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (shard,) = contract()
    path = deliver(tmp_path / "sent" / "deep", shard)
    (tmp_path / "link").symlink_to("sent")
    monkeypatch.chdir(tmp_path)
    assert find_receipts([Path("sent"), tmp_path / "link/deep", Path("sent/deep") / path.name]) == [path.resolve()]


def test_a_place_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: there is no such file or directory; name receipts, or directories"):
        find_receipts([tmp_path / "none"])


def test_a_receipt_names_no_file_elsewhere(tmp_path: Path) -> None:
    _, (shard,) = contract()
    path = deliver(tmp_path, shard)
    assert read_receipt(path).file == NAME
    for elsewhere in ("../results.jsonl", "/etc/passwd", "a/b"):
        path.write_bytes(encode_record(replace(read_receipt(deliver(tmp_path, shard)), file=elsewhere)))
        with pytest.raises(UsageError, match="names results elsewhere"):
            read_receipt(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"schema": 99}', "has format 99, and this version reads 1; is it a contract"),
        (b"{}", "has format null, and this version reads 1"),
        (b'{"schema": "\xff"}', "is no contract"),
        (b'{"schema": ' + b"[" * 200_000, "is no contract"),
        (b"\xff\xfe", "is no contract"),
        (None, "there is no contract here; fitmatrix fleet plan writes them"),
    ],
)
def test_what_is_no_contract_says_what_it_is(text: bytes | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / CONTRACT).write_bytes(text)
    with pytest.raises(UsageError) as wrong:
        read_contract(tmp_path / CONTRACT)
    assert said in str(wrong.value)
    assert len(str(wrong.value)) < 600


def test_what_an_editor_of_windows_saved_is_read_as_it_was(tmp_path: Path) -> None:
    """Contract, receipt and results, each with a byte order mark before it: the mark is no part of what was vouched for."""
    made, (shard,) = contract()
    path = deliver(tmp_path / "sent", shard)
    write_record(tmp_path / CONTRACT, made)
    before = read_receipt(path), read_contract(tmp_path), write_counted(collect(made, [path], NOW), tmp_path / "1").read_bytes()
    for file in (path, path.with_name(NAME), tmp_path / CONTRACT):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    found = collect(made, [path], NOW)
    assert not found.findings
    assert (read_receipt(path), read_contract(tmp_path), write_counted(found, tmp_path / "2").read_bytes()) == before


def test_a_contract_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "_MOST_BYTES", 100)
    (tmp_path / CONTRACT).write_bytes(b'{"schema": 1, "x": "' + b"x" * 200 + b'"}')
    with pytest.raises(OSError, match="it holds more than 100 bytes"):
        read_contract(tmp_path)


def test_results_count_from_a_little_before_the_contract_on() -> None:
    """A machine whose clock is behind that of the driver, by no more than clocks may be."""
    made, (shard,) = contract(made_at="2026-11-24T08:00:00Z")
    assert shard.since == "2026-11-24T07:55:00Z"
    assert made.terms.made_at == shard.made_at


def test_the_shards_of_a_case_are_told_oldest_first() -> None:
    made, _ = contract(precisions=("bf16",))
    for _ in range(2):
        made, _ = shards.issue(made, [one.key for one in made.terms.cases])
    assert [[one.attempt for one in issued] for issued in made.by_key().values()] == [[1, 2, 3]]


def test_a_directory_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as wrong:
        shards.read_shard(tmp_path)
    assert (wrong.value.filename, wrong.value.strerror) == (str(tmp_path), "Is a directory")
