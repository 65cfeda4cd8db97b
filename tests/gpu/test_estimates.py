"""What was planned against what was measured, case by case; and the map that `auto` makes of a card that is nearly full.

Not run on a card yet.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.gpu import report
from tests.gpu.contact import ROOT, Contact, ended_well
from tests.gpu.test_placements import POSSIBLE, get

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("figure", ["allocated", "process", "decode"])
@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_the_estimate_holds(contact: Contact, precision: str, placement: str, figure: str) -> None:
    """Allocated within 2 %, the process below what the verdict asks for, tokens/s inside the interval."""
    result = get(contact, precision, placement)
    row = next((one for one in report.compared(result) if one.figure == figure), None)
    if row is None:
        pytest.skip(f"not measured: {result.noisy.get('decode_tok_s', 'NVML does not see into this container')}")
    assert row.holds, f"{row.case} {figure}: measured {row.measured}, planned {row.planned}"


def test_a_power_limit_disturbs_nothing(contact: Contact) -> None:
    """It is a property of the card, and no reason to repeat a round."""
    result = get(contact, "bf16", "direct")
    assert not [why for why in result.noisy.values() if "power" in why], result.noisy


# Keeps all but FREE bytes of card 0 until its input ends.
HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info(0)
held = torch.empty(max(free - int(sys.argv[1]), 0), dtype=torch.uint8, device=0)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def nearly_full(free_bytes: int) -> Iterator[None]:
    """Leave so much free of the first card."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(free_bytes)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(30)


def test_auto_spills_as_planned_where_the_card_is_nearly_full(contact: Contact) -> None:
    """The map follows from what accelerate finds free, and the plan's from what NVML says less a context: to the byte."""
    if len(contact.machine.gpus) > 1 or contact.machine.shares_ram:
        pytest.skip("needs one card with memory of its own")
    with nearly_full(900 << 20):
        result = ended_well(contact.case("bf16", "auto", "--new-tokens", "8"))
    assert result.estimate is not None
    assert result.loaded is not None
    planned = {tier: one.weights_bytes for tier, one in result.estimate.tiers.items() if one.weights_bytes}
    assert {"gpu:0", "cpu"} <= planned.keys(), f"all of it was to fit: {planned}"
    assert {tier: size for tier, size in result.loaded.tier_bytes.items() if size} == planned
