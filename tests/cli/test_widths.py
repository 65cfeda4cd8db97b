"""No line of any command is longer than the terminal, but for code, commands to paste, and a single long name."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from rich.cells import cell_len

from harness.cli import prove_min_ram
from harness.cli.entry import COMMANDS, main
from harness.cli.fleet import FLEET_COMMANDS, bisect
from harness.core.metrics import METRICS
from harness.core.units import GIB
from harness.fleet import shards
from harness.fleet.bisect.releases import ReleaseRange
from harness.fleet.bisect.search import BisectAnswer, Side, TriedRelease
from harness.fleet.contract import CONTRACT
from harness.run.min_ram import Minimum
from tests.support import builders, fleets
from tests.support.runs import ROOT

WIDTHS = (60, 80, 120)
PROFILE = '--gpu "RTX 3060 12GB" --ram 32GiB'
TWO = "--gpu 24GiB --gpu 12GiB --ram 64GiB"
ASKED = (
    f"plan chatglm-6b --best {PROFILE}",
    "plan chatglm-6b --best --ram 32GiB",
    f"plan qwen3-8b --best {PROFILE}",
    f"plan qwen3-8b --best {TWO}",
    f"plan qwen3-8b --kv fp8 --kv static --attention eager {PROFILE}",
    f"plan qwen3-8b --placement balanced_low_0 --precision torchao-int8-dynamic int8 {TWO} --all",
    f"plan qwen3-8b chatglm-6b gpt2 {PROFILE}",
    f"plan chatglm-6b {PROFILE} --explain int8/direct",
    f"plan gpt2 {PROFILE} --training lora",
    f"plan chatglm-6b {TWO} --training zero3",
    'hardware --gpu "RTX 3060 12GB" --cpu "Ryzen 5 5600" --ram "2x16GiB DDR5" --disk "nvme 500GB"',
    "inspect chatglm-6b",
    f"compare {ROOT}/reports/smollm2-135m {ROOT}/reports/precisions --all",
    "fleet status fleet sent",
    "fleet collect fleet sent",
    *(f"{name} --help" for name in COMMANDS),
    *(f"fleet {name} --help" for name in FLEET_COMMANDS),
)


# What a command stands behind, which is pasted and so one line.
PASTED = ("To load it:", "To prove it:", "To hand out what is missing:")


def too_wide(out: str, columns: int) -> list[str]:
    """Return the lines of prose and tables that are longer than the terminal and have a blank to be broken at."""
    prose = re.split(r"^(?:from|import) ", out, maxsplit=1, flags=re.MULTILINE)[0]  # a program is printed last
    lines = [line.rstrip() for line in prose.splitlines() if not line.startswith(PASTED)]
    return [line for line in lines if cell_len(line) > columns and " " in line.strip()]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contract, and what a machine with a long name has sent for one of its shards."""
    monkeypatch.chdir(tmp_path)
    made, cut = fleets.contract(fleets.machine_class(machines=("1", "2")), models=("a", "b"))
    shards.write_issued(tmp_path / "fleet" / CONTRACT, made, cut)
    named = "runner-of-the-second-rack-in-the-basement.example.org"
    fleets.deliver(tmp_path / "sent/one", cut[0], ended_at=None, machine=named, problem="the disk is full, and so is the other")


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("words", ASKED)
def test_no_line_is_longer_than_the_terminal(
    words: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with suppress(SystemExit):  # of --help
        main(shlex.split(words))
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 3
    assert not too_wide(out, columns)
    assert "…" not in out


@pytest.mark.parametrize("columns", WIDTHS)
def test_tables_of_what_takes_long_are_no_wider(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found by measuring, shown without it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    case = builders.case("torchao-int8-dynamic", "balanced_low_0", model="deepseek-r1-distill-qwen-1.5b")
    size = {"works_bytes": 9 * GIB, "fails_bytes": 8 * GIB, "estimate_bytes": 9 * GIB, "estimate_high_bytes": 11 * GIB}
    prove_min_ram.show_minimums([Minimum(case=case, why="out of memory while it was loaded", runs=7, **size)])
    figure, releases = "ram_needed_bytes", ("4.57.0", "5.0.0", "5.1.0.post20260201")
    tried = [TriedRelease(release=one, side=side, value=9e9, change=0.25) for one, side in zip(releases, Side, strict=False)]
    skipped = TriedRelease(release=releases[1], side=Side.SKIPPED, why="it cannot be installed beside the torch that runs here")
    answer = BisectAnswer(
        figure=figure,
        is_changed=True,
        also=tuple(METRICS)[:4],
        said="needs a quarter more RAM than with the good end",
        tried=(*tried, skipped),
        last_good=releases[0],
        first_bad=releases[2],
        between=(releases[1],),
        is_over=True,
    )
    bisect._show("transformers", ReleaseRange(package="transformers", releases=releases, left_out=("5.0.0rc1",) * 9), answer)
    out = capsys.readouterr().out
    assert "works in" in out
    assert "5.1.0.post20260201" in out
    assert not too_wide(out, columns)
    assert "…" not in out


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "words", ["paln", "report nowhere --fromat", "report reports", "plan no-such-model", "compare tests tests"]
)
def test_a_sentence_on_a_terminal_is_broken_between_words_and_only_there(words: str, columns: int) -> None:
    status, said = shown_on_a_terminal(words, columns)
    assert status == 2
    assert said.startswith("fitmatrix")
    assert not too_wide(said, columns)
    plain = subprocess.run(
        [sys.executable, "-m", "harness", *words.split()], cwd=ROOT, capture_output=True, text=True, check=False
    ).stderr
    assert plain.count("\n") == 1
    assert said.split() == plain.split()


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_list_of_models_does_without_hub_ids_on_a_narrow_terminal(columns: int) -> None:
    """A pipe gets them always, and so does a terminal that all have room on."""
    status, said = shown_on_a_terminal("models qwen", columns)
    assert status == 0
    assert not too_wide(said, columns)
    assert "\nqwen2.5-0.5b-instruct " in said
    assert "Qwen/" not in said


def shown_on_a_terminal(words: str, columns: int) -> tuple[int, str]:
    """Run a command on a terminal of so many columns; return its status and what it shows, without colors."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "harness", *words.split()]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while chunk := read(ours):
            shown += chunk
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;]*m", "", shown.decode().replace("\r\n", "\n"))


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""
