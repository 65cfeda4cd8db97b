"""Precision and placement are looked up in what was loaded, not believed."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Estimate, Loaded, Plan, Span, TierEstimate, Verdict
from harness.core.units import GIB, MIB
from harness.measure.verify import OK, checks
from tests.support.builders import case, loaded

EVERYTHING_RIGHT = {"precision": OK, "max_memory": OK, "placement": OK}


def planned(precision: str = "bf16", placement: str = "cpu", **max_memory: int) -> Plan:
    """A plan; gpu=5 allows 5 bytes on gpu:0."""
    limits = {"gpu:0" if tier == "gpu" else tier: size for tier, size in max_memory.items()}
    return Plan(case=case(precision, placement), verdict=Verdict.UNKNOWN, max_memory=limits or None)


def failing(plan: Plan, found: Loaded) -> dict[str, str]:
    return {name: said for name, said in checks(plan, found).items() if said != OK}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_that_took_effect_is_ok(precision: str) -> None:
    assert checks(planned(precision), loaded({PRECISIONS[precision].linear_dtype: GIB})) == EVERYTHING_RIGHT


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_that_did_not_take_effect_is_told_with_what_was_found(precision: str) -> None:
    said = failing(planned(precision), loaded({"float64": GIB}))
    assert said.keys() == {"precision"}
    assert (
        f"{precision} did not take effect: 0.0 % of the Linear weights are {PRECISIONS[precision].linear_dtype}"
        in said["precision"]
    )
    assert "(float64 1.00 GiB)" in said["precision"]


def test_int4_that_stayed_16_bit_in_part() -> None:
    said = failing(planned("int4"), loaded({"nf4": 512 * MIB, "bfloat16": 512 * MIB}))
    expected = "int4 did not take effect: 50.0 % of the Linear weights are nf4 (bfloat16 512 MiB, nf4 512 MiB)"
    assert said == {"precision": expected}


def test_a_module_kept_in_32_bits_is_let_pass() -> None:
    assert failing(planned("bf16"), loaded({"bfloat16": 995, "float32": 5})) == {}


def test_a_model_without_linear_modules_has_nothing_to_check() -> None:
    assert failing(planned("int4"), loaded({})) == {}


def test_more_than_max_memory_allows() -> None:
    found = loaded(tiers={"gpu:0": 3 * GIB, "cpu": GIB})
    said = failing(planned("bf16", "gpu+cpu", gpu=2 * GIB, cpu=4 * GIB), found)
    assert said == {"max_memory": "gpu:0 holds 3.00 GiB of weights, and max_memory allows 2.00 GiB"}


@pytest.mark.parametrize("used", [0, GIB, GIB + GIB // 200])
def test_up_to_max_memory_and_a_little_slack_for_buffers(used: int) -> None:
    assert failing(planned("bf16", "gpu+cpu", gpu=GIB, cpu=GIB), loaded(tiers={"gpu:0": used, "cpu": GIB})) == {}


def test_max_memory_allows_nothing_on_a_card_that_it_does_not_name() -> None:
    said = failing(planned("bf16", "gpu+cpu", gpu=GIB, cpu=GIB), loaded(tiers={"gpu:1": GIB, "cpu": GIB}))
    assert said == {"max_memory": "gpu:1 holds 1.00 GiB of weights, and max_memory allows 0 bytes"}


def test_max_memory_of_a_tier_that_was_not_used() -> None:
    assert failing(planned("bf16", "disk", cpu=GIB), loaded(tiers={"disk": GIB})) == {}


@pytest.mark.parametrize(
    ("placement", "tiers"),
    [
        ("direct", {"gpu:0": 5}),
        ("ram-to-gpu", {"gpu:0": 5}),
        ("auto", {"gpu:0": 5, "gpu:1": 5, "cpu": 5, "disk": 5}),
        ("auto", {"cpu": 5}),
        ("dispatch", {"cpu": 5, "disk": 5}),
        ("gpu+cpu", {"gpu:0": 5, "cpu": 5}),
        ("gpu+cpu", {"cpu": 5}),
        ("disk", {"gpu:0": 5, "cpu": 5, "disk": 5}),
        ("disk", {"cpu": 5, "disk": 5}),
        ("cpu", {"cpu": 5}),
        ("cpu", {"cpu": 5, "gpu:0": 0}),
    ],
)
def test_weights_where_they_belong(placement: str, tiers: dict[str, int]) -> None:
    assert failing(planned("bf16", placement), loaded(tiers=tiers)) == {}


@pytest.mark.parametrize(
    ("placement", "tiers", "said"),
    [
        ("direct", {"gpu:0": 5, "cpu": 1}, "weights lie on cpu, which direct does not use"),
        ("direct", {"cpu": 5}, "weights lie on cpu, which direct does not use"),
        ("ram-to-gpu", {"cpu": 5}, "weights lie on cpu, which ram-to-gpu does not use"),
        ("cpu", {"gpu:1": 5}, "weights lie on gpu, which cpu does not use"),
        ("cpu", {"cpu": 1, "disk": 1, "gpu:0": 1}, "weights lie on disk, gpu, which cpu does not use"),
        ("auto", {"meta": 5}, "weights lie on meta, which auto does not use"),
        ("gpu+cpu", {"gpu:0": 5}, "gpu+cpu put nothing on the cpu"),
        ("disk", {"gpu:0": 5, "cpu": 5}, "disk put nothing on the disk"),
        ("disk", {"cpu": 5, "disk": 0}, "disk put nothing on the disk"),
    ],
)
def test_weights_where_they_do_not_belong(placement: str, tiers: dict[str, int], said: str) -> None:
    assert failing(planned("bf16", placement), loaded(tiers=tiers)) == {"placement": said}


@pytest.mark.parametrize(
    ("planned_on", "found", "said"),
    [
        ("gpu:0", {"gpu:0": 5}, OK),
        ("gpu:0", {"gpu:1": 5, "cpu": 5}, OK),  # which card transformers begins with is its own affair
        ("gpu:0", {"cpu": 5}, "weights lie on cpu, and were planned on gpu"),
        ("gpu:0", {"cpu": 5, "disk": 5, "gpu:0": 0}, "weights lie on cpu, disk, and were planned on gpu"),
        ("cpu", {"cpu": 5, "disk": 5}, OK),
        ("cpu", {"gpu:0": 5}, "weights lie on gpu, and were planned on cpu"),
    ],
)
def test_what_was_planned_on_a_gpu_lies_on_one_and_nothing_else_does(planned_on: str, found: dict[str, int], said: str) -> None:
    """Without a card that torch can use, auto and dispatch go on in the RAM and say nothing."""
    for placement in ("auto", "dispatch"):
        plan = replace(planned("bf16", placement), estimate=shared(planned_on).estimate)
        assert checks(plan, loaded(tiers=found))["placement"] == said


@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu"])
def test_a_placement_that_names_its_card_uses_no_other(placement: str) -> None:
    plan = replace(planned("bf16", placement), estimate=shared("gpu:1").estimate)
    assert checks(plan, loaded(tiers={"gpu:1": 5}))["placement"] == OK
    said = "weights lie on gpu:0, and were planned on gpu:1"
    assert checks(plan, loaded(tiers={"gpu:0": 5}))["placement"] == said
    assert checks(plan, loaded(tiers={"gpu:0": 5, "gpu:1": 5}))["placement"].startswith("weights lie on gpu:0, gpu:1, and")


def test_every_placement_is_checked_here() -> None:
    assert {name for name in PLACEMENTS if failing(planned("bf16", name), loaded(tiers={"meta": 1}))} == set(PLACEMENTS)


def test_all_that_is_wrong_is_told_at_once() -> None:
    plan, found = planned("int8", "gpu+cpu", cpu=1), loaded({"float16": 5}, tiers={"cpu": 5, "disk": 5})
    assert failing(plan, found).keys() == {"precision", "max_memory", "placement"}


def shared(*tiers: str) -> Plan:
    """A plan of two processes that hold 1 GiB each on these tiers."""
    sizes = dict.fromkeys(TierEstimate.__struct_fields__, 0)
    each = TierEstimate(**{**sizes, "weights_bytes": 2 * GIB // len(tiers)})
    none = Span(low=0, best=0, high=0)
    estimate = Estimate(tiers=dict.fromkeys(tiers, each), load_s=none, first_token_s=none, decode_tok_s=none)
    return replace(planned(placement="tp"), estimate=estimate)


@pytest.mark.parametrize(
    ("tiers", "holds", "said"),
    [
        (("cpu",), (1.0, 1.0), OK),
        (("gpu:0", "gpu:1"), (1.0, 1.2), OK),
        (("cpu",), (1.0, 2.0), "rank 1 holds 2.00 GiB of weights, and its part is 1.00 GiB"),
        (("gpu:0", "gpu:1"), (2.0, 2.0), "rank 0 holds 2.00 GiB of weights, and its part is 1.00 GiB"),
        (("cpu",), (1.0, 0.5), "rank 1 holds 512 MiB of weights, and its part is 1.00 GiB"),
    ],
)
def test_each_of_several_processes_holds_its_part(tiers: tuple[str, ...], holds: tuple[float, float], said: str) -> None:
    sizes = [int(size * GIB) for size in holds]
    found = replace(loaded(tiers=dict(zip(tiers * 2, sizes, strict=False))), rank_bytes=sizes)
    assert checks(shared(*tiers), found)["ranks"] == said


def test_processes_that_share_the_ram_beside_gpus_are_told() -> None:
    found = replace(loaded(tiers={"cpu": 2 * GIB}), rank_bytes=[GIB, GIB])
    assert failing(shared("gpu:0", "gpu:1"), found) == {"ranks": "weights lie on cpu, and were to be shared on gpu:0, gpu:1"}
    assert failing(planned(placement="tp"), found) == {}
