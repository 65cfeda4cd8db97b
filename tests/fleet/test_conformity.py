"""Whether a machine is of its class and has the versions agreed on; what tells one machine from another."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.records import Machine, Tier
from harness.core.units import GIB
from harness.fleet import conformity
from harness.machine import gpus
from tests.support import builders
from tests.support.fleets import machine_class


def with_card(model: str, total_bytes: int, ram_bytes: int = 16 * GIB) -> Machine:
    card = Tier(name="gpu:0", kind="gpu", total_bytes=total_bytes, free_bytes=total_bytes, model=model)
    return builders.machine(card, ram_bytes=ram_bytes)


def test_every_card_of_the_table_is_itself_by_the_name_that_the_class_gives_it() -> None:
    """As the driver names it, with the total that it shows: so a class may be written with any card's short name."""
    for gpu in gpus.gpu_table():
        asked = gpus.profile([gpu.short_name], 16 * GIB).gpus[0]
        if not asked.shared:
            found = with_card(str(asked.model), int(asked.total_bytes or 0))
            assert conformity.not_of_class(machine_class(gpus=(gpu.short_name,)), found) is None, gpu.name


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (with_card("NVIDIA GeForce RTX 3060", int(11.8 * GIB)), None),
        (with_card("NVIDIA GeForce RTX 3060", int(11.8 * GIB), ram_bytes=int(15.5 * GIB)), None),
        (with_card("NVIDIA GeForce RTX 3060", 8 * GIB), "gpu:0 is NVIDIA GeForce RTX 3060 of 8.00 GiB"),
        (with_card("NVIDIA GeForce RTX 3060 Laptop GPU", 6 * GIB), "gpu:0 is NVIDIA GeForce RTX 3060 Laptop GPU of 6.00 GiB"),
        (with_card("NVIDIA GeForce RTX 3060 Ti", 8 * GIB), "of class card GeForce RTX 3060 12 GB"),
        (with_card("NVIDIA GeForce RTX 3060", 12 * GIB, ram_bytes=64 * GIB), "has 64.0 GiB of RAM, and class card 16.0 GiB"),
        (with_card("NVIDIA GeForce RTX 4070", 12 * GIB), "gpu:0 is NVIDIA GeForce RTX 4070 of 12.0 GiB, and of class card"),
        (builders.machine(), "has 0 GPUs, and class card 1"),
        (replace(builders.machine(), gpu_problem="torch is for the CPU only"), "has 0 GPUs (torch is for the CPU only)"),
    ],
)
def test_a_machine_is_held_against_its_class(found: Machine, said: str | None) -> None:
    why = conformity.not_of_class(machine_class("card", gpus=("RTX 3060 12GB",)), found)
    assert why is None if said is None else said in (why or "")


def test_a_part_of_a_card_is_not_the_card() -> None:
    kind = machine_class(gpus=("A100 SXM 40GB",))
    assert conformity.not_of_class(kind, with_card("NVIDIA A100-SXM4-40GB", int(39.4 * GIB))) is None
    part = with_card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", int(19.5 * GIB))
    assert "gpu:0 is NVIDIA A100-SXM4-40GB MIG 3g.20gb of 19.5 GiB" in (conformity.not_of_class(kind, part) or "")


def test_a_class_by_size_takes_any_card_of_about_that_size() -> None:
    kind = machine_class(gpus=("8GiB",))
    assert conformity.not_of_class(kind, with_card("Whatever", int(7.8 * GIB))) is None
    assert "of class small 8GiB" in (conformity.not_of_class(kind, with_card("Whatever", 12 * GIB)) or "")


def test_a_card_without_memory_of_its_own_is_known_by_its_name_alone() -> None:
    """Its total is the part of the RAM that firmware gives it, which differs from machine to machine."""
    shared = [gpu for gpu in gpus.gpu_table() if gpus.profile([gpu.short_name], 16 * GIB).gpus[0].shared]
    assert shared
    for gpu in shared:
        asked = gpus.profile([gpu.short_name], 16 * GIB).gpus[0]
        found = replace(with_card(str(asked.model), 2 * GIB).gpus[0], shared=True)
        assert conformity.not_of_class(machine_class(gpus=(gpu.short_name,)), builders.machine(found)) is None, gpu.name


def test_a_build_for_a_device_is_the_same_version() -> None:
    assert conformity.other_version({"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu128"}) is None
    assert conformity.other_version({"torch": "2.13.0"}, {"torch": "2.13.1"}) == "torch is 2.13.1, and the contract says 2.13.0"


def test_clocks_may_differ_by_minutes_and_not_by_hours() -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    made = "2026-11-24T08:00:00Z"
    assert conformity.wrong_time("2026-11-24T07:58:00Z", made, now) is None
    assert "before the contract" in (conformity.wrong_time("2026-11-24T07:00:00Z", made, now) or "")
    assert conformity.wrong_time("2026-11-24T12:03:00Z", made, now) is None
    assert "in the future" in (conformity.wrong_time("2026-11-24T13:00:00Z", made, now) or "")
    assert "is no moment" in (conformity.wrong_time("yesterday", made, now) or "")


def test_a_machine_is_itself_within_a_contract_and_nobody_in_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = conformity.machine_identity("a")
    assert one == conformity.machine_identity("a") != conformity.machine_identity("b")
    for text in ("1234\n", "5678\n"):
        (tmp_path / "id").write_text(text, encoding="ascii")
        monkeypatch.setattr(conformity, "_MACHINE_ID", tmp_path / "id")
        assert conformity.machine_identity("a") != one
        one = conformity.machine_identity("a")
    monkeypatch.setattr(conformity, "_MACHINE_ID", tmp_path / "none")
    for node in (1, 2):
        monkeypatch.setattr(uuid, "getnode", lambda node=node: node)
        assert conformity.machine_identity("a") == conformity.machine_identity("a") != one
        one = conformity.machine_identity("a")


def test_a_node_is_of_a_class_by_its_labels() -> None:
    kind = machine_class(labels={"card": ("A100", "H100"), "rack": ("7",)})
    assert conformity.other_label(kind, {"card": "H100", "rack": "7", "more": "x"}) is None
    assert conformity.other_label(kind, {"card": "T4"}) == "its label card is 'T4', and class small asks for 'A100' or 'H100'"
    assert conformity.other_label(kind, {"card": "A100"}) == "its label rack is missing, and class small asks for '7'"
