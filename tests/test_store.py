"""Results on disk: appended whole and at once, never lost, never rewritten, and read whatever the file holds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness import store as store_module
from harness.case import SCHEMA, Result, encode
from harness.errors import StoreError
from harness.store import NAME, Store, decode, read
from tests.builders import GOLDEN, result

ROOT = Path(__file__).parent.parent
APPENDER = """
import os, sys, time
from pathlib import Path
from harness.store import Store
from tests.builders import case, result

seek = os.lseek

def slow(*arguments):  # the other process has time to come between finding the end and writing there
    end = seek(*arguments)
    time.sleep(0.001)
    return end

os.lseek = slow
print("ready", flush=True)
input()
for number in range(50):
    Store(Path(sys.argv[1])).append(result(case(model=f"{sys.argv[2]}-{number}"), log_tail="x" * 2000))
"""
# What was written before is already there; the limit is hit in the middle of a line, as a full disk is.
ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from harness.errors import StoreError
from harness.store import Store
from tests.builders import result
store = Store(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 100, resource.RLIM_INFINITY))
try:
    store.append(result(log_tail="x" * 2000))
except StoreError as error:
    print(error)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def plain(**changes: Any) -> bytes:
    """A line with other fields than a result's."""
    return msgspec.json.encode({**msgspec.to_builtins(result()), **changes})


# Appending


def test_what_is_appended_is_read_back_in_order(store: Store) -> None:
    results = [result(run=f"run {number}") for number in range(3)]
    for each in results:
        store.append(each)
    assert store.read() == (results, [])


def test_a_result_is_one_whole_line(store: Store) -> None:
    store.append(result(why="two\nlines"))
    store.append(result())
    data = store.path.read_bytes()
    assert data.count(b"\n") == 2
    assert data.endswith(b"}\n")


def test_what_was_there_is_not_touched(store: Store) -> None:
    store.append(result())
    before, inode = store.path.read_bytes(), store.path.stat().st_ino
    store.append(result(run="later"))
    assert store.path.read_bytes().startswith(before)
    assert store.path.stat().st_ino == inode


def test_two_processes_at_once_lose_nothing(store: Store) -> None:
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(store.path.parent), name], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe
        )
        for name in ("one", "two")
    ]
    for run in runs:
        assert run.stdout
        assert run.stdout.readline() == b"ready\n"
    for run in runs:
        assert run.stdin
        run.stdin.write(b"go\n")
        run.stdin.flush()
    for run in runs:
        assert run.communicate() == (b"", b"")
    results, problems = store.read()
    assert problems == []
    models = [each.case.model for each in results]
    for name in ("one", "two"):
        assert [model for model in models if model.startswith(name)] == [f"{name}-{number}" for number in range(50)]
    assert len(models) == 100


def test_after_a_line_that_was_cut_short_the_next_begins_anew(store: Store) -> None:
    store.append(result(run="first"))
    with store.path.open("ab") as file:
        file.write(encode(result())[:200])
    store.append(result(run="third"))
    results, (problem,) = store.read()
    assert [each.run for each in results] == ["first", "third"]
    assert problem.line == 2


def test_a_whole_line_that_lacks_only_its_newline_counts(store: Store) -> None:
    store.path.write_bytes(encode(result(run="first")))
    store.append(result(run="second"))
    results, problems = store.read()
    assert ([each.run for each in results], problems) == (["first", "second"], [])


def test_a_full_disk_leaves_the_file_as_it_was(store: Store) -> None:
    store.append(result())
    before = store.path.read_bytes()
    done = subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, str(store.path.parent)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"{store.path}: cannot append the result of tiny/bf16/cpu: File too large\n"
    assert store.path.read_bytes() == before


