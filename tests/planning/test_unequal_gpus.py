"""Two cards of different models: the same one is planned, measured and loaded by the printed code, and it is the larger."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from harness.core.placements import PLACEMENTS
from harness.core.records import Machine, Verdict
from harness.core.units import GIB
from harness.machine.accelerators import overruled_order
from harness.machine.gpus import profile
from harness.planning import feasibility
from harness.planning.code import loading_program, script
from tests.planning.test_cost import case, planner

ORDER = 'os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"'
SMALL_FIRST = profile(["GTX 1650", "RTX 4090"], ram=64 * GIB)
LARGE_FIRST = profile(["RTX 4090", "GTX 1650"], ram=64 * GIB)
ALIKE = profile(["RTX 4090", "RTX 4090"], ram=64 * GIB)
ALONE = profile(["RTX 4090"], ram=64 * GIB)


@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu", "gpu+cpu", "disk"])
def test_what_needs_one_card_takes_the_larger(placement: str) -> None:
    plan = planner(machine=SMALL_FIRST).plan(case(f"bf16/{placement}"))
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.estimate is not None
    assert [name for name in plan.estimate.tiers if name.startswith("gpu")] == ["gpu:1"]
    program = script("MODEL = 1\n\n", plan, gpus_differ=True)
    assert 'to("cuda:1")' in program
    assert {"direct": '{"": 1}', "ram-to-gpu": 'model.to("cuda:1")'}.get(placement, "max_memory={1: ") in program


@pytest.mark.parametrize("machine", [LARGE_FIRST, ALIKE, ALONE], ids=["large first", "alike", "alone"])
@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu", "gpu+cpu"])
def test_otherwise_it_is_the_first_and_its_code_is_as_it_was(machine: Machine, placement: str) -> None:
    here, alone = (planner(machine=one).plan(case(f"bf16/{placement}")).code for one in (machine, ALONE))
    assert here == alone
    assert feasibility.gate(case(f"bf16/{placement}"), machine, here=False) is None


@pytest.mark.parametrize(
    ("machine", "placement", "set_in_results", "set_in_scripts"),
    [
        (LARGE_FIRST, "direct", True, True),
        (LARGE_FIRST, "cpu", False, False),
        (SMALL_FIRST, "direct", True, True),
        (ALIKE, "direct", False, False),
        (ALONE, "direct", False, False),
        (ALONE, "cpu", False, False),
    ],
)
def test_the_order_is_set_wherever_it_decides(machine: Machine, placement: str, set_in_results: bool, set_in_scripts: bool) -> None:
    """The code of one card and of the processor stays as it was to the letter, for `--resume` compares it."""
    plan = planner(machine=machine).plan(case(f"bf16/{placement}"))
    of_result = loading_program("MODEL = 1\n\n", plan, in_order=machine.gpus_differ)
    assert (ORDER in of_result) == set_in_results
    assert (ORDER in script("MODEL = 1\n\n", plan, gpus_differ=machine.gpus_differ)) == set_in_scripts
    assert set_in_results or of_result == f"MODEL = 1\n\n{plan.code}"


def test_a_precision_is_held_against_the_card_that_is_used() -> None:
    """The first of these cards knows no fp8, and is not used."""
    refused = [feasibility.gate(case("fp8/direct"), machine, here=False) for machine in (SMALL_FIRST, profile(["GTX 1650"]))]
    assert refused[0] is None
    assert refused[1] is not None


def test_a_row_that_uses_all_cards_has_no_main_one() -> None:
    assert PLACEMENTS["auto"].on(1) is PLACEMENTS["auto"]
    assert PLACEMENTS["direct"].on(0) is PLACEMENTS["direct"]


def test_the_users_own_order_is_overruled_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    said = overruled_order(SMALL_FIRST)
    assert said is not None
    assert said.startswith("CUDA_DEVICE_ORDER=FASTEST_FIRST is overruled")
    assert "CUDA_VISIBLE_DEVICES" in said
    assert overruled_order(ALONE) is None
    assert overruled_order(replace(ALONE, tiers=ALONE.tiers[1:])) is None
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert overruled_order(SMALL_FIRST) is None
