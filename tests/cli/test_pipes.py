"""Where output goes: a reader that leaves, a full disk, nothing at all, a terminal without colors; never a traceback."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from harness.cli.entry import COMMANDS, build_parser
from harness.cli.fleet import FLEET_COMMANDS, bisect
from harness.core.records import encode_record
from harness.fleet import shards
from harness.fleet.bisect.kept import QUESTION, BisectQuestion
from harness.fleet.conformity import PINNED
from harness.fleet.contract import CONTRACT
from harness.machine import probe
from harness.results.store import NAME
from tests.support import builders, fleets, small_models
from tests.support.runs import ROOT
from tests.support.wheels import write_wheel

FULL = Path("/dev/full")
with_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
BISECT = "fleet bisect --package planted --good 1.0 --bad 1.1 --case gpt2/bf16/cpu --find-links wheels --results kept"
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
    "fleet plan --model gpt2 --precision bf16 --to planned": 0,
    "fleet run fleet": 0,
    BISECT: 1,
    "calibrate --reset": 0,
}
# A bisect asks for uv before it looks at what is kept.
has_uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.defpath}") is not None
WORDS = [pytest.param(words, marks=pytest.mark.skipif(words == BISECT and not has_uv, reason="needs uv")) for words in ASKED]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the commands ask for: results, and a contract with what one machine has sent."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / NAME).write_bytes(builders.GOLDEN.read_bytes())
    made, cut = fleets.contract(fleets.machine_class(machines=("1", "2")), models=("a", "b"))
    shards.write_issued(tmp_path / "fleet" / CONTRACT, made, cut)
    fleets.deliver(tmp_path / "sent/one", cut[0])
    (tmp_path / "fleet.toml").write_text('[class.laptop]\nram = "8GiB"\n', encoding="utf-8")
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "test_load.py").touch()
    keep_releases(tmp_path)
    return tmp_path


def keep_releases(place: Path) -> None:
    """Keep what a bisect measured of both ends, which are alike, so that it answers without measuring."""
    words = tuple(bisect._words(build_parser(["fleet"]).parse_args(BISECT.split())))
    versions = {name: version for name, version in probe.versions().items() if name in PINNED}
    for version in ("1.0", "1.1"):
        write_wheel(place / "wheels", "planted", version, {"planted.py": ""})
        one = builders.result(metrics={"ram_needed_bytes": 2e9}, environment={"planted": version})
        (place / "kept" / f"planted-{version}").mkdir(parents=True)
        (place / "kept" / f"planted-{version}" / NAME).write_bytes((encode_record(one) + b"\n") * 3)
    question = BisectQuestion(package="planted", words=words, versions=versions)
    (place / "kept" / QUESTION).write_bytes(encode_record(question))


@contextmanager
def started(words: str, place: Path, redirection: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command by a shell, as it is typed, with everything it keeps below `place`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FITMATRIX_CACHE": str(place / "cache"), **environment}
    env.pop("COLUMNS", None) if "COLUMNS" not in environment else None
    program = "tests.support.scripted_cluster" if words.startswith("fleet run") else "harness"
    typed = f"exec {shlex.quote(sys.executable)} -m {program} {words} {redirection}"
    with subprocess.Popen(
        ["sh", "-c", typed], cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


def test_every_command_that_ends_by_itself_is_asked() -> None:
    """A chat does not end by itself."""
    assert {words.split()[0] for words in ASKED if words[:1].isalpha()} == {*COMMANDS} - {"chat"}
    assert {words.split()[1] for words in ASKED if words.startswith("fleet ")} == {*FLEET_COMMANDS}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", WORDS)
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
@pytest.mark.parametrize("words", WORDS)
def test_what_cannot_be_written_is_said_in_one_sentence(words: str, unbuffered: str, place: Path) -> None:
    with started(words, place, ">/dev/full", PYTHONUNBUFFERED=unbuffered) as run:
        said = run.communicate()[1]
    assert said.splitlines()[-1] == "fitmatrix: standard output cannot be written (No space left on device)"
    assert run.returncode == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("words", WORDS)
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


@contextmanager
def chatting(place: Path, redirection: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a chat with a small model; yields it and its port, which was free. Nothing of it is left at the end."""
    small_models.save("llama", place / "tiny", vocab_size=96, max_position_embeddings=200, eos_token_id=0)
    small_models.write_letters(place / "tiny", 96)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = f"chat ./tiny fp32/cpu --port {port} --new-tokens 12"
    with started(words, place, redirection) as run:
        try:
            yield run, port
        finally:
            tree = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
            run.kill()
            _, left = psutil.wait_procs(tree, timeout=60)
            assert not left


@with_gradio
@pytest.mark.parametrize("redirection", ["2>&-", ""], ids=["no standard error", "with it"])
def test_a_chat_whose_address_nobody_reads_ends(redirection: str, place: Path) -> None:
    with chatting(place, redirection) as (run, _):
        assert run.stdout
        run.stdout.close()
        assert run.stderr
        said = run.stderr.read()
        assert run.wait(timeout=300) == 0
    assert "Traceback" not in said
    assert "Broken" not in said


@with_gradio
def test_a_chat_whose_address_cannot_be_written_says_so_and_ends(place: Path) -> None:
    with chatting(place, ">/dev/full") as (run, _):
        said = run.communicate(timeout=300)[1]
    assert said.splitlines()[-1] == "fitmatrix: standard output cannot be written (No space left on device)"
    assert run.returncode == 1
    assert "Traceback" not in said


@with_gradio
def test_a_chat_without_any_output_answers_until_it_is_stopped(place: Path) -> None:
    with chatting(place, ">&- 2>&- <&-") as (run, port):
        deadline = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < deadline:
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=10).status == 200
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=60) == ("", "")
        assert run.returncode == 130
