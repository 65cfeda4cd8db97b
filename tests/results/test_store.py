"""Results on disk: appended whole and at once, never lost, never rewritten, and read whatever the file holds."""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.core.errors import StoreError
from harness.core.records import SCHEMA, Result, Timeline, encode_record, to_builtins
from harness.results import store as store_module
from harness.results.store import NAME, Store, decode, read
from tests.support import goldens
from tests.support.builders import GOLDEN, case, result

ROOT = Path(__file__).parents[2]
APPENDER = """
import os, sys, time
from pathlib import Path
from harness.results.store import Store
from tests.support.builders import case, result

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
from harness.core.errors import StoreError
from harness.results.store import Store
from tests.support.builders import result
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
        file.write(encode_record(result())[:200])
    store.append(result(run="third"))
    results, (problem,) = store.read()
    assert [each.run for each in results] == ["first", "third"]
    assert problem.line == 2


def test_a_whole_line_that_lacks_only_its_newline_counts(store: Store) -> None:
    store.path.write_bytes(encode_record(result(run="first")))
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


# A place that is not what it should be


def said_of(store: Store, to_come_bytes: int = 0) -> str:
    with pytest.raises(StoreError) as caught:
        store.prepare(to_come_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_lock_file_that_was_left_behind_locks_nobody_out(store: Store) -> None:
    store.path.with_name(f"{NAME}.lock").write_text("4711\nelsewhere\n")
    store.prepare()
    store.append(result())
    assert len(store.read()[0]) == 1


def test_a_lock_that_is_held_for_ever_is_told_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE_S", 0.2)
    holder = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder, f"{store.path}.lock"], stdin=-1, stdout=-1) as process:
        assert process.stdout
        process.stdout.readline()
        assert "another process has held results.jsonl.lock for 0 s; end that run, or choose another directory" in said_of(store)
        process.kill()
    store.prepare()


def test_a_lock_that_cannot_be_opened_is_told_beforehand(store: Store) -> None:
    store.path.with_name(f"{NAME}.lock").mkdir()
    assert said_of(store).startswith(f"{store.path}.lock: cannot be opened (Is a directory); remove it, or choose another")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.EOPNOTSUPP, "no"), NotImplementedError()]
)
def test_a_file_system_without_locks_is_refused_beforehand(store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    assert said_of(store).endswith(
        "the file system has no locks, and two runs could mix their lines; choose a local disk with --results"
    )


def test_a_directory_that_was_tidied_away_during_a_run_is_made_again(store: Store) -> None:
    store.prepare()
    shutil.rmtree(store.path.parent)
    store.append(result())
    assert len(store.read()[0]) == 1


IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
can_mount = subprocess.run([*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
PREPARE = """
import sys
from pathlib import Path
from harness.core.errors import StoreError
from harness.results.store import Store, most_bytes
from tests.support.builders import case, result
store = Store(Path(sys.argv[1]) / "results")
try:
    store.prepare(int(sys.argv[2]) * most_bytes(case()))
    store.append(result())
    print("appended")
except StoreError as error:
    print(error)
