"""The live line: what it says, that it leaves nothing behind, and that there is none where nobody looks."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec
import pytest

from harness.core.records import Interference, Outcome, Phase, Quality, Workload
from harness.core.units import GIB, MIB
from harness.measure.sampler import Sample
from harness.planning import feasibility
from harness.run import live
from harness.run.case_result import CaseModel, RunContext
from harness.run.live import LiveLine
from harness.run.runner import Run
from tests.support import builders, scripted
from tests.test_plugin import CONFTEST, PYPROJECT, ROOT

ALONE = """
    from harness.measure import system_counters as counters

    counters.cpu = scripted.no_counters
"""

SAMPLE = Sample(at_s=0, ram_bytes=1229 * MIB, anon_bytes=MIB, vram_bytes={})
COLUMNS = 90


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    with scripted.own_fork_server():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    context = RunContext(
        run="run",
        machine=builders.machine(),
        environment={},
        scratch=tmp_path,
        worker_main=scripted.worker("ok"),
        timeout_s=60,
    )
    case = builders.case()
    run = Run(feasibility.decide(case, context.machine, None), CaseModel(location=Path("tiny")), context)
    yield run
    run.finish()


class Terminal:
    """As much of a terminal as pytest and the live line use: lines of text, and a cursor among them."""

    def __init__(self, rows: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
        self.file: TextIO = os.fdopen(slave, "w")
        self.rows, self.raw = rows, b""
        self.lines = [""] * rows
        self.top, self.row, self.column, self.saved = 0, 0, 0, (0, 0)

    def close(self) -> None:
        self.file.close()
        os.close(self.master)

    def read(self) -> str:
        """Read until nobody holds the other end any more, and return what was written as it came."""
        self.file.close()
        while data := self._data():
            self.raw += data
        return self.raw.decode()

    def read_now(self) -> str:
        """Return what lies ready."""
        os.set_blocking(self.master, False)
        try:
            return os.read(self.master, 1 << 16).decode()
        except BlockingIOError:
            return ""

    def _data(self) -> bytes:
        try:
            return os.read(self.master, 1 << 16)
        except OSError:  # Linux says so at the end
            return b""

    def show(self, text: str) -> list[str]:
        """Return all lines, those that have scrolled away first, after `text`."""
        for escape, parameter, final, character in re.findall(r"(\x1b(?:\[([\d;?]*)([A-Za-z])|[D78]))|([^\x1b])", text):
            if escape:
                self._obey(escape, int(parameter) if parameter.isdecimal() else 1, final)
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._down()
            else:
                self._write(character)
        return [line.rstrip() for line in self.lines]

    def _obey(self, escape: str, count: int, final: str) -> None:
        if escape == "\x1bD":
            self._down()
        elif escape == "\x1b7":
            self.saved = self.row, self.column
        elif escape == "\x1b8":
            self.row, self.column = self.saved
        elif final == "K":
            self.lines[self.top + self.row] = "" if count == 2 else self.lines[self.top + self.row][: self.column]
        elif final in "AB":
            self.row = min(max(self.row + (count if final == "B" else -count), 0), self.rows - 1)
        else:
            assert final == "m", f"{escape!r} is not known here"

    def _down(self) -> None:
        if self.row == self.rows - 1:
            self.top += 1
            self.lines.append("")
        else:
            self.row += 1

    def _write(self, character: str) -> None:
        if self.column == COLUMNS:
            self.column = 0
            self._down()
        line = self.lines[self.top + self.row].ljust(self.column)
        self.lines[self.top + self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(rows=24)
    yield terminal
    terminal.close()


# What it says


def test_line_tells_case_number_phase_time_and_memory(run: Run) -> None:
    said = live.line(run, replaced(vram={"gpu:0": 8 * GIB, "gpu:1": GIB}), number=3, total=14)
    assert re.fullmatch(r"tiny/bf16/cpu  3/14  starting  00:\d\d  gpu:0 8.00 GiB  gpu:1 1.00 GiB  RAM 1.20 GiB", said)


def test_line_follows_the_case(run: Run) -> None:
    run.load()
    assert "  loading  " in live.line(run, SAMPLE, 1, 1)
    run.first_round()
    assert "  cold round  " in live.line(run, SAMPLE, 1, 1)
    run.round()
    assert f"  warm round 2/{Workload().repeats}  " in live.line(run, SAMPLE, 1, 1)


def replaced(vram: dict[str, int]) -> Sample:
    return Sample(at_s=0, ram_bytes=SAMPLE.ram_bytes, anon_bytes=MIB, vram_bytes=vram)


def test_line_says_that_something_took_time_from_the_last_request(run: Run) -> None:
    run.load()
    quiet = Interference(phase="load", start_s=0, end_s=1)
    run.measured.windows[:] = [quiet]
    assert "disturbed" not in live.line(run, SAMPLE, 1, 1)
    run.measured.windows[:] = [quiet, msgspec.structs.replace(quiet, why="others used 0.9 of 2 cores")]
    assert re.search(r"  \d\d:\d\d  disturbed  RAM ", live.line(run, SAMPLE, 1, 1))


def test_last_warm_round_is_not_followed_by_another(run: Run) -> None:
    for _ in range(Workload().repeats):
        run.round()
    assert f"  warm round {Workload().repeats}/{Workload().repeats}  " in live.line(run, SAMPLE, 1, 1)


def test_rounds_that_were_not_asked_for_are_told_apart(run: Run) -> None:
    for _ in range(Workload().repeats + 2):
        run.round()
    assert f"  warm round {Workload().repeats}/{Workload().repeats} +2  " in live.line(run, SAMPLE, 1, 1)


# What is said of a case that is done


def read(size: int) -> dict[str, object]:
    """A load of 8 GiB of files, so much of them from the disk."""
    return {"files_bytes": 8 * GIB, "phases": [Phase(name="load", start_s=0.0, end_s=1.0, disk_read_bytes=size)]}


METRICS = {"vram_peak_bytes": 8.1 * GIB, "ram_peak_bytes": 1.2 * GIB, "ready_s": 21.0, "decode_tok_s": 23.1, "load_s": 9.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": METRICS}, "works  8.10 GiB VRAM  ready 21.0 s  23.1 tokens/s"),
        ({"metrics": {"ready_s": 21.0}, "noisy": {"decode_tok_s": "12 %"}}, "works  ready 21.0 s"),
        ({"metrics": {"ready_s": 21.0}, **read(8 * GIB)}, "works  ready at first 21.0 s"),
        ({"metrics": {"ready_s": 2.1}, **read(0)}, "works  ready again 2.10 s"),
        (
            {"metrics": {"ready_s": 21.0, "decode_tok_s": 23.1}, "noisy": {"decode_tok_s": "12 %"}},
            "works  ready 21.0 s  23.1 tokens/s (noisy)",
        ),
        (
            {"metrics": {"ready_s": 21.0, "decode_tok_s": 23.1}, "noisy": {"load_s": "12 %"}},
            "works  ready 21.0 s (noisy)  23.1 tokens/s",
        ),
        ({"quality": Quality(probe="1", verdict="intact", why="")}, "works  intact"),
        ({"outcome": Outcome.OOM, "why": "no room for weights", "metrics": METRICS}, "out of memory: no room for weights"),
        ({"outcome": Outcome.TIMEOUT, "why": "loading was not done"}, "timed out: loading was not done"),
        ({"outcome": Outcome.CRASH}, "crashed"),
    ],
)
def test_summary_tells_the_figures_of_what_works_and_the_reason_of_what_does_not(changes: dict[str, Any], said: str) -> None:
    assert live.summary(builders.result(**changes)) == said


# When it is spec


def test_line_appears_below_the_cursor_and_goes_without_a_trace(run: Run, terminal: Terminal) -> None:
    before = terminal.show("cases/test_load.py ")
    line = LiveLine(terminal.file, total=7)
    with line.shown():
        line(run, SAMPLE)
        shown = terminal.show(terminal.read_now())
    assert shown[0] == before[0]
    assert shown[1].startswith("tiny/bf16/cpu  1/7  starting  00:")
    assert terminal.show(terminal.read_now()) == before
    assert (terminal.row, terminal.column) == (0, len("cases/test_load.py "))
    line.close()


def test_line_is_drawn_only_while_shown(run: Run, terminal: Terminal) -> None:
    line = LiveLine(terminal.file, total=1)
    line(run, SAMPLE)
    with line.shown():
        pass
    line(run, SAMPLE)
    assert terminal.read_now() == ""
    line.close()


def test_samples_come_faster_than_it_is_drawn(run: Run, terminal: Terminal) -> None:
    line, begun_s = LiveLine(terminal.file, total=1), time.monotonic()
    with line.shown():
        for _ in range(50):
            line(run, SAMPLE)
            time.sleep(0.01)
        took_s = time.monotonic() - begun_s
    spec = terminal.read_now().count("tiny/bf16/cpu")
    assert 1 <= spec <= took_s / live._EVERY_S + 1
    line.close()


def test_line_is_cut_to_the_terminal_s_width(run: Run, terminal: Terminal) -> None:
    fcntl.ioctl(terminal.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    line = LiveLine(terminal.file, total=1)
    with line.shown():
        line(run, SAMPLE)
        assert terminal.show(terminal.read_now())[1] == "tiny/bf16/cpu  1/1"
    line.close()


def test_run_goes_on_without_its_terminal(run: Run, terminal: Terminal) -> None:
    line = LiveLine(terminal.file, total=1)
    os.dup2(os.open(os.devnull, os.O_RDWR), terminal.master)  # the other end is gone
    with line.shown():
        line(run, SAMPLE)
        line(run, SAMPLE)


def test_nothing_is_drawn_where_there_is_no_terminal(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "output").open("w") as file:
        line = LiveLine(file, total=1)
        with line.shown():
            line(run, SAMPLE)
        line.close()
    assert (tmp_path / "output").read_text() == ""


# With pytest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "cases", tmp_path / "cases", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "conftest.py").write_text(CONFTEST + ALONE)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    scripted.write_model(tmp_path / "tiny", fp32="slow", bf16="slow")
    return tmp_path


def pytest_in(project: Path, output: TextIO | int, *words: str) -> subprocess.Popen[bytes]:
    options = ["--model", "tiny", "--precision", "fp32", "--precision", "bf16", "--placement", "cpu", "--repeats", "1"]
    options += ["--new-tokens", "2", "--calibrate", "never"]
    # A worker of xdist says how wide its own output is.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "pytest", "cases", *options, "-k", "load or quality", *words]
    return subprocess.Popen(command, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)


@pytest.mark.parametrize(("words", "rows"), [("", 6), ("", 50), ("-v", 6), ("-v", 50), ("-s", 6)])
def test_pytest_s_own_output_stays_intact(project: Path, words: str, rows: int) -> None:
    terminal = Terminal(rows)
    with pytest_in(project, terminal.file, *words.split()):
        raw = terminal.read()
    os.close(terminal.master)
    assert re.search(r"tiny/fp32/cpu  1/2  loading  00:\d\d  RAM", raw)
    assert re.search(r"tiny/bf16/cpu  2/2  quality probe  00:\d\d  RAM", raw)
    lines = terminal.show(raw)
    assert not [line for line in lines if "  RAM " in line]
    assert [line for line in lines if line.startswith(("cases/", "tiny/"))] == expected(words)
    assert sum("4 passed, 4 deselected" in line for line in lines) == 1


def expected(words: str) -> list[str]:
    if words != "-v":
        return [f"tiny/{precision}/cpu  ..  works  420 MiB RAM  intact" for precision in ("fp32", "bf16")]
    lines = []
    for number, precision in enumerate(("fp32", "fp32", "bf16", "bf16")):
        test = ("load", "quality")[number % 2]
        line = f"cases/test_{test}.py::test_{test}[tiny/{precision}/cpu] PASSED"
        lines.append(f"{line:{COLUMNS - len(' [100%]')}}[{25 * (number + 1):3d}%]")
    return lines


def test_nothing_is_drawn_into_a_pipe(project: Path) -> None:
    with pytest_in(project, subprocess.PIPE) as run:
        output = run.communicate()[0].decode()
    assert run.returncode == 0
    assert "\x1b" not in output
    assert "  RAM " not in output


VERDICT = "unsupported combination: load_checkpoint_and_dispatch loads weights as they are stored and does not quantize"
UNSUPPORTED = ("--placement", "dispatch", "--precision", "int8")


def test_a_verdict_is_wrapped_on_a_terminal_and_never_cut(project: Path) -> None:
    terminal = Terminal(50)
    with pytest_in(project, terminal.file, *UNSUPPORTED):
        lines = terminal.show(terminal.read())
    os.close(terminal.master)
    assert VERDICT in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= COLUMNS


def test_a_log_has_a_verdict_in_one_line(project: Path) -> None:
    with pytest_in(project, subprocess.PIPE, *UNSUPPORTED) as run:
        output = run.communicate()[0].decode()
    assert [line for line in output.splitlines() if line.startswith("tiny/int8/dispatch") and line.endswith(VERDICT)]