def test_no_space_is_said_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the line goes through, the rest does not."""
    store.append(result())
    before, write, budget = store.path.read_bytes(), os.write, [100, 0]

    def no_space(descriptor: int, data: bytes) -> int:
        left = budget.pop(0)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:left])

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(StoreError, match="cannot append the result of tiny/bf16/cpu: the disk is full"):
        store.append(result())
    assert store.path.read_bytes() == before


def test_a_store_is_prepared_before_the_first_result(tmp_path: Path) -> None:
    store = Store(tmp_path / "not/made/yet")
    store.prepare()
    assert store.path == tmp_path / "not/made/yet" / NAME
    assert store.read() == ([], [])


def test_preparing_keeps_what_is_there(store: Store) -> None:
    store.append(result())
    store.prepare()
    assert len(store.read()[0]) == 1


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_a_place_that_cannot_be_written_to_is_said_beforehand(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(StoreError, match=r"cannot write results here \(.+\); choose another directory with --results"):
        Store(tmp_path / place).prepare()


def test_a_directory_in_place_of_the_file(store: Store) -> None:
    store.path.mkdir()
    with pytest.raises(StoreError, match="cannot write results here"):
        store.prepare()
    with pytest.raises(StoreError, match="cannot append"):
        store.append(result())
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        store.read()


# Reading


def test_no_results_yet_says_how_to_get_them(store: Store) -> None:
    with pytest.raises(StoreError, match=r"results.jsonl: no results here; run: pytest cases/ --results DIR"):
        store.read()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param(b"not json", "not a result, set aside: JSON is malformed", id="no JSON"),
        pytest.param(b"[1, 2]", "not a result, set aside: Expected `object`", id="no object"),
        pytest.param(b"{}", "not a result, set aside: it has no schema number", id="no schema"),
        pytest.param(plain(schema="1"), "it has no schema number", id="schema in words"),
        pytest.param(plain(schema=0), "it has no schema number", id="schema 0"),
        pytest.param(plain(schema=True), "not a result, set aside", id="schema true"),
        pytest.param(plain(colour="red"), "not a result, set aside: Object contains unknown field `colour`", id="unknown field"),
        pytest.param(plain(**{"\x1b[2J\n" + "x" * 9999: 1}), r"contains unknown field `\x1b[2J\nxxx", id="hostile field"),
        pytest.param(plain(outcome="melted"), "not a result, set aside: Invalid enum value 'melted'", id="unknown outcome"),
        pytest.param(b'{"schema": 1}', "not a result, set aside: Object missing required field `id`", id="missing fields"),
        pytest.param(plain(metrics={"load_s": None}), "not a result, set aside: Expected `float`, got `null`", id="no number"),
        pytest.param(plain(log_tail="@").replace(b"@", b"\xff"), "not a result, set aside: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"\xff\xfe{}", "not a result, set aside: JSON is malformed", id="UTF-16"),
        pytest.param(b"\0" * 512, "not a result, set aside", id="a hole that a crash left"),
        pytest.param(b'{"schema": 1, "id": ' + b"[" * 200_000, "not a result, set aside", id="nested without end"),
        pytest.param(encode(result())[:-9], "not a result, set aside: Input data was truncated", id="cut short"),
        pytest.param(
            plain(schema=SCHEMA + 1),
            f"has format {SCHEMA + 1}, and this version reads up to {SCHEMA}; update fitmatrix",
            id="newer",
        ),
        pytest.param(
            b'{"schema": 7, "all": "different"}',
            f"has format 7, and this version reads up to {SCHEMA}; update fitmatrix",
            id="much newer",
        ),
    ],
)
def test_a_line_that_is_no_result_is_named_and_the_others_survive(store: Store, line: bytes, said: str) -> None:
    store.path.write_bytes(b"\n".join([encode(result(run="a")), line, encode(result(run="b")), b""]))
    results, (problem,) = store.read()
    assert [each.run for each in results] == ["a", "b"]
    assert problem.line == 2
    assert str(problem).startswith(f"{store.path}:2: ")
    assert said in str(problem)
    assert str(problem).isprintable()
    assert len(str(problem)) < 600


def test_blank_lines_and_foreign_line_ends_are_no_problem(store: Store) -> None:
    store.path.write_bytes(b"\n" + encode(result(run="a")) + b"\r\n  \n\n" + encode(result(run="b")))
    results, problems = store.read()
    assert ([each.run for each in results], problems) == (["a", "b"], [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
@example(b'{"schema": 1e400}')
@example(b'{"schema": 99999999999999999999}')
@example(b'{"schema": 1, "id": "\\ud800"}')
def test_no_bytes_make_reading_fail(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / NAME
    path.write_bytes(encode(result(run="a")) + b"\n" + junk + b"\n" + encode(result(run="b")))
    results, problems = read(path)
    assert [each.run for each in results] == ["a", "b"]
    assert all(1 < (problem.line or 0) < path.read_bytes().count(b"\n") + 1 for problem in problems)


# Formats of the past


def test_every_result_of_the_golden_file_is_read() -> None:
    results, problems = read(GOLDEN)
    assert problems == []
    assert len(results) == len(GOLDEN.read_bytes().splitlines())
    assert {each.schema for each in results} <= set(range(1, SCHEMA + 1))


def test_the_golden_results_are_what_we_would_write() -> None:
    for each in read(GOLDEN)[0]:
        assert decode(encode(each)) == each


def test_a_way_leads_from_every_old_format_to_ours() -> None:
    assert set(store_module.UPGRADES) == set(range(1, SCHEMA))


def test_old_lines_are_upgraded_on_reading_and_stay_as_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two formats from now: a field is renamed, then one is dropped."""

    def renamed(line: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in line.items() if key != "reason"}, "why": line["reason"], "schema": 2}

    def dropped(line: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in line.items() if key != "mood"}, "schema": 3}

    monkeypatch.setattr(store_module, "SCHEMA", 3)
    monkeypatch.setattr(store_module, "UPGRADES", {1: renamed, 2: dropped})
    of_2 = {**msgspec.to_builtins(result(why="two")), "schema": 2, "mood": "fine"}
    of_1 = {**of_2, "schema": 1, "reason": "one"}
    del of_1["why"]
    old = b"\n".join([msgspec.json.encode(of_1), msgspec.json.encode(of_2), plain(schema=3, why="three")])
    store.path.write_bytes(old)
    results, problems = store.read()
    assert problems == []
    assert [(each.why, each.schema) for each in results] == [("one", 3), ("two", 3), ("three", 3)]
    assert store.path.read_bytes() == old


def test_decoding_one_line_says_what_is_wrong() -> None:
    assert isinstance(decode(encode(result())), Result)
    with pytest.raises(msgspec.ValidationError):
        decode(plain(case=None))
