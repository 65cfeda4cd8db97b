"""What is known of a machine's parts decides speeds: the host's core, kind and channels of the RAM, kind of the disk."""

from __future__ import annotations

import pytest

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.records import Case, Machine, Span, Workload
from harness.machine.described.machine import assemble
from harness.machine.described.memory import parse_disk, parse_ram
from harness.machine.described.processors import find_processor
from harness.planning.cost.rates import joined
from harness.planning.planner import Planner

UNNAMED = assemble(["RTX 3060 12GB"], None, parse_ram("64GiB"), parse_disk("500GB"))
NAMED = assemble(["RTX 3060 12GB"], find_processor("Ryzen 5 5600"), parse_ram("64GiB DDR4-3200 x2"), parse_disk("nvme 500GB"))


def speed(model: str, machine: Machine, placement: str, prompt: int = 64) -> Span:
    planner = Planner(read_spec(resolve.resolve(model)), machine, here=False)
    one = planner.plan(Case(model=model, precision="bf16", placement=placement, workload=Workload(prompt_tokens=prompt)))
    assert one.estimate is not None
    return one.estimate.decode_tok_s


def width(found: Span) -> float:
    return found.high / found.low


# What is on the disk comes from the page cache at best and from the disk at worst, which is 16 times slower here.
@pytest.mark.parametrize(("placement", "narrower", "at_most"), [("cpu", 2, 4), ("disk", 10, 18)])
def test_parts_that_are_named_narrow_what_is_read_from_them(placement: str, narrower: float, at_most: float) -> None:
    named, unnamed = (width(speed("qwen2.5-14b-instruct", machine, placement)) for machine in (NAMED, UNNAMED))
    assert named < at_most
    assert named * narrower < unnamed


def test_a_small_model_on_a_gpu_is_as_fast_as_the_core_that_starts_its_operations() -> None:
    found = [
        speed("qwen2.5-0.5b-instruct", assemble(["RTX 4090"], find_processor(name)), "direct")
        for name in ("EPYC 7742", "Ryzen 9 9950X")
    ]
    clocks = [find_processor(name).clocks_per_s for name in ("EPYC 7742", "Ryzen 9 9950X")]
    assert found[1].best / found[0].best == pytest.approx(clocks[1] / clocks[0], rel=0.01)
    assert all(width(one) < 1.6 for one in found)


def test_many_tokens_before_a_token_take_time_of_their_own_on_a_gpu() -> None:
    card = assemble(["A100 80GB"])
    short, long = (speed("qwen2.5-14b-instruct", card, "direct", prompt) for prompt in (1000, 30000))
    assert long.best < short.best / 2


def test_what_independent_constants_are_off_by_adds_up_in_squares() -> None:
    assert joined(10, 2, 2) == pytest.approx(10 * 2 ** (2**0.5))
    assert joined(10, 0.5, 0.5) == pytest.approx(10 / 2 ** (2**0.5))
    assert joined(10, 3, 1) == pytest.approx(30)
    assert joined(10) == 10
