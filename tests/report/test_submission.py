"""Results made ready to be shared: the bytes that a site publishes, nothing private, and commands that work as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from harness.cli import entry as cli
from harness.core.records import Result, encode_record
from harness.report.export.submission import SUBMITTED, TEXT
from harness.results import store
from tests.support import builders

replace = msgspec.structs.replace
ROOT = Path(__file__).parents[2]
SECRET = "hf_abcDEF0123456789abcd"


def audit_step(sent: Path) -> list[str]:
    """Return the arguments with which the workflow that takes results in audits what is at `sent`."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/intake.yml").read_text(encoding="utf-8"))["jobs"]
    script = next(step["run"] for step in jobs["audit"]["steps"] if step.get("name") == "Audit what was sent")
    program, command, place, option, _, *rest = shlex.split(script.partition("2>&1")[0])
    assert (program, command, place, option) == ("fitmatrix", "publish", "sent/reports", "--to")
    return [command, str(sent / "reports"), *rest]


def sound(**changes: Any) -> Result:
    return builders.result(**({"at": "2024-05-01T00:00:00Z", "run": "20240501T000000Z-abc123"} | changes))


def save(folder: Path, *results: Result) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in results))
    return folder


def share(tmp_path: Path, *results: Result) -> Path:
    """Share results and return the file that was written."""
    assert cli.main(["share", str(save(tmp_path / "in", *results)), "--to", str(tmp_path / "share")]) == 0
    (file,) = (tmp_path / "share" / SUBMITTED).glob(f"*/{store.NAME}")
    return file


def test_what_is_shared_is_to_the_byte_what_a_site_publishes(tmp_path: Path) -> None:
    told = sound(log_tail=f"File /home/alice/models/x.py {SECRET}\n")
    file = share(tmp_path, sound(run="another"), told)
    assert cli.main(["publish", str(tmp_path / "in"), "--to", str(tmp_path / "site")]) == 0
    (raw,) = (tmp_path / "site/raw").iterdir()
    assert file.read_bytes() == raw.read_bytes()
    assert b"alice" not in file.read_bytes()
    assert SECRET.encode() not in file.read_bytes()


def test_a_person_sees_the_text_the_file_and_how_much_was_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = share(tmp_path, sound(), sound(run="told", log_tail="File /home/alice/models/x.py\n"))
    said = capsys.readouterr()
    text = (tmp_path / "share" / TEXT).read_text(encoding="utf-8")
    assert said.out.startswith(text)
    assert f"file: {file} (2 results, 1 cleaned, 0 lines refused)" in said.out
    assert "Private names were taken out of 1 result." in text
    assert "medians: a speed is the median of its own samples" in text
    assert said.err == ""


def test_what_is_shared_passes_the_audit_of_the_workflow_that_takes_it_in(tmp_path: Path) -> None:
    file = share(tmp_path, sound(), sound(run="told", log_tail="File /home/alice/models/x.py\n"))
    arguments = audit_step(tmp_path / "share")
    assert cli.main([*arguments, "--to", str(tmp_path / "site")]) == 0
    (raw,) = (tmp_path / "site/raw").iterdir()
    assert file.read_bytes() == raw.read_bytes()


def test_the_workflow_refuses_a_forgery_with_the_sentence_of_publish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = sound(metrics={"decode_tok_s": 99.0}, samples={"decode_tok_s": [1.0, 2.0, 3.0]})
    save(tmp_path / "share" / SUBMITTED / "x", sound(run="sound"), forged)
    assert cli.main([*audit_step(tmp_path / "share"), "--to", str(tmp_path / "site")]) == 1
    assert "x/results.jsonl:2: says" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_what_is_refused_is_told_and_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = sound(metrics={"decode_tok_s": 99.0}, samples={"decode_tok_s": [1.0, 2.0, 3.0]})
    folder = save(tmp_path / "in", forged)
    assert cli.main(["share", str(folder), "--to", str(tmp_path / "share")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"fitmatrix: {folder / store.NAME}:1: says decode 99")
    assert said[1] == "fitmatrix: nothing to share: no result in 1 file, 1 line refused"
    assert not (tmp_path / "share").exists()


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share/mine").write_text("mine")
    assert cli.main(["share", str(save(tmp_path / "in", sound())), "--to", str(tmp_path / "share")]) == 2
    assert "stays as it is" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["results", "a/b/c", "a/b; rm -rf x", "-x/y", "a/"])
def test_a_repository_is_an_owner_and_a_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "in", sound())
    assert cli.main(["share", str(folder), "--to", str(tmp_path / "share"), f"--repository={name}"]) == 2
    assert f"--repository {name!r} is no repository on GitHub: write OWNER/NAME" in capsys.readouterr().err


def test_the_printed_commands_add_the_file_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run as they are printed, with git itself and a program in place of GitHub's that forks to a folder and notes the rest."""
    machine = replace(builders.machine(), name="it's $HOME; a `machine`")
    sent = share(tmp_path / "a folder", sound(machine=machine))
    script = "\n".join(line[2:] for line in capsys.readouterr().out.splitlines() if re.match(r"  (gh|git) ", line))
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text(
        f"#!{sys.executable}\nimport pathlib, subprocess, sys\n"
        "if sys.argv[1] == 'repo':\n"
        "    subprocess.run(['git', 'init', '-q', '--bare', 'fork.git'], check=True)\n"
        "    name = sys.argv[3].partition('/')[2]\n"
        "    subprocess.run(['git', 'clone', '-q', 'fork.git', name], check=True, stderr=subprocess.DEVNULL)\n"
        "else:\n    pathlib.Path('../asked').write_text(chr(0).join(sys.argv[1:]))\n"
    )
    gh.chmod(0o755)
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "HOME": str(tmp_path), "PATH": f"{gh.parent}{os.pathsep}{os.environ['PATH']}"}
    author = {f"GIT_{who}_{what}": "a@b.example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["bash", "-e"], input=script, text=True, cwd=tmp_path, env=settings | author, check=True, capture_output=True)
    kept = tmp_path / "kept"
    fork, branch = str(tmp_path / "fork.git"), f"results-{sent.parent.name}"
    subprocess.run(["git", "clone", "-q", "-b", branch, fork, str(kept)], env=settings, check=True)
    files = [path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert files == [f"{SUBMITTED}/{sent.parent.name}/{store.NAME}"]
    assert (kept / files[0]).read_bytes() == sent.read_bytes()
    asked = (tmp_path / "asked").read_text().split("\0")
    assert asked[:3] == ["pr", "create", "--title"]
    assert asked[3] == "Results of it's $HOME; a `machine`"
    assert Path(asked[5]).read_text(encoding="utf-8").startswith("Adds 1 result as")
