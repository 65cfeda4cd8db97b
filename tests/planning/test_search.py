"""The search for the best ways: nothing that an exhaustive one over the same cost model finds is missed, and each is one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.attention import KV_FORMS
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Machine, Plan, Verdict, Workload
from harness.machine.gpus import profile
from harness.planning.choice.nearest import nearest_way
from harness.planning.choice.recommend import advise_best, choose_best, least_quality
from harness.planning.choice.search import Searched, best_way, search
from harness.planning.planner import Planner
from harness.planning.quality import quality_kept
from tests.support.every_way import PAIRS as EVERY_PAIR
from tests.support.every_way import Pair, answered, held

GIB = 1 << 30
PAIRS = [
    ("smollm2-135m-instruct", (), 8, Workload()),
    ("qwen2.5-7b-instruct", ("RTX 3060 12GB",), 32, Workload(prompt_tokens=8192)),
    ("qwen2.5-14b-instruct", ("RTX 3060 12GB",), 32, Workload(prompt_tokens=16000)),
    ("llama-3.1-8b-instruct", ("RTX 4090",), 64, Workload(prompt_tokens=32000)),
    ("qwen3-30b-a3b", ("RTX 4090",), 64, Workload()),
    ("gemma-2-9b-it", ("RTX 4060 Ti 16GB", "RTX 3060 12GB"), 64, Workload(prompt_tokens=4000)),
    ("gpt-oss-20b", ("RTX 4060 Ti 16GB",), 32, Workload()),
]


def planner_for(model: str, cards: tuple[str, ...], ram: int) -> Planner:
    return Planner(read_spec(resolve.resolve(model)), profile(list(cards), ram=ram * GIB), here=False)


def everything(planner: Planner, workload: Workload) -> list[Plan]:
    """Plan every precision, placement and KV cache that there is."""
    places = distinct(PLACEMENTS, len(planner.machine.gpus))
    ways = itertools.product(PRECISIONS, places, KV_FORMS)
    plans = [
        planner.plan(Case(model=planner.spec.name, precision=precision, placement=placement, workload=workload, kv=kv))
        for precision, placement, kv in ways
    ]
    return [one for one in plans if one.verdict.is_good]


def speed(one: Plan) -> float:
    assert one.estimate is not None
    return one.estimate.decode_tok_s.best


@pytest.mark.parametrize(("model", "cards", "ram", "workload"), PAIRS, ids=lambda value: str(value)[:40])
def test_nothing_that_exists_is_more_than_a_little_better(model: str, cards: tuple[str, ...], ram: int, workload: Workload) -> None:
    planner = planner_for(model, cards, ram)
    found, there = search(planner, workload), everything(planner, workload)
    ways = [one for one in found.plans if one.case.id in found.contexts]
    assert bool(ways) == bool(there)
    for one in there:
        context = planner.max_context(one) or 0
        assert any(
            speed(way) >= 0.95 * speed(one)
            and quality_kept(way) >= quality_kept(one)
            and found.contexts[way.case.id] >= 0.9 * context
            for way in ways
        ), one.case.id


@pytest.mark.parametrize(("model", "cards", "ram", "workload"), PAIRS, ids=lambda value: str(value)[:40])
def test_each_way_is_better_than_any_other_in_something(model: str, cards: tuple[str, ...], ram: int, workload: Workload) -> None:
    found = search(planner_for(model, cards, ram), workload)
    ways = [one for one in found.plans if one.case.id in found.contexts]
    for one, other in itertools.permutations(ways, 2):
        assert (
            speed(one) > speed(other)
            or quality_kept(one) > quality_kept(other)
            or found.contexts[one.case.id] > found.contexts[other.case.id]
        )


def searched(least_tok_s: float) -> Searched:
    return search(planner_for("llama-2-7b-chat-hf", ("8GiB",), 16), Workload(), least_tok_s)


def test_what_a_machine_without_a_gpu_lacks_is_no_gpu_where_a_package_is() -> None:
    planner = planner_for("smollm2-135m-instruct", (), 8)
    told = {one.case.precision: str(one.why) for one in search(planner, Workload()).plans}
    assert "GPU" in told.pop("fp8")
    assert not any("no NVIDIA GPU" in why for why in told.values())


def test_what_is_too_slow_is_no_way_and_says_so() -> None:
    any_speed, fast = searched(0.0), searched(30.0)
    assert {one.case.precision for one in fast.plans if one.case.id in fast.contexts} == {"int4"}
    assert "bf16" in {one.case.precision for one in any_speed.plans if one.case.id in any_speed.contexts}
    slow = next(one for one in fast.plans if one.case.precision == "int8")
    assert slow.verdict is Verdict.TOO_BIG
    assert str(slow.why).startswith("too slow: 15 tokens/s, and at least 30")


def test_every_precision_that_does_not_work_says_what_binds_it() -> None:
    planner = planner_for("llama-2-7b-chat-hf", ("8GiB",), 16)
    working = {one.case.precision for one in everything(planner, Workload())}
    found = search(planner, Workload())
    failing = [one for one in found.plans if one.case.id not in found.contexts]
    assert {one.case.precision for one in failing} == {
        name for name, row in PRECISIONS.items() if row.requires_checkpoint is None and name not in working
    }
    assert all(one.why for one in failing)


@pytest.mark.parametrize("pair", [EVERY_PAIR[number] for number in (1, 8, 9, 18, 29)], ids=lambda pair: str(pair.named))
def test_the_winner_is_as_fast_as_any_way_that_keeps_as_much(pair: Pair) -> None:
    """Five of the pairs of `tests/bench/bench_search.py`."""
    found = held(pair)
    assert found.searched is not None
    assert found.share >= 0.95
    assert found.lost_to_auto <= 1 / 0.95
    assert found.usual is not None
    assert found.usual.case == found.searched.case


def test_plain_plan_answers_where_only_another_attention_fits() -> None:
    """No usual way of gpt-oss fits 16 GB with 32,768 tokens; flash attention does, and `plan` and `--best` both say so."""
    (pair,) = [one for one in EVERY_PAIR if one.model == "gpt-oss-20b" and one.workload.prompt_tokens > 30_000]
    found = answered(pair)
    assert found is not None
    assert found.case.attention == "flash_attention_2"
    searched = advise_best(resolve.resolve(pair.model), pair.planner(), pair.workload).best
    assert searched is not None
    assert found.case == searched.case


def with_bandwidths(cards: list[str], **bytes_per_s: float) -> Machine:
    """A described machine whose tiers are as fast as given, by tier: `gpu_0` is gpu:0."""
    machine = profile(cards, ram=64 * GIB)
    speeds = {name.replace("_", ":"): speed for name, speed in bytes_per_s.items()}
    tiers = tuple(replace(tier, bytes_per_s=speeds.get(tier.name, tier.bytes_per_s)) for tier in machine.tiers)
    return replace(machine, tiers=tiers)


def choose(plans: Sequence[Plan]) -> Plan | None:
    chosen = choose_best(plans)
    return chosen[0] if chosen else None


@pytest.mark.parametrize(
    ("machine", "tiers"),
    [
        (with_bandwidths(["RTX 4090"], gpu_0=5e9, cpu=200e9), {"cpu"}),
        (with_bandwidths(["RTX 4060 Ti 16GB", "RTX 4090"], gpu_0=2e12, gpu_1=50e9), {"gpu:0"}),
    ],
    ids=["RAM is faster than the card", "the smaller card is the faster one"],
)
def test_what_fits_a_card_may_be_faster_elsewhere_and_the_plain_answer_sees_it(machine: Machine, tiers: set[str]) -> None:
    planner = Planner(read_spec(resolve.resolve("smollm2-1.7b-instruct")), machine, here=False)
    plain, searched = best_way(planner, Workload(), choose, least_quality), search(planner, Workload(), choose=choose).best
    assert plain is not None
    assert searched is not None
    assert plain.case == searched.case
    assert plain.estimate is not None
    assert {name for name, tier in plain.estimate.tiers.items() if tier.weights_bytes} == tiers


@pytest.mark.parametrize(("model", "cards", "ram", "workload"), PAIRS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_chosen_is_not_planned_and_the_answer_is_the_same(
    model: str, cards: tuple[str, ...], ram: int, workload: Workload
) -> None:
    pruned, whole = planner_for(model, cards, ram), planner_for(model, cards, ram)
    found, there = best_way(pruned, workload, choose, least_quality), best_way(whole, workload, choose, lambda _: 0.0)
    assert found is not None
    assert found == there
    assert pruned.footprints.keys() <= whole.footprints.keys()


def test_a_fast_model_asks_for_no_precision_that_keeps_less() -> None:
    pruned, whole = planner_for("smollm2-135m-instruct", ("RTX 4090",), 32), planner_for("smollm2-135m-instruct", ("RTX 4090",), 32)
    best_way(pruned, Workload(), choose, least_quality)
    best_way(whole, Workload(), choose, lambda _: 0.0)
    left_out = {name.split("/")[1] for name in whole.footprints.keys() - pruned.footprints.keys()}
    assert {"fp4", "nf4-dq", "int4"} <= left_out


def test_for_more_tokens_than_a_model_knows_nothing_is_searched() -> None:
    workload, large = Workload(prompt_tokens=8192), planner_for("llama-7b", ("H200 SXM",), 512)
    assert everything(large, workload) == []
    asked = planner_for("llama-7b", ("RTX 3060 12GB",), 32)
    plans = asked.plans([Case(model=asked.spec.name, precision="int8", placement="direct", workload=workload)])
    known = {*asked.footprints}
    assert best_way(asked, workload, choose, least_quality) is None
    assert nearest_way(asked, plans, choose_best) is None
    assert asked.footprints.keys() == known
