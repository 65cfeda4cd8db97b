"""Where output goes: a reader that leaves, a full disk, nothing at all, a terminal without colors; never a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.cli.entry import COMMANDS
from harness.fleet import shards
from harness.fleet.contract import CONTRACT
from harness.results.store import NAME
from tests.support import builders, fleets
from tests.support.runs import ROOT

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
# Each command with its exit status; what writes files writes them into a directory of its own.
ASKED = {
    "": 0,
    "--help": 0,
    "--version": 0,
    "hardware --gpu 24GiB": 0,
    "hardware --json --gpu 24GiB": 0,
    "inspect smollm2-135m": 0,
    "inspect smollm2-135m --json": 0,
    "models": 0,
    "models --json": 0,
    "plan gpt2 --ram 8GiB": 0,
    "plan gpt2 --ram 8GiB --best": 0,
    "plan gpt2 --ram 8GiB --json": 0,
    "plan gpt2 --ram 8GiB --code bf16/cpu": 0,
    "plan gpt2 --ram 8GiB --explain bf16/cpu": 0,
    "plan chatglm-6b --ram 2GiB --placement cpu": 1,
    "plan gpt2 --gpu 24GiB --training zero3": 1,
    "report here": 0,
    "report here --format md": 0,
    "report here --format csv": 0,
    "publish here --to site": 0,
    "share here": 0,
    "compare here here --all": 0,
    "compare here here --json": 0,
    "compare here here --markdown": 0,
    "watch --once": 0,
    "watch --once --json": 0,
    "synth gpt2 made --hollow": 0,
    "fleet status fleet sent": 0,
    "fleet collect fleet sent": 1,
    "fleet resume fleet sent": 0,
    "fleet emit slurm fleet --to jobs": 0,
    "calibrate --reset": 0,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the commands ask for: results, and a contract with what one machine has sent."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / NAME).write_bytes(builders.GOLDEN.read_bytes())
    made, cut = fleets.contract(fleets.machine_class(machines=("1", "2")), models=("a", "b"))
    shards.write_issued(tmp_path / "fleet" / CONTRACT, made, cut)
    fleets.deliver(tmp_path / "sent/one", cut[0])
    return tmp_path


@contextmanager
def started(words: str, place: Path, redirection: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command by a shell, as it is typed, with everything it keeps below `place`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FITMATRIX_CACHE": str(place / "cache"), **environment}
    env.pop("COLUMNS", None) if "COLUMNS" not in environment else None
    typed = f"exec {shlex.quote(sys.executable)} -m harness {words} {redirection}"
    with subprocess.Popen(
        ["sh", "-c", typed], cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


def test_every_command_that_ends_by_itself_is_asked() -> None:
    """The rest waits for a browser, or for the other tests of it."""
    assert {words.split()[0] for words in ASKED if words[:1].isalpha()} == {*COMMANDS} - {"chat"}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ASKED)
def test_a_reader_that_has_seen_enough_is_no_mistake(words: str, unbuffered: str, place: Path) -> None:
    """Of what is short all was written before the reader left, and its own status is told; of what is long nothing is wrong."""
    with started(words, place, PYTHONUNBUFFERED=unbuffered) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.readline()
        run.stdout.close()
        said = run.stderr.read()
    assert "Traceback" not in said
    assert "Broken" not in said
    assert run.returncode in (0, ASKED[words])


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ASKED)
def test_what_cannot_be_written_is_said_in_one_sentence(words: str, unbuffered: str, place: Path) -> None:
    with started(words, place, ">/dev/full", PYTHONUNBUFFERED=unbuffered) as run:
        said = run.communicate()[1]
    assert said.splitlines()[-1] == "fitmatrix: standard output cannot be written (No space left on device)"
    assert run.returncode == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("words", ASKED)
def test_who_closes_the_output_wants_the_status_alone(words: str, place: Path) -> None:
    """And no file that is written gets what would be printed."""
    with started(words, place, ">&- 2>&- <&-") as run:
        assert run.communicate() == ("", "")
    assert run.returncode == ASKED[words]


COLORLESS = {"NO_COLOR": {"NO_COLOR": "1"}, "a dumb terminal": {"TERM": "dumb"}, "a pipe": {"TERM": "xterm-256color"}}


@pytest.mark.parametrize("words", [words for words in ASKED if not words.startswith(("publish", "share", "synth", "fleet"))])
def test_colors_are_for_terminals_and_no_width_is_too_small(words: str, place: Path) -> None:
    kinds = {**COLORLESS, "colors by force": {"FORCE_COLOR": "1"}, "30 columns": {"COLUMNS": "30"}}
    for kind, environment in kinds.items():
        with started(words, place, **environment) as run:
            out, said = run.communicate()
        assert run.returncode == ASKED[words], (kind, said)
        assert "Traceback" not in said, kind
        assert ("\x1b" in out + said) <= (kind == "colors by force"), kind
