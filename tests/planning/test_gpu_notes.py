"""What a card changes beside its own figures: the 4-bit product in RAM, contexts on other cards, bfloat16 before Ampere."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.records import Machine, Plan
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.machine.probe import probe
from harness.planning.calibration import default
from tests.planning.test_cost import case, planner

BARE = replace(profile([], ram=64 * GIB), cores=2)
CARD = replace(profile(["RTX 4090"], ram=64 * GIB), cores=2)


def speed(machine: Machine, of: str = "int4/cpu") -> float:
    estimate = planner(machine=machine).plan(case(of)).estimate
    assert estimate is not None
    return estimate.decode_tok_s.best


@pytest.mark.parametrize("precision", ["int4", "fp4", "nf4-dq"])
def test_four_bits_in_ram_are_slow_beside_a_card_and_without_the_instructions(precision: str) -> None:
    """bitsandbytes loads one library, and that for CUDA lacks the fused product: 1.5 ms a Linear became 90."""
    of = f"{precision}/cpu"
    fused, lacking, beside = (
        speed(machine, of)
        for machine in (replace(BARE, avx512_bf16=True), replace(BARE, avx512_bf16=False), replace(CARD, avx512_bf16=True))
    )
    assert lacking == beside < fused / 5
    assert speed(BARE, of) == fused, "an unknown processor is taken to have them, and the plan says so"


@pytest.mark.parametrize("of", ["bf16/cpu", "int8/cpu"])
def test_nothing_else_in_ram_depends_on_it(of: str) -> None:
    assert speed(replace(BARE, avx512_bf16=True), of) == speed(replace(BARE, avx512_bf16=False), of)


@pytest.mark.parametrize(
    ("machine", "of", "said"),
    [
        (replace(BARE, avx512_bf16=True), "int4/cpu", "multiplied as they are: the processor has AVX512_BF16"),
        (replace(BARE, avx512_bf16=False), "int4/cpu", "unpacked for every token: this processor lacks"),
        (CARD, "int4/cpu", "unpacked for every token: beside a GPU bitsandbytes loads its CUDA library"),
        (BARE, "int4/cpu", "without AVX512_BF16 it is tens of times slower"),
        (profile(["T4"], ram=64 * GIB), "bf16/direct", "bfloat16 is emulated on the Tesla T4, compute capability 7.5"),
    ],
)
def test_the_plan_says_which_it_is(machine: Machine, of: str, said: str) -> None:
    planning = planner(machine=machine)
    (note,) = planning.notes(planning.plan(case(of)))
    assert said in note


@pytest.mark.parametrize("of", ["bf16/direct", "int4/direct", "bf16/cpu"])
def test_where_there_is_nothing_to_say_it_says_nothing(of: str) -> None:
    planning = planner(machine=CARD)
    assert planning.notes(planning.plan(case(of))) == []
    turing = planner(machine=profile(["T4"], ram=64 * GIB))
    assert turing.notes(turing.plan(case("fp16/direct"))) == []


@pytest.mark.parametrize(("flags", "has"), [("fpu avx512f avx512_bf16", True), ("fpu avx2", False), (None, None)])
def test_the_processor_is_asked(tmp_path: Path, flags: str | None, has: bool | None) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Some CPU\n" + (f"flags\t\t: {flags}\n" if flags else ""))
    assert probe(root=tmp_path).avx512_bf16 is has


def overheads(plan: Plan) -> dict[str, int]:
    assert plan.estimate is not None
    return {name: tier.overhead_bytes for name, tier in plan.estimate.tiers.items() if name.startswith("gpu")}


def test_auto_begins_on_every_card_it_sees() -> None:
    """accelerate makes a tensor on each GPU before it asks what is free (utils/modeling.py, get_max_memory)."""
    context = int(default()["gpu_context_bytes"].best)
    cards = profile(["RTX 4090"] * 3, ram=64 * GIB)
    planning = planner(machine=cards)
    sequential = overheads(planning.plan(case("bf16/sequential")))
    assert list(sequential) == ["gpu:0", "gpu:1", "gpu:2"]
    assert sequential["gpu:2"] == context
    assert list(overheads(planning.plan(case("bf16/direct")))) == ["gpu:0"]


def test_under_a_limit_it_is_told_what_is_free_and_begins_nowhere_else() -> None:
    cards = profile(["RTX 4090"] * 3, ram=64 * GIB)
    tiers = tuple(replace(tier, limit_bytes=16 * GIB) if tier.kind == "gpu" else tier for tier in cards.tiers)
    assert list(overheads(planner(machine=replace(cards, tiers=tiers)).plan(case("bf16/sequential")))) == ["gpu:0"]
