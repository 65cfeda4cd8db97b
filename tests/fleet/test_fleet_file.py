"""The fleet file: what it may say, and that a class that is wrong holds up none of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UsageError
from harness.core.units import GIB
from harness.fleet.fleet_file import Fleet, read_fleet


def read(tmp_path: Path, text: str) -> Fleet:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return read_fleet(path)


def test_a_class_has_cards_ram_names_and_what_engines_need(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [versions]
        torch = "any"
        [class.rtx3060]
        gpu = ["RTX 3060 12GB", "8GiB"]
        ram = "32GiB"
        threads = 8
        machines = ["lab-1", "lab-2"]
        runs-on = "self-hosted"
        sbatch = ["--partition=gpu"]
        labels = {"ray.io/accelerator-type" = ["A100", "H100"], rack = "7"}
        """,
    )
    (kind,) = found.classes
    assert (kind.name, kind.gpus, kind.ram_bytes, kind.threads) == ("rtx3060", ("RTX 3060 12GB", "8GiB"), 32 * GIB, 8)
    assert (kind.machines, kind.runs_on, kind.sbatch) == (("lab-1", "lab-2"), ("self-hosted",), ("--partition=gpu",))
    assert kind.labels == {"ray.io/accelerator-type": ("A100", "H100"), "rack": ("7",)}
    assert found.versions == {"torch": "any"}


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    (kind,) = read(tmp_path, '\ufeff[class.small]\r\nram = "8GiB"\r\n').classes
    assert (kind.name, kind.ram_bytes) == ("small", 8 * GIB)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('[class.bad]\ngpu = "RTX 9999"', "no card is called 'RTX 9999'"),
        ("[class.bad]\ngpu = 12", "gpu = 12 is neither a text nor a list of texts"),
        ('[class.bad]\nram = "lots"', "lots"),
        *(
            (f'[class.bad]\nram = "8GiB"\nthreads = {wrong}', f"threads = {said} is no number of threads; write one such as 8")
            for wrong, said in (("0", "0"), ('"8"', "'8'"), ("true", "true"))
        ),
        ('[class.bad]\nram = "8GiB"\nlabels = "A100"', "labels = 'A100' is no table; write one such as"),
        ('[class.bad]\nram = "8GiB"\nlabels = {rack = 7}', "labels: rack = 7 is neither a text nor a list of texts"),
        ('[class.bad]\nmachines = ["a"]', "neither gpu nor ram says what its machines have"),
        ('[class.bad]\nram = "8GiB"\ngpus = "T4"', "unknown key 'gpus': did you mean 'gpu'?"),
        *((f'[class."{name}"]\nram = "8GiB"', "is no name for a class") for name in ("../bad", "a b", "a" * 61, "-a")),
        ("[class]\nbad = 3", "[class.bad] is no table; write its keys below it: gpu"),
        *(
            (f'[class.bad]\nram = "8GiB"\nmachines = ["{name}"]', "is neither a text nor a list of texts")
            for name in ("\\u001b[2J", " ", "")
        ),
        ('[class.bad]\nram = "8GiB"\nmachines = ["lab-1"]', "two machines are called 'lab-1', in good and in bad"),
        ('[class.bad]\nram = "8GiB"\nmachines = ["lab-2", "lab-2"]', "two machines are called 'lab-2'"),
    ],
)
def test_a_class_that_is_wrong_is_named_and_the_others_go_on(tmp_path: Path, table: str, said: str) -> None:
    found = read(tmp_path, f'[class.good]\nram = "16GiB"\nmachines = ["lab-1"]\n{table}\n')
    assert [kind.name for kind in found.classes] == ["good"]
    (why,) = found.faults.values()
    assert said in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[class", "is not TOML"),
        ("", "names no class of machines"),
        ('[classes.a]\nram = "8GiB"', "unknown table [classes]: did you mean 'class'?"),
        ('[class.a]\ngpu = "RTX 9999"', "no class can be used: a: no card is called"),
        ('[class.a]\nram = "8GiB"\n[versions]\ntorch = 2', "is no table of texts"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as wrong:
        read(tmp_path, text)
    assert said in str(wrong.value)
    assert "fleet.toml" in str(wrong.value)
    assert "\n" not in str(wrong.value).strip()


def test_what_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"fleet\.toml is not TOML: 'utf-8' codec can't decode byte 0xff"):
        read_fleet(tmp_path / "fleet.toml")


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory; name a file of TOML"):
        read_fleet(tmp_path)


def test_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read_fleet(tmp_path / "fleet.toml")
