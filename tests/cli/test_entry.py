"""The command line: exit statuses, one sentence for a mistake, and output that programs can read."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.cli import entry, hardware, inspect, report
from harness.cli.entry import COMMANDS, build_parser, main
from harness.cli.options import _OWN
from harness.core.errors import UsageError
from harness.core.options import OPTIONS
from harness.core.records import encode_record
from harness.core.text import visible
from harness.core.units import MIB
from harness.machine import bandwidth, probe
from harness.results.store import NAME
from harness.run.options import Options
from tests.support.builders import GOLDEN, result
from tests.support.packed_files import write_plain
from tests.support.strangers import change

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A directory with results of many kinds."""
    (tmp_path / NAME).write_bytes(GOLDEN.read_bytes())
    return tmp_path


def command(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start the program as a user does, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# Asking for it


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_no_mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "usage: fitmatrix" in capsys.readouterr().out


def test_help_lists_every_command_and_says_how_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "pytest cases/ --model MODEL" in shown
    for name, row in COMMANDS.items():
        assert f"{name} {row.help}" in shown


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fitmatrix {harness.__version__}\n"


def test_without_a_command_it_shows_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "usage: fitmatrix" in shown.out
    assert [name for name in COMMANDS if f"    {name}" not in shown.out] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plna", "fitmatrix: no command 'plna': did you mean 'plan'?"),
        ("--vesion", "fitmatrix: no option --vesion: did you mean '--version'?"),
        ("plan chatglm-6b --precison int4", "fitmatrix plan: no option --precison: did you mean '--precision'"),
        ("plan chatglm-6b --gqu 8GiB", "fitmatrix plan: no option --gqu: did you mean '--gpu'?"),
        ("plan chatglm-6b --vram 12GiB", "fitmatrix plan: no option --vram: did you mean '--gpu'?"),
        ("plan chatglm-6b --load-in-8bit", "fitmatrix plan: no option --load-in-8bit: did you mean '--precision'?"),
        ("hardware --meassure", "fitmatrix hardware: no option --meassure: did you mean '--measure'?"),
        ("hardware --fast", "fitmatrix hardware: no option --fast: known: --cpu, --disk, --gpu,"),
        ("plan chatglm-6b --pr 8", "fitmatrix plan: --pr can mean --precision or --prompt-tokens or --prove-min-ram:"),
        ("plan chatglm-6b --ram --json", "fitmatrix plan: --ram needs a value: --ram SIZE"),
        ("report here there", "fitmatrix report: 'there' is one word too many"),
    ],
)
def test_a_wrong_word_names_its_command_and_what_was_probably_meant(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(said)
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "chatglm-6b --gpu rtx-3060 --ram 16GiB --precision int8 int4 --json",
        "--gpu rtx-3060 --ram 16GiB --precision int4 int8 chatglm-6b --json",
        "--gpu rtx-3060 --precision=int4 int8 --json chatglm-6b --ram=16GiB",
        "--ram 16GiB --json --gpu rtx-3060 --precision int4 --precision int8 -- chatglm-6b",
    ],
)
def test_the_words_of_a_command_may_stand_in_any_order(words: str) -> None:
    given = build_parser().parse_args(["plan", *words.split()])
    assert given.models == ["chatglm-6b"]
    assert sorted(given.precision) == ["int4", "int8"]
    assert (given.gpu, given.ram.size, given.json) == (("rtx-3060",), 16 << 30, True)


def test_what_is_optional_may_stand_after_options() -> None:
    given = build_parser().parse_args(["chat", "chatglm-6b", "--port", "8000", "int4/cpu"])
    assert (given.model, given.case, given.port) == ("chatglm-6b", "int4/cpu", 8000)


@pytest.mark.parametrize(
    "arguments", [["fly"], ["--fast"], ["compare"], ["report", "a", "b"], ["hardware", "--color"]], ids=" ".join
)
def test_a_wrong_command_line_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fitmatrix" in shown.err
    assert "Traceback" not in shown.err


def test_the_package_is_a_program() -> None:
    run = command("--version")
    out, err = run.communicate()
    assert (run.returncode, out.decode(), err) == (0, f"fitmatrix {harness.__version__}\n", b"")


# report


def test_report_writes_a_page_beside_the_results(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results)]) == 0
    page = results / "index.html"
    assert capsys.readouterr() == (f"page: {page}\n", "")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "chatglm-6b" in page.read_text(encoding="utf-8")


def test_report_writes_where_it_is_told_to(results: Path) -> None:
    page = results / "deep" / "er" / "page.html"
    assert main(["report", str(results), "--html", str(page)]) == 0
    assert page.is_file()
    assert not (results / "index.html").exists()