print(sorted(path.name for path in store.path.parent.glob("*")))
"""


def prepared_on(place: Path, mount: str, cases: int) -> list[str]:
    """Mount a file system of its own, and prepare a store for so many cases there."""
    command = f"{mount} && exec {sys.executable} -c '{PREPARE}' {place} {cases}"
    done = subprocess.run([*IN_A_NAMESPACE, "sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(not can_mount, reason="no file system can be mounted here")
def test_a_full_disk_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    said, left = prepared_on(tmp_path, f"mount -t tmpfs -o size=2m none {tmp_path}", 30)
    assert re.fullmatch(
        r".*/results: no room for the results of this run: up to 9.\d+ MiB needed, 2.00 MiB free; "
        r"free some, or choose another place with --results",
        said,
    )
    assert left == "['results.jsonl', 'results.jsonl.lock']"


@pytest.mark.skipif(not can_mount, reason="no file system can be mounted here")
def test_a_disk_that_has_room_is_used(tmp_path: Path) -> None:
    assert prepared_on(tmp_path, f"mount -t tmpfs -o size=2m none {tmp_path}", 3)[0] == "appended"


@pytest.mark.skipif(not can_mount, reason="no file system can be mounted here")
def test_a_disk_that_may_only_be_read_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    said, left = prepared_on(tmp_path, f"mount -t tmpfs -o ro none {tmp_path}", 1)
    assert said.endswith(
        "results.jsonl: cannot write results here (Read-only file system); choose another directory with --results"
    )
    assert left == "[]"


def test_a_limit_on_files_is_found_by_trying(store: Store) -> None:
    """As a quota is: the disk has room, and this process or user may not have it."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{PREPARE}"
    done = subprocess.run([sys.executable, "-c", code, str(store.path.parent), "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert "no room for the results of this run: up to 3" in done.stdout


def test_a_line_takes_no_more_than_was_asked_for() -> None:
    """The worst that is bounded: a log of control characters, a timeline of all its samples, every round and token."""
    of = case(repeats=50, new_tokens=512)
    columns = [123456789012] * 600
    timeline = Timeline(
        t_s=[1234.567] * 600, ram_bytes=columns, ram_anon_bytes=columns, vram_bytes={f"gpu:{index}": columns for index in range(4)}
    )
    samples = {"token_s": [0.123456789012345678] * 150 * 511, "round_s": [0.123456789012345678] * 150}
    device_map = {f"model.layers.{number}": "gpu:0" for number in range(200)}
    worst = result(of, log_tail="\x1b" * (32 << 10), timeline=timeline, samples=samples, device_map=device_map)
    assert len(encode_record(worst)) < store_module.most_bytes(of)


# What a power loss leaves


WHOLE = encode_record(result(run="whole", why="größer"))
LOST = encode_record(result(run="lost", why="größer"))


def runs_of(store: Store) -> list[str]:
    return [each.run for each in store.read()[0]]


def test_a_line_cut_at_any_byte_costs_no_other(store: Store) -> None:
    for cut in range(len(LOST) + 1):
        store.path.write_bytes(WHOLE + b"\n" + LOST[:cut])
        before, problems = store.read()
        is_there = cut == len(LOST)
        assert [each.run for each in before] == ["whole", *["lost"] * is_there], cut
        assert len(problems) == (0 < cut < len(LOST)), cut
        with store.path.open("a+b", buffering=0) as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            store_module._append(file.fileno(), encode_record(result(run="next")) + b"\n")
        assert runs_of(store) == ["whole", *["lost"] * is_there, "next"], cut
        assert len(store.read()[1]) == (0 < cut < len(LOST)), cut


def test_a_file_cut_at_any_byte_keeps_all_lines_before(store: Store) -> None:
    data = b"".join(encode_record(result(run=f"{number}")) + b"\n" for number in range(2))
    ends = [len(data) // 2 * number - 1 for number in (1, 2)]
    store.path.write_bytes(data)
    for cut in reversed(range(len(data))):
        os.truncate(store.path, cut)
        assert runs_of(store) == [f"{number}" for number, end in enumerate(ends) if end <= cut], cut


@pytest.mark.parametrize("cut", [1, 10, 300, len(LOST) - 1, len(LOST)])
def test_a_line_that_was_written_behind_a_cut_one_is_found(store: Store, cut: int) -> None:
    """As a writer that looks for no newline does, or `cat` of two such files."""
    store.path.write_bytes(LOST[:cut] + WHOLE + b"\n" + encode_record(result(run="next")))
    assert runs_of(store) == [*["lost"] * (cut == len(LOST)), "whole", "next"]
    assert [problem.line for problem in store.read()[1]] == [1] * (cut < len(LOST))


@pytest.mark.parametrize(
    ("data", "runs", "lines"),
    [
        pytest.param(WHOLE + b"\n" + bytes(4096), ["whole", "next"], [2], id="at the end"),
        pytest.param(WHOLE + bytes(4096), ["whole", "next"], [], id="for the newline"),
        pytest.param(bytes(4096) + WHOLE + b"\n", ["whole", "next"], [1], id="before a whole line"),
        pytest.param(LOST[:300] + bytes(4096), ["next"], [1], id="behind a cut line"),
        pytest.param(LOST[:300] + bytes(100) + LOST[400:] + b"\n" + WHOLE, ["whole", "next"], [1], id="inside a line"),
        pytest.param(LOST[:300] + bytes(100) + WHOLE + b"\n", ["whole", "next"], [1], id="between a cut line and a whole one"),
    ],
)
def test_zeros_of_a_journalled_file_system_cost_no_whole_line(store: Store, data: bytes, runs: list[str], lines: list[int]) -> None:
    store.path.write_bytes(data)
    store.append(result(run="next"))
    assert runs_of(store) == runs
    assert [problem.line for problem in store.read()[1]] == lines


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
        pytest.param(
            plain(color="red"), "does not know (Object contains unknown field `color`); update fitmatrix", id="unknown field"
        ),
        pytest.param(plain(**{"\x1b[2J\n" + "x" * 9999: 1}), r"contains unknown field `\x1b[2J\nxxx", id="hostile field"),
        pytest.param(plain(outcome="melted"), "not a result, set aside: Invalid enum value 'melted'", id="unknown outcome"),
        pytest.param(b'{"schema": 1}', "not a result, set aside: Object missing required field `id`", id="missing fields"),
        pytest.param(plain(metrics={"load_s": None}), "not a result, set aside: Expected `float`, got `null`", id="no number"),
        pytest.param(plain(log_tail="@").replace(b"@", b"\xff"), "not a result, set aside: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"\xff\xfe{}", "not a result, set aside: JSON is malformed", id="UTF-16"),
        pytest.param(b"\0" * 512, "not a result, set aside", id="a hole that a crash left"),
        pytest.param(b'{"schema": 1, "id": ' + b"[" * 200_000, "not a result, set aside", id="nested without end"),
        pytest.param(encode_record(result())[:-9], "not a result, set aside: Input data was truncated", id="cut short"),
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
    store.path.write_bytes(b"\n".join([encode_record(result(run="a")), line, encode_record(result(run="b")), b""]))
    results, (problem,) = store.read()
    assert [each.run for each in results] == ["a", "b"]
    assert problem.line == 2
    assert str(problem).startswith(f"{store.path}:2: ")
    assert said in str(problem)
    assert str(problem).isprintable()
    assert len(str(problem)) < 600


def test_what_windows_saves_is_read_or_named_once(store: Store) -> None:
    lines = b"".join(encode_record(result(run=name)) + b"\r\n" for name in "ab")
    store.path.write_bytes(codecs.BOM_UTF8 + lines)
    results, problems = store.read()
    assert ([each.run for each in results], problems) == (["a", "b"], [])
    for encoding in ("utf-16-le", "utf-16-be"):
        store.path.write_bytes(("\ufeff" + lines.decode()).encode(encoding))
        results, (problem,) = store.read()
        assert (results, str(problem).partition(", as ")[0]) == ([], f"{store.path}:1: is in UTF-16")
        assert str(problem).endswith("save it as UTF-8")


def test_an_archive_in_the_place_of_results_is_named_once(store: Store) -> None:
    with zipfile.ZipFile(store.path, "w") as archive:
        archive.writestr("run/results.jsonl", b"\n".join(encode_record(result(run=name)) for name in "ab"))
    results, (problem,) = store.read()
    assert (results, str(problem)) == (
        [], f"{store.path}:1: is a zip archive, and nothing was read: unpack it, and name what was in it",
    )  # fmt: skip


def test_blank_lines_and_foreign_line_ends_are_no_problem(store: Store) -> None:
    store.path.write_bytes(b"\n" + encode_record(result(run="a")) + b"\r\n  \n\n" + encode_record(result(run="b")))
    results, problems = store.read()
    assert ([each.run for each in results], problems) == (["a", "b"], [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
@example(b'{"schema": 1e400}')
@example(b'{"schema": 99999999999999999999}')
@example(b'{"schema": 1, "id": "\\ud800"}')
def test_no_bytes_make_reading_fail(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / NAME
    path.write_bytes(encode_record(result(run="a")) + b"\n" + junk + b"\n" + encode_record(result(run="b")))
    results, problems = read(path)
    assert [each.run for each in results] == ["a", "b"]
    assert all(1 < (problem.line or 0) < path.read_bytes().count(b"\n") + 1 for problem in problems)


# Formats of the past


GOLDENS = sorted(goldens.DATA.glob("results-*.jsonl"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_every_result_of_every_golden_file_is_read(path: Path) -> None:
    results, problems = read(path)
    assert problems == []
    assert len(results) == len(path.read_bytes().splitlines())


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_nothing_that_a_golden_line_says_is_lost(path: Path) -> None:
    """What was written in our format is still there, field by field; what came later has its default."""
    for line, each in zip(path.read_bytes().splitlines(), read(path)[0], strict=True):
        written = msgspec.json.decode(line)
        if written["schema"] == SCHEMA:
            assert_within(written, to_builtins(each))
        assert decode(encode_record(each)) == each


def assert_within(written: Any, found: Any) -> None:
    if isinstance(written, dict):
        for key, value in written.items():
            assert_within(value, found[key])
    elif isinstance(written, list):
        assert len(found) == len(written)
        for ours, theirs in zip(written, found, strict=True):
            assert_within(ours, theirs)
    else:
        assert found == written


def test_the_golden_of_now_is_what_we_write() -> None:
    assert goldens.NOW.read_bytes() == goldens.lines(), (
        "the format has changed: read tests/support/goldens.py, then python -m tests.support.goldens"
    )


def test_the_first_golden_is_never_rewritten() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest().startswith("113daa1007483909")


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
    assert isinstance(decode(encode_record(result())), Result)
    with pytest.raises(msgspec.ValidationError):
        decode(plain(case=None))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_file_of_results(store: Store, what: str) -> None:
    """The first would never be opened, the second never be read to its end."""
    if what == "pipe":
        os.mkfifo(store.path)
    else:
        store.path.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match=r"cannot write results here \(it is no regular file\)"):
        store.prepare()
    with pytest.raises(StoreError, match="cannot be read: it is no regular file"):
        store.read()


def test_many_lines_that_are_no_results_are_told_in_one(store: Store) -> None:
    store.path.write_bytes(b"x\n" * 100_000 + encode_record(result()) + b"\n")
    results, problems = store.read()
    assert len(results) == 1
    assert [str(one) for one in problems] == [
        f"{store.path}: 100,000 lines are no results; the first is line 1: "
        "not a result, set aside: JSON is malformed: invalid character (byte 0)"
    ]
    store.path.write_bytes(b"x\n" * 3)
    assert [problem.line for problem in store.read()[1]] == [1, 2, 3]
