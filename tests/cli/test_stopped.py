"""Ctrl-C: status 130 and a sentence that says what was kept, whatever runs or is only imported yet; a pipe or a terminal."""

from __future__ import annotations

import importlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.cli import calibrate
from harness.cli.entry import COMMANDS, main
from harness.core.records import Machine
from harness.machine.signals import Terminated
from harness.planning.calibrating import kept_calibration
from tests.support.runs import ROOT

WORDS = {
    "hardware": [],
    "inspect": ["chatglm-6b"],
    "models": [],
    "plan": ["chatglm-6b"],
    "calibrate": [],
    "chat": ["chatglm-6b"],
    "watch": [],
    "synth": ["chatglm-6b"],
    "report": ["here"],
    "publish": ["here", "--to", "site"],
    "share": ["here"],
    "fleet": ["status", "contract", "here"],
    "compare": ["here", "there"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_was_kept(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    row = COMMANDS[name]
    monkeypatch.setattr(importlib.import_module(row.module), row.run, stopped)
    assert main([name, *WORDS[name]]) == 130
    assert capsys.readouterr() == ("", f"fitmatrix: stopped; {row.kept}\n")


def test_while_options_are_read_nothing_was_changed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "add_arguments", stopped)
    assert main(["calibrate"]) == 130
    assert capsys.readouterr() == ("", "fitmatrix: stopped; nothing was changed\n")


def test_who_is_asked_to_end_by_another_signal_says_so_by_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: object) -> int:
        raise Terminated("SIGTERM")

    monkeypatch.setattr(calibrate, "run", stopped)
    assert main(["calibrate"]) == 143
    assert "stopped; nothing of it was kept" in capsys.readouterr().err


def test_what_was_forgotten_already_is_not_called_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal that comes in the midst of it is heard behind it."""
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    before, forgets = kept_calibration.forget, []

    def forget(machine: Machine) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        forgets.append(machine)
        return before(machine)

    monkeypatch.setattr(kept_calibration, "forget", forget)
    assert main(["calibrate", "--reset"]) == 130
    assert len(forgets) == 1
    assert capsys.readouterr() == ("", "fitmatrix: stopped; what was kept for this machine is forgotten\n")


# In the midst of an import: the module that is named sends the signal when it is looked for.
SENDS = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""
OUR_OWN = "import harness.cli; sys.exit(harness.cli.main())"
PYTEST_S = "import pytest; sys.exit(pytest.main(['cases', '--collect-only']))"
WHILE_IMPORTED = {
    "the command line": ("harness.cli.entry", OUR_OWN, 130, "nothing was changed"),
    "what it stands on": ("harness.core.options", OUR_OWN, 130, "nothing was changed"),
    "the plugin": ("harness.run.session", PYTEST_S, 2, "nothing was run"),
}


@pytest.mark.parametrize("what", WHILE_IMPORTED)
def test_an_import_is_no_place_for_a_traceback(what: str) -> None:
    module, code, status, kept = WHILE_IMPORTED[what]
    run = subprocess.run(
        [sys.executable, "-c", SENDS.format(name=module) + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr, run.stdout) == (status, f"fitmatrix: stopped; {kept}\n", "")


def on_a_terminal(words: Sequence[str], until: str) -> tuple[int, str]:
    """Run a command on a terminal of its own, press Ctrl-C once it shows `until`, and return its status and what it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(sys.executable, [sys.executable, "-m", "harness", *words], {**os.environ, "TERM": "xterm"})
    shown, pressed, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not pressed and until.encode() in shown:
            pressed = os.write(terminal, b"\x03") == 1
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("words", "until"), [(("watch",), "q quit"), (("watch", "--json"), '"schema"'), (("hardware", "--measure"), "measuring")]
)
def test_on_a_terminal_the_sentence_has_a_line_of_its_own(
    words: Sequence[str], until: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    status, shown = on_a_terminal(words, until)
    assert "Traceback" not in shown
    assert status == 130, shown
    assert f"\nfitmatrix: stopped; {COMMANDS[words[0]].kept}" in shown.replace("\r", "")