def test_report_tells_of_lines_that_it_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / NAME).write_bytes(b"\n".join([encode_record(result()), b"{torn", b""]))
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fitmatrix: {tmp_path / NAME}:2: not a result, set aside: ")
    assert shown.err.count("\n") == 1
    assert f"{NAME}:2" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "no results here; run: pytest cases/ --results DIR"),
        ([f"{NAME}/"], "cannot be read: Is a directory"),
        ([NAME, "index.html/"], "the page cannot be written: Is a directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(tmp_path: Path, found: list[str], said: str) -> None:
    for name in found:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    run = command("report", str(tmp_path))
    out, err = run.communicate()
    assert (run.returncode, out) == (2, b"")
    assert err.decode().startswith(f"fitmatrix: {tmp_path}")
    assert said in err.decode()
    assert err.count(b"\n") == 1


# How it ends


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("hardware",), ("hardware", "--json")], ids=" ".join)
def test_a_reader_who_has_seen_enough_is_no_mistake(
    arguments: tuple[str, ...], unbuffered: str, measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left on standard error is the word that it measures, the first time."""
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    if measured:
        monkeypatch.setattr(bandwidth, "BUFFER_BYTES", MIB)
        monkeypatch.setattr(bandwidth, "FILE_BYTES", MIB)
        monkeypatch.setattr(bandwidth, "_busy_s", lambda: 0.0)  # what is measured beside others is measured again
        probe.probe(scratch=ROOT, measure=True)
    with command(*arguments, PYTHONUNBUFFERED=unbuffered) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.close()
        said = run.stderr.read().decode()
    assert said == ("" if measured else "measuring the read bandwidth of RAM and disk, once (1 to 3 s) ...\n")
    assert run.returncode == 0


def test_every_command_knows_what_it_runs() -> None:
    parser = build_parser()
    assert parser.parse_args(["report", "x"]).command is report.run
    assert parser.parse_args(["hardware"]).command is hardware.run
    assert parser.parse_args(["models"]).command is inspect.run_models


def test_a_command_imports_no_other(tmp_path: Path) -> None:
    """Each brings modules of its own, and a plan shall begin at once."""
    code = f"import sys; from harness.cli.entry import main; main(['report', {str(tmp_path)!r}]); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    commands = {row.module for row in COMMANDS.values()} - {entry.__name__}
    assert commands & set(found) == {"harness.cli.report"}


# Names and messages are text


EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil"


@pytest.mark.parametrize("name", ["inspect", "plan", "report"])
def test_an_error_spells_out_what_a_terminal_would_obey(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, str(tmp_path / EVIL)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "‹U+202E›evil" in said or "\\u202eevil" in said
    assert visible(said) == said


def test_a_directory_of_any_name_is_planned_in_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plain(tmp_path / EVIL, "smollm2-135m-instruct")
    change(folder / "config.json", {"auto_map": {"AutoConfig": f"{EVIL}.C"}})
    for arguments in ([], ["--code", "bf16/cpu"], ["--explain", "bf16/cpu"], ["--json"], ["--trust-remote-code"]):
        assert main(["plan", str(folder), "--ram", "8GiB", *arguments]) == 0
        out = capsys.readouterr().out
        assert visible(out) == out
        assert "evil" in out
    main(["plan", str(folder), "--ram", "8GiB", "--code", "bf16/cpu"])
    code = capsys.readouterr().out
    (assignment,) = [
        node for node in ast.parse(code).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL"
    ]
    assert ast.literal_eval(assignment.value) == str(folder)
    assert code.count("trust_remote_code=False") == 2


@pytest.mark.parametrize("name", ["plan", "chat"])
def test_an_option_of_a_run_is_the_same_row_in_a_command(name: str) -> None:
    """One help text and one parser; where a command means something of its own, the row says so, or a row of its own does."""
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    options = {action.dest: action for action in commands.choices[name]._actions}
    shared = [row.of_command(name) for row in OPTIONS if row.key in options and row.name not in ("model", *_OWN)]
    assert shared
    assert [options[row.key].help for row in shared] == [row.help.replace("%", "%%") for row in shared]


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch", "0"), ("--new-tokens", "one"), ("--precision", "int5"), ("--placement", "cpus")]
)
def test_a_mistake_is_one_sentence_whichever_way_it_comes_in(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = flag.removeprefix("--").replace("-", "_")
    with pytest.raises(UsageError) as in_a_run:
        Options(given={key: value})
    assert main(["plan", "chatglm-6b", flag, value]) == 2
    assert capsys.readouterr().err == f"fitmatrix: {in_a_run.value}\n"
