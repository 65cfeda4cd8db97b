"""Machines that are not here: processors by name, RAM and disks by kind, and what is assumed of the rest."""

from __future__ import annotations

import pytest

from harness.core.records import Machine
from harness.core.units import GIB
from harness.machine.described.machine import assemble
from harness.machine.described.memory import parse_disk, parse_ram, ram_speed
from harness.machine.described.processors import Processor, find_processor, known_processor, processor_table, usual_host


def speeds(machine: Machine) -> dict[str, float | None]:
    return {tier.kind: tier.bytes_per_s for tier in machine.tiers}


def test_the_table_holds_what_it_must() -> None:
    assert len(processor_table()) > 90
    for one in processor_table():
        assert 2e9 < one.clocks_per_s < 1e10, one
        assert one.memory
        assert all(kind.startswith(("DDR", "LPDDR")) for kind in one.memory), one
        assert one.design.origin


@pytest.mark.parametrize("one", processor_table(), ids=lambda one: one.name)
def test_every_processor_is_found_by_its_name(one: Processor) -> None:
    """As it is sold, in any case, and among the words that a kernel puts around it."""
    assert find_processor(one.name) == one
    assert find_processor(one.name.lower()) == one
    maker = "AMD" if one.name.startswith(("Ryzen", "EPYC")) else "Intel(R)"
    assert known_processor(f"{maker} {one.name} {one.cores}-Core Processor @ 2.50GHz") == one


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD Ryzen 5 5600X 6-Core Processor", "Ryzen 5 5600X"),
        ("AMD Ryzen 7 5800X3D 8-Core Processor", "Ryzen 7 5800X3D"),
        ("12th Gen Intel(R) Core(TM) i5-12400F", "Core i5-12400"),
        ("Intel(R) Core(TM) i9-9900KF CPU @ 3.60GHz", "Core i9-9900K"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "Xeon E5-2680 v4"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Xeon Platinum 8480+"),
        ("AMD EPYC 7742 64-Core Processor", "EPYC 7742"),
        ("Intel(R) Xeon(R) Processor", None),  # a virtual machine tells no more
        ("AMD Ryzen 3 1200 Quad-Core Processor", None),
        (None, None),
    ],
)
def test_what_a_kernel_calls_a_processor(model: str | None, name: str | None) -> None:
    found = known_processor(model)
    assert (found.name if found else None) == name


def test_a_card_of_a_data_center_stands_beside_the_processor_that_its_maker_sells_it_with() -> None:
    hosts = {card: usual_host(card) for card in ("A100 SXM4 80 GB", "NVIDIA H20", "GeForce RTX 3060 12 GB", None)}
    assert {card: host.name if host else None for card, host in hosts.items()} == {
        "A100 SXM4 80 GB": "EPYC 7742",
        "NVIDIA H20": "Xeon Platinum 8480C",
        "GeForce RTX 3060 12 GB": None,
        None: None,
    }


@pytest.mark.parametrize(
    ("text", "size", "carried"),
    [
        ("32GiB DDR4-3200 x2", 32, 51.2e9),
        ("32GiB ddr4-3200 x1", 32, 25.6e9),
        ("2x16GiB DDR4-3200", 32, 51.2e9),
        ("32GiB DDR5-5600 2 channels", 32, 89.6e9),
        ("4x16GiB DDR4-3600", 64, 57.6e9),  # four modules in the usual two channels
        ("128GiB LPDDR5X-8000 x4", 128, 256e9),
        ("32GiB DDR3", 32, 25.6e9),
        ("32GiB", 32, None),
        ("2x16GiB", 32, None),
    ],
)
def test_ram_carries_eight_bytes_a_transfer_and_channel(text: str, size: int, carried: float | None) -> None:
    """JEDEC: DDR4-3200 is PC4-25600, of 25.6 GB/s a channel."""
    ram = parse_ram(text)
    speed, _ = ram_speed(ram, None)
    assert ram.size == size * GIB
    assert speed == (pytest.approx(carried * 0.8) if carried else None)


@pytest.mark.parametrize(
    ("text", "free", "kind"),
    [
        ("100GiB", 100, None),
        ("nvme", None, "nvme"),
        ("nvme 100GiB", 100, "nvme"),
        ("100 GiB SATA", 100, "sata"),
        ("hdd 1TiB", 1024, "hdd"),
    ],
)
def test_a_disk_is_a_size_or_a_kind_or_both(text: str, free: int | None, kind: str | None) -> None:
    disk = parse_disk(text)
    assert (disk.free, disk.kind) == (None if free is None else free * GIB, kind)


def test_what_nobody_named_is_assumed_and_said() -> None:
    cpu = find_processor("i5-12400F")
    machine = assemble(["RTX 3060 12GB"], cpu, parse_ram("32GiB"), parse_disk("nvme 500GB"))
    assert machine.assumed == (
        "DDR5-4800 in 2 channels, the most that Core i5-12400 takes",
        "an NVMe drive on PCIe 3 x4, 3.5 GB/s",
    )
    assert (machine.cpu, machine.cores, machine.avx512_bf16) == ("Core i5-12400", 6, False)
    assert speeds(machine) == {"gpu": 360e9, "cpu": pytest.approx(61.44e9), "disk": 3.5e9}
    older = assemble([], cpu, parse_ram("32GiB DDR4"), None)
    assert older.assumed == ("DDR4-3200 in 2 channels, the most that Core i5-12400 takes",)


def test_what_is_named_in_full_assumes_nothing() -> None:
    machine = assemble([], None, parse_ram("32GiB DDR4-2666 x1"), None)
    assert machine.assumed == ()
    assert speeds(machine)["cpu"] == pytest.approx(2666e6 * 8 * 0.8)


def test_sizes_alone_leave_the_speeds_unknown() -> None:
    machine = assemble(["8GiB"], None, parse_ram("16GiB"), parse_disk("1TB"))
    assert speeds(machine) == {"gpu": None, "cpu": None, "disk": None}
    assert machine.assumed == ()


def test_the_host_of_a_card_of_a_data_center_is_assumed_until_it_is_named() -> None:
    assert assemble(["A100 80GB"]).assumed == ("the processor EPYC 7742, which its maker sells this card with",)
    assert assemble(["A100 80GB"], find_processor("EPYC 7763")).assumed == ()
