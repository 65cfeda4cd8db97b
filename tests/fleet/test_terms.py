"""Planning a fleet from the command line: what must be clear to every machine, and what a contract is not made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.entry import main
from harness.fleet.contract import read_contract
from tests.support.scripted import write_model
from tests.support.spoken import Said, saying

FLEET = '[class.small]\nram = "16GiB"\n'


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """A folder with two models and a fleet file, in which `fleet plan` is run."""
    for name in ("tiny", "other"):
        write_model(tmp_path / name)
    (tmp_path / "fleet.toml").write_text(FLEET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "fleet", "plan", "--placement", "cpu")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model ./tiny --model ./none", "none"),
        ("--model ./tiny --model {here}/tiny", "two of these are one model; name it once"),
        ("--model ./tiny --attempts 0", "--attempts: 0 is too small: at least 1"),
        ("--model ./tiny --attempts 101", "--attempts: 101 is too large: at most 100"),
        ("--model ./tiny --attempts many", "--attempts: 'many' is not a whole number"),
        ("--model ./tiny --to fleet.toml", "--to fleet.toml is a file; name a directory"),
        ("--model ./tiny --fleet tiny", "--fleet tiny cannot be read: Is a directory; name a file of TOML"),
    ],
)
def test_what_two_machines_could_not_read_alike_is_one_sentence(words: str, said: str, planned: Said, tmp_path: Path) -> None:
    status, out, err = planned(*words.format(here=tmp_path).split())
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "fleet").exists()


def test_weights_that_are_made_up_need_not_be_there(planned: Said, tmp_path: Path) -> None:
    for file in [*(tmp_path / "tiny").glob("*.safetensors"), *(tmp_path / "tiny").glob("*.bin")]:
        file.unlink()
    assert "no weights" in planned("--model", "./tiny")[2]
    assert planned("--model", "./tiny", "--weights", "synthetic")[0] == 0


def test_every_value_of_an_option_that_is_repeated_is_in_the_contract(planned: Said) -> None:
    assert (
        planned("--model", "./tiny", "--model", "./other", "--precision", "bf16", "--precision", "int8", "--attempts", "7")[0] == 0
    )
    made = read_contract(Path("fleet"))
    assert made.terms.models == {"tiny": "./tiny", "other": "./other"}
    assert [one.case.id for one in made.terms.cases] == ["tiny/bf16/cpu", "tiny/int8/cpu", "other/bf16/cpu", "other/int8/cpu"]
    assert made.terms.attempts == 7
    assert "attempts" not in made.terms.options


def test_a_version_that_may_be_any_is_not_agreed_on(planned: Said, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(f'{FLEET}[versions]\ntorch = "any"\nextra = "1.0"\n', encoding="utf-8")
    assert planned("--model", "./tiny")[0] == 0
    versions = read_contract(Path("fleet")).terms.versions
    assert "torch" not in versions
    assert versions["extra"] == "1.0"
    assert {"fitmatrix", "transformers"} <= versions.keys()


@pytest.mark.parametrize("engine", ["slurm", "github"])
def test_job_files_are_written_for_each_class_where_they_are_asked_for(
    engine: str, planned: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the contract or its directory; paths in them are as seen from where the jobs begin."""
    (tmp_path / "fleet.toml").write_text('[class.a]\nram = "16GiB"\nruns-on = "x"\n[class.b]\nram = "8GiB"\nruns-on = "y"\n')
    assert planned("--model", "./tiny")[0] == 0
    names = ["fleet-a.sbatch", "fleet-b.sbatch"] if engine == "slurm" else [".github/workflows/fleet.yml"]
    for contract in ("fleet", "fleet/contract.json"):
        assert main(["fleet", "emit", engine, contract, "--to", "jobs"]) == 0
        written, _, steps = capsys.readouterr().out.partition("\n\n")
        assert written.splitlines() == [f"jobs/{name}" for name in names]
        assert (
            steps.splitlines()
            == {
                "slurm": [
                    "To submit:  sbatch jobs/fleet-a.sbatch && sbatch jobs/fleet-b.sbatch",
                    "To collect:  fitmatrix fleet collect fleet fleet/results --to results",
                ],
                "github": ["Commit it with fleet/, then:  gh workflow run fleet.yml"],
            }[engine]
        )
        texts = [(tmp_path / "jobs" / name).read_text(encoding="utf-8") for name in names]
        assert all("--shard fleet/shards/" in text for text in texts)
    assert not (tmp_path / names[0]).exists()
