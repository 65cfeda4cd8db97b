"""`pytest cases/ --shard FILE` as a machine of a fleet runs it, from the contract to what is collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from harness.cli.entry import main
from harness.fleet import lease
from harness.fleet.receipt import read_receipt
from tests.support import runs

FLEET = """
[class.small]
ram = "16GiB"
"""
ASKED = ("--precision", "bf16", "--precision", "int8", "--placement", "cpu", "--new-tokens", "3", "--repeats", "2")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cases/, two scripted models and a fleet file, which is the current directory."""
    path = runs.folder(tmp_path / "machine", ["tiny", "other"])
    (path / "fleet.toml").write_text(FLEET, encoding="utf-8")
    monkeypatch.chdir(path)
    monkeypatch.setenv(lease.LEASE, str(tmp_path / "lease"))
    return path


def plan(*words: str) -> int:
    return main(["fleet", "plan", "--model", "./tiny", "--model", "./other", *ASKED, *words])


def measure(place: Path, *words: str, shard: str = "fleet/shards/small-1.json") -> subprocess.CompletedProcess[str]:
    """Run a shard as its machine does."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "cases", "--shard", shard, "--results", "sent", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "FITMATRIX_MACHINE": "lab-1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_shard_is_planned_run_and_collected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan() == 0
    assert "4 cases for small" in capsys.readouterr().out
    done = measure(place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 results in sent/results.jsonl" in done.stdout
    receipt = read_receipt(place / "sent/receipt-small-1.json")
    assert (receipt.machine, receipt.exit_status, receipt.problem) == ("lab-1", 0, "")
    assert list(receipt.results) == [f"small:{name}/{way}/cpu" for name in ("tiny", "other") for way in ("bf16", "int8")]
    assert main(["fleet", "collect", "fleet", "sent", "--to", "all"]) == 0
    shown = capsys.readouterr().out
    assert "small      4        4        0" in shown
    assert (place / "all/results.jsonl").read_bytes() == (place / "sent/results.jsonl").read_bytes()
    log = (place.parent / "lease.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" by ")[0].partition(" ")[2] for line in log] == ["taken", "given back"]


def test_what_a_crash_left_out_is_resumed_and_the_rest_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that dies leaves a receipt that is true as far as it goes."""
    assert plan() == 0
    kill = "\n\ndef pytest_runtest_logstart(nodeid):\n    import os\n    'other/int8' in nodeid and os._exit(9)\n"
    conftest = place / "conftest.py"
    whole = conftest.read_text(encoding="utf-8")
    conftest.write_text(whole + kill, encoding="utf-8")
    assert measure(place).returncode == 9
    capsys.readouterr()
    assert main(["fleet", "collect", "fleet", "sent", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["counted"]) == 3
    assert [one["of"] for one in found["findings"]] == ["small:other/int8/cpu"]
    conftest.write_text(whole, encoding="utf-8")
    done = measure(place, "--resume")
    assert "--resume: 3 cases kept, 1 run" in done.stdout
    assert main(["fleet", "collect", "fleet", "sent"]) == 0


FULL = """

from harness.results import store

_APPEND = store._append


def _full(descriptor, line):
    if b"other/int8" in line:
        raise OSError(28, "No space left on device")
    _APPEND(descriptor, line)


store._append = _full
"""


@pytest.fixture
def short() -> Iterator[str]:
    """A folder for what is rescued, whose name is short enough for a socket's."""
    with TemporaryDirectory(prefix="f") as name:
        yield name


def test_a_disk_that_fills_is_told_in_the_receipt_and_what_was_written_counts(
    place: Path, short: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conftest = place / "conftest.py"
    conftest.write_text(conftest.read_text(encoding="utf-8") + FULL, encoding="utf-8")
    monkeypatch.setenv("TMPDIR", short)
    plan()
    assert measure(place).returncode == 1
    said = "cannot append the result of other/int8/cpu: the disk is full"
    assert said in read_receipt(place / "sent/receipt-small-1.json").problem
    capsys.readouterr()
    assert main(["fleet", "collect", "fleet", "sent", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["counted"]) == 3
    assert [(one["kind"], one["of"]) for one in found["findings"]] == [("ended", "small-1"), ("missing", "small:other/int8/cpu")]


def test_options_beside_the_shard_are_one_sentence(place: Path) -> None:
    plan()
    done = measure(place, "--batch", "4")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr == "ERROR: --batch stands beside --shard, and shard small-1 decides it: leave --batch out\n\n"


def test_what_is_no_shard_is_one_sentence(place: Path) -> None:
    done = measure(place, shard="fleet.toml")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: fleet.toml: is no shard (")


def test_a_machine_that_is_not_of_the_class_measures_nothing_and_says_so_in_its_receipt(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "fleet.toml").write_text('[class.small]\nram = "64GiB"\n[versions]\ntorch = "1.0"\n', encoding="utf-8")
    plan()
    done = measure(place)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = "--shard small-1: this machine has 16.0 GiB of RAM, and class small 64.0 GiB; run it on a machine of that class"
    assert said in done.stderr + done.stdout
    assert read_receipt(place / "sent/receipt-small-1.json").problem == said
    capsys.readouterr()
    assert main(["fleet", "status", "fleet", "sent"]) == 0
    shown = capsys.readouterr().out
    assert "stopped" in shown
    assert said in shown.replace("\n", " ")


def test_another_version_measures_nothing(place: Path) -> None:
    (place / "fleet.toml").write_text(FLEET + '[versions]\ntorch = "1.0"\n', encoding="utf-8")
    plan()
    assert "and the contract says 1.0; install that version" in measure(place).stderr


def test_limits_and_a_device_map_travel_with_the_shard(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The map itself: its file is on the machine that plans alone."""
    (place / "map.toml").write_text('"" = "cpu"\n', encoding="utf-8")
    words = ["--ram", "8GiB", "--device-map", "map.toml", "--placement", "file"]
    assert main(["fleet", "plan", "--model", "./tiny", *ASKED[2:], *words]) == 0
    (place / "map.toml").unlink()
    done = measure(place)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (place / "sent/results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["id"] for one in found] == ["tiny/int8/cpu@ram8GiB", "tiny/int8/file@ram8GiB"]
    assert {(one["case"]["ram_bytes"], one["outcome"]) for one in found} == {(8 << 30, "ok")}
    assert json.loads((place / "fleet/shards/small-1.device-map.json").read_text(encoding="utf-8")) == {"": "cpu"}
    capsys.readouterr()
    assert main(["fleet", "collect", "fleet", "sent"]) == 0


def test_a_device_map_that_is_none_is_refused_when_the_fleet_is_planned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "map.json").write_text('{"model": "moon"}', encoding="utf-8")
    assert plan("--device-map", "map.json") == 2
    assert "'model' is on 'moon', which is no device" in capsys.readouterr().err
    assert not (place / "fleet").exists()


def test_a_second_attempt_never_runs_beside_a_first(place: Path) -> None:
    plan()
    with lease.leased("shard small-1", place.parent / "lease"):
        assert not lease.is_free(place.parent / "lease")
        done = measure(place)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "this machine measures another shard (" in done.stderr
    assert "shard small-1); wait for it, or end that run" in done.stderr
    assert not (place / "sent/results.jsonl").exists()
    assert lease.is_free(place.parent / "lease")


def test_results_from_before_the_contract_are_not_kept_for_it(place: Path) -> None:
    plan()
    assert measure(place).returncode == 0
    old = [line.replace(b'"at":"20', b'"at":"19') for line in (place / "sent/results.jsonl").read_bytes().splitlines(keepends=True)]
    (place / "sent/results.jsonl").write_bytes(b"".join(old))
    done = measure(place, "--resume")
    assert "--resume: 0 cases kept, 4 run" in done.stdout


def test_planning_goes_on_without_a_class_that_is_wrong_and_never_over_a_contract(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "fleet.toml").write_text(FLEET + '[class.bad]\ngpu = "RTX 9999"\n', encoding="utf-8")
    assert plan() == 2
    shown = capsys.readouterr()
    assert "4 cases for small" in shown.out
    assert "contract: fleet/contract.json (4 cases, " in shown.out
    assert "pytest cases/ --shard fleet/shards/small-1.json --results sent/small-1" in shown.out
    assert shown.out.endswith("\nTo collect:  fitmatrix fleet collect fleet sent --to results\n")
    assert "fleet.toml: class bad: no card is called 'RTX 9999'" in shown.err
    assert plan() == 2
    assert "is there already, and receipts may come for it" in capsys.readouterr().err


def test_resume_writes_what_is_missing_and_the_contract_knows_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--attempts", "2")
    (place / "sent").mkdir()
    assert main(["fleet", "resume", "fleet", "sent"]) == 0
    said = capsys.readouterr()
    assert "fleet/shards/small-1-try2.json: 4 cases for small, attempt 2" in said.out
    assert "4 of them were handed out before to shards that are not due yet and were not heard of; --wait leaves" in said.err
    assert measure(place, shard="fleet/shards/small-1-try2.json").returncode == 0
    assert main(["fleet", "collect", "fleet", "sent"]) == 0
    assert main(["fleet", "resume", "fleet", "nowhere"]) == 2
    (place / "empty").mkdir()
    assert main(["fleet", "resume", "fleet", "empty"]) == 1
    assert "given up after 2 attempts" in capsys.readouterr().err
