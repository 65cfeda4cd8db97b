"""`fitmatrix watch` from outside: once, as lines, as JSON, and what it says to bad input; a child that grows is foreseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.errors import UsageError
from harness.core.units import MIB
from harness.live import command
from harness.measure.system_counters import LINUX
from tests.live.growing import growing_worker
from tests.support.runs import ROOT

pytestmark = pytest.mark.skipif(not LINUX, reason="looks into /proc")

WATCH = (sys.executable, "-m", "harness", "watch")


def watch(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WATCH, *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def started(*words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*WATCH, *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[int]:
    """The id of a worker that grows."""
    with growing_worker(tmp_path, limit_bytes=400 * MIB) as pid:
        yield pid


def test_a_worker_that_grows_is_told_by_component_and_its_end_foreseen(growing: int) -> None:
    time.sleep(0.3)
    done = watch("--pid", str(growing), "--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    (ram,) = [tier for tier in found["tiers"] if tier["name"] == "cpu"]
    own = {name: size for name, size in ram["parts"].items() if name not in ("others", "cache", "free")}
    assert sum(own.values()) == ram["process_bytes"]
    assert own["kv"] == found["tokens"] * MIB
    assert found["case"] == "tiny/bf16/cpu"
    assert found["tokens_per_s"] > 5
    room = found["room"]
    assert room["ends"] == "cpu"
    end = found["tokens"] + room["tokens"]
    assert end == pytest.approx((400 * MIB - own["overhead"] + (ram["mapped_bytes"])) / MIB, rel=0.02)


def test_once_shows_the_words_of_a_terminal(growing: int) -> None:
    done = watch("--pid", str(growing), "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny/bf16/cpu  warm round, ")
    assert "limit 400 MiB" in done.stdout
    assert "more tokens, then RAM ends" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


def test_forty_columns_and_ascii_are_enough(growing: int) -> None:
    done = watch("--pid", str(growing), "--once", COLUMNS="40", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert max(map(len, done.stdout.splitlines())) <= 40


def test_a_pipe_gets_lines_and_ends_with_the_process(growing: int) -> None:
    with started("--pid", str(growing)) as child:
        assert child.stdout is not None
        assert "  tiny/bf16/cpu  warm round, " in child.stdout.readline()
        os.kill(growing, signal.SIGKILL)
        rest, said = child.communicate(timeout=30)
    assert all("tiny/bf16/cpu" in one or str(growing) in one for one in rest.splitlines())
    assert said.splitlines() == [
        "fitmatrix: this is no terminal: a line a second (--json for programs, --once for one look)",
        f"fitmatrix: process {growing} has ended",
    ]
    assert child.returncode == 0


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    with started("--json") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["schema"] == 1
        child.stdout.close()
        assert child.wait(timeout=30) == 0
        assert child.stderr.read() == ""


def test_ctrl_c_ends_it_in_a_sentence() -> None:
    with started("--json") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["schema"] == 1
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130
        assert child.stderr.read() == "fitmatrix: stopped; what was watched goes on, and only saved frames are kept\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pid", "4194303"), "fitmatrix: --pid 4194303: there is no such process; leave --pid out to watch a run of yours\n"),
        (("--pid", "0"), "fitmatrix: --pid: 0 is too small: at least 1\n"),
        (("--pid", "vllm"), "fitmatrix: --pid: 'vllm' is not a whole number\n"),
    ],
)
def test_a_process_that_is_not_there_is_one_sentence(words: tuple[str, ...], said: str) -> None:
    done = watch("--once", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_the_process_of_another_user_is_told_as_a_whole_or_not_at_all() -> None:
    done = watch("--once", "--pid", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "process 1 is no case of fitmatrix" in done.stdout or "the memory of process 1 may not be read" in done.stdout


def test_without_textual_the_screen_says_what_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"needs the package textual: pip install fitmatrix\[watch\]; --once and --json"):
        command._screen(None)  # type: ignore[arg-type]  # refused before it is looked at


def test_neither_lines_nor_json_import_torch_or_textual() -> None:
    code = (
        "import sys; from harness.live import command; command.run(None, once=True, as_json=True);"
        "print(*sorted({'torch', 'transformers', 'numpy', 'textual', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
