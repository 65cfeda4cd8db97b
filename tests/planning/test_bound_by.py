"""What a token waits for, in words: the host, a tier, or unpacking, whichever decides the speed."""

from __future__ import annotations

import pytest

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.records import Case, Workload
from harness.machine.gpus import profile
from harness.planning.choice.recommend import advise
from harness.planning.planner import Planner

GIB = 1 << 30


def bound(model: str, precision: str, placement: str, cards: tuple[str, ...], ram: int) -> str:
    planner = Planner(read_spec(resolve.resolve(model)), profile(list(cards), ram=ram * GIB, disk=900 * GIB), here=False)
    one = planner.plan(Case(model=model, precision=precision, placement=placement, workload=Workload()))
    assert one.estimate is not None
    return one.estimate.bound_by


@pytest.mark.parametrize(
    ("model", "precision", "placement", "cards", "ram", "told"),
    [
        ("qwen2.5-0.5b-instruct", "bf16", "direct", ("H100 PCIe 80GB",), 64, "starting "),
        ("qwen2.5-7b-instruct", "bf16", "direct", ("RTX 4060 Ti 16GB",), 64, " GiB a token from GPU memory"),
        ("qwen2.5-14b-instruct", "bf16", "gpu+cpu", ("RTX 3060 12GB",), 64, " GiB a token from RAM over the link"),
        ("qwen2.5-14b-instruct", "bf16", "cpu", (), 64, "reads 26.1 GiB a token from RAM"),
        ("qwen2.5-32b-instruct", "bf16", "auto", (), 32, " GiB a token from disk"),
        ("qwen2.5-14b-instruct", "int4", "cpu", ("RTX 3060 12GB",), 64, "unpacks "),
    ],
)
def test_a_token_waits_for(model: str, precision: str, placement: str, cards: tuple[str, ...], ram: int, told: str) -> None:
    assert told in bound(model, precision, placement, cards, ram)


def test_what_is_slower_in_fewer_bits_says_so_and_why() -> None:
    planner = Planner(read_spec(resolve.resolve("qwen2.5-7b-instruct")), profile(["RTX 4090"], ram=64 * GIB), here=False)
    cases = [Case(model="m", precision=name, placement="direct", workload=Workload()) for name in ("bf16", "int4")]
    source = resolve.resolve("qwen2.5-7b-instruct")
    notes = " ".join(advise(source, planner, cases).notes)
    assert "int4/direct is 1." in notes
    assert " times slower than bf16/direct: starting " in notes
