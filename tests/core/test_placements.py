"""The table of placements: consistent with itself and with the planner."""

from __future__ import annotations

import pytest

from harness.core.placements import PLACEMENTS, Placement
from harness.planning.device_map.max_memory import LIMITS

ROWS = pytest.mark.parametrize("row", PLACEMENTS.values(), ids=PLACEMENTS)


def test_names_are_keys() -> None:
    assert [row.name for row in PLACEMENTS.values()] == list(PLACEMENTS)


@ROWS
def test_every_row_can_be_chosen_by_its_help(row: Placement) -> None:
    assert row.title
    assert row.help


@ROWS
def test_tiers_come_fastest_first(row: Placement) -> None:
    assert row.devices
    assert [kind for kind in ("gpu", "cpu", "disk") if kind in row.devices] == list(row.devices)


@ROWS
def test_what_needs_a_gpu_uses_it(row: Placement) -> None:
    assert not row.needs_gpu or row.devices[0] == "gpu"


@ROWS
def test_what_must_spill_has_a_rule_for_how_much(row: Placement) -> None:
    assert ("offloads_to_cpu" in row.traits) == (row.limits is not None)
    assert row.limits is None or row.limits in LIMITS


@ROWS
def test_what_is_meant_for_the_disk_has_a_folder_there(row: Placement) -> None:
    if row.offload_folder:
        assert "disk" in row.devices
    if row.limits and row.devices[-1] == "disk":
        assert row.offload_folder


def test_no_rule_of_the_planner_stands_idle() -> None:
    assert {row.limits for row in PLACEMENTS.values()} - {None} == set(LIMITS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("direct", {"device_map": {"": 0}}),
        ("ram-to-gpu", {"device_map": {"": "cpu"}}),
        ("auto", {"device_map": "auto"}),
        ("dispatch", {"device_map": "auto", "offload_folder": "offload"}),
        ("gpu+cpu", {"device_map": "auto"}),
        ("disk", {"device_map": "auto", "offload_folder": "offload"}),
        ("cpu", {"device_map": {"": "cpu"}}),
    ],
)
def test_the_loader_s_arguments(name: str, arguments: dict[str, object]) -> None:
    assert PLACEMENTS[name].arguments() == arguments


def test_the_table_survives_what_a_caller_does_with_the_arguments() -> None:
    PLACEMENTS["cpu"].arguments()["device_map"]["lm_head"] = "disk"
    assert PLACEMENTS["cpu"].arguments() == {"device_map": {"": "cpu"}}
