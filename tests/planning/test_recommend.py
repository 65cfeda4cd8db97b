"""Our device map as a placement: planned with room for the worst case, printed in full, obeyed, and chosen where it is better."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers
from msgspec.structs import replace

from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS
from harness.core.records import Loaded, Machine, Plan, Span, Verdict
from harness.core.units import GIB, significant
from harness.machine.gpus import profile
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.choice.nearest import SLOW_TOK_S
from harness.planning.choice.recommend import choose_best
from harness.planning.code import Destination, loading_code
from harness.planning.device_map.infer import device_of
from harness.planning.planner import Planner
from harness.worker import model as work
from tests.support import small_models
from tests.support.builders import case, loaded, machine


def spec(name: str) -> ModelSpec:
    return model_spec.read_spec(resolve.resolve(name))


def cards(*sizes: str) -> Machine:
    return profile(list(sizes), ram=128 * GIB)


def planned(name: str, on: Machine, precision: str = "bf16") -> dict[str, Plan]:
    planner = Planner(spec(name), on, here=False)
    return {one.case.placement: one for one in planner.plans([case(precision, placement) for placement in PLACEMENTS])}


@pytest.mark.parametrize("sizes", [["8GiB"], ["6GiB"], ["12GiB", "8GiB"], ["24GiB", "24GiB"], ["16GiB", "4GiB", "12GiB"]])
@pytest.mark.parametrize("name", ["qwen2.5-7b-instruct", "moss-moon-003-sft", "gemma-2-9b-it", "mixtral-8x7b-instruct-v0.1"])
def test_the_worst_case_fits_on_every_gpu(name: str, sizes: list[str]) -> None:
    found = planned(name, cards(*sizes))["recommended"]
    assert found.estimate is not None
    tiers = {tier: one for tier, one in found.estimate.tiers.items() if tier.startswith("gpu")}
    assert all(one.needed_high_bytes <= (one.capacity_bytes or 0) for one in tiers.values())
    assert found.device_map is not None
    assert not isinstance(found.device_map, str)
    paths = [weight.path for weight in spec(name).skeleton.weights]
    assert all(device_of(found.device_map, path) is not None for path in paths)


def test_it_is_chosen_where_it_is_better_and_says_why() -> None:
    plans = planned("qwen2.5-7b-instruct", cards("12GiB", "8GiB"))
    assert (plans["auto"].verdict, plans["recommended"].verdict) == (Verdict.TIGHT, Verdict.FITS)
    del plans["sequential"]  # which fits as well: it fills the first card, and has a simpler code
    best = choose_best(plans.values())
    assert best is not None
    assert best[0].case.placement == "recommended"
    assert "auto, told to leave the same room for inference, has" in best[1]
    assert "Given the whole budget, auto would leave inference" in best[1]
    assert "short on gpu:1" in best[1]


def test_it_fits_where_auto_does_not() -> None:
    plans = planned("moss-moon-003-sft", cards("8GiB", "8GiB"))
    assert (plans["auto"].verdict, plans["recommended"].verdict) == (Verdict.TOO_BIG, Verdict.FITS)
    assert plans["auto"].why is not None
    assert plans["auto"].why.endswith("Try --placement recommended.")


def test_where_it_is_no_better_the_plain_way_is_chosen() -> None:
    plans = planned("qwen2.5-7b-instruct", cards("24GiB"))
    assert plans["recommended"].device_map == plans["direct"].device_map == {"": "gpu:0"}
    best = choose_best(plans.values())
    assert best is not None
    assert best[0].case.placement == "direct"


def test_all_of_moss_stays_on_two_cards() -> None:
    found = planned("moss-moon-003-sft", cards("24GiB", "24GiB"))["recommended"]
    assert found.verdict is Verdict.FITS
    assert found.why == "All of it is on the GPU."
    assert isinstance(found.device_map, Mapping)
    assert set(found.device_map.values()) == {"gpu:0", "gpu:1"}


def homes(one: Plan) -> set[str]:
    assert isinstance(one.device_map, Mapping)
    return {str(home) for home in one.device_map.values()}


def test_what_spills_of_bitsandbytes_stays_in_16_bits() -> None:
    assert homes(planned("qwen2.5-7b-instruct", cards("8GiB"), "int4")["recommended"]) == {"gpu:0"}
    found = planned("moss-moon-003-sft", cards("8GiB"), "int4")
    assert found["auto"].verdict is Verdict.TOO_BIG
    assert str(found["auto"].why).startswith(
        "too big for auto: weights would lie on cpu; transformers leaves parts of a bitsandbytes"
    )
    one = found["recommended"]
    assert one.verdict.is_good
    assert homes(one) == {"gpu:0", "cpu"}
    assert '"llm_int8_enable_fp32_cpu_offload": True' in str(one.code)
    assert "max_memory" not in str(one.code)


def test_the_code_names_every_module_and_numbers_the_cards() -> None:
    found = planned("qwen2.5-7b-instruct", cards("12GiB", "8GiB"))["recommended"]
    assert found.code is not None
    call = next(node for node in ast.walk(ast.parse(found.code)) if isinstance(node, ast.Call))
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert isinstance(found.device_map, Mapping)
    assert given["device_map"] == {path: int(str(tier)[-1]) for path, tier in found.device_map.items()}
    assert len(given["device_map"]) < 40
    assert "offload_folder" not in given


def test_without_a_gpu_it_is_no_case_of_its_own() -> None:
    found = Planner(spec("chatglm-6b"), machine()).plan(case("bf16", "recommended"))
    assert (found.verdict, found.why) == (Verdict.UNAVAILABLE, "identical to cpu without a GPU")
    assert "recommended" not in distinct(PLACEMENTS, gpus=0)
    assert "recommended" in distinct(PLACEMENTS, gpus=1)


# ---- loaded by it -------------------------------------------------------------------------------------------------------

# Between RAM and disk, for there is no GPU here: the call is the same.
MAP: dict[str, str | int] = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MAP |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_a_map_in_full_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.logging.disable_progress_bar()
    small_models.save("llama", tmp_path / "model")
    row = PLACEMENTS["recommended"]
    code = loading_code(PRECISIONS["bf16"], row, "bfloat16", Destination(device_map=MAP))
    request = Load(model=str(tmp_path / "model"), code=code, tokenizer=False)
    found = work.loaded_facts(work.load(request, lambda _: contextlib.nullcontext())[0])
    assert found.tier_bytes["disk"] > 0
    assert checked(found) == verify.OK


def checked(found: Loaded, **changed: str) -> str:
    one = Plan(case=case("bf16", "recommended"), verdict=Verdict.UNKNOWN, device_map={**MAP, **changed})
    return verify.checks(one, found)["placement"]


def test_a_map_that_was_not_obeyed_is_told() -> None:
    found = loaded({"bfloat16": 5}, tiers={"cpu": 5, "gpu:0": 5}, device_map={"model": "0", "lm_head": "cpu"})
    one = Plan(
        case=case("bf16", "recommended"),
        verdict=Verdict.UNKNOWN,
        device_map={"model.layers.0": "gpu:0", "model.layers.1": "gpu:1", "lm_head": "cpu"},
    )
    said = verify.checks(one, found)["placement"]
    assert said == "1 of 3 entries of the device map were not obeyed: model.layers.1 is on gpu:0"


@pytest.mark.parametrize(("faster", "chosen"), [(1.06, "bf16"), (9.0, "fp32")])
def test_fewer_bits_win_inside_the_doubt_of_the_speed(faster: float, chosen: str) -> None:
    """Twice the memory for a few percent that nobody can be sure of is no bargain; what is surely faster is."""
    on = profile([], ram=32 * GIB)
    planner = Planner(spec("smollm2-135m"), on, here=False)
    small, large = planner.plans([case("bf16", "cpu"), case("fp32", "cpu")])
    assert small.estimate is not None
    assert large.estimate is not None
    best = small.estimate.decode_tok_s.best
    speed = Span(low=best * faster * 0.8, best=best * faster, high=best * faster * 1.2)
    large = replace(large, estimate=replace(large.estimate, decode_tok_s=speed))
    found = choose_best([large, small])
    assert found is not None
    assert found[0].case.precision == chosen


@pytest.mark.parametrize(("waits", "chosen"), [(6.0, "bf16"), (1.0, "fp16")])
def test_as_many_bits_that_lose_less_win_where_the_whole_answer_comes_no_later(waits: float, chosen: str) -> None:
    """float16 decodes faster on many processors and reads a long prompt far slower; what is chosen is no "highest quality" then."""
    planner = Planner(spec("smollm2-135m"), profile([], ram=32 * GIB), here=False)
    exact, fast = planner.plans([case(name, "cpu", prompt_tokens=1024, new_tokens=64) for name in ("bf16", "fp16")])
    assert exact.estimate is not None
    answer = exact.estimate
    speed = Span(low=1, best=1.3 * answer.decode_tok_s.best, high=1e3)
    first = Span(low=0, best=waits * answer.first_token_s.best, high=1e3)
    fast = replace(fast, estimate=replace(answer, decode_tok_s=speed, first_token_s=first))
    for plans in ([exact, fast], [fast, exact]):
        best, reason = choose_best(plans) or pytest.fail("nothing fits")
        assert best.case.precision == chosen
        said = {
            "bf16": "highest quality that fits",
            "fp16": "1.3 times as fast as bf16/cpu, which is worth the exactness it gives up",
        }
        assert reason.startswith(said[chosen])


@pytest.mark.parametrize(
    ("name", "card"), [("qwen2.5-14b", "12GiB"), ("codegen-16b-mono", "12GiB"), ("chatglm-6b", "RTX 3060 12GB")]
)
def test_a_rival_that_nobody_waits_for_is_called_slow_and_not_compared(name: str, card: str) -> None:
    """ "629 times as fast" as what makes a token in a minute says nothing; that no wider way is fast enough does."""
    planner = Planner(spec(name), profile([card], ram=32 * GIB), here=False)
    plans = planner.plans([case(bits, where) for bits in ("bf16", "fp16", "int8", "nf4-dq") for where in PLACEMENTS])
    best, reason = choose_best(plans) or pytest.fail("nothing fits")
    wider = [
        one
        for one in plans
        if one.verdict is Verdict.FITS and PRECISIONS[one.case.precision].bits > PRECISIONS[best.case.precision].bits
    ]
    speeds = {one.case.way: one.estimate.decode_tok_s.best for one in wider if one.estimate}
    way, speed = max(speeds.items(), key=lambda item: item[1])
    is_slow = speed < SLOW_TOK_S
    assert is_slow == (name != "chatglm-6b")  # both kinds are looked at
    assert ("times as fast as" in reason) == (not is_slow)
    if is_slow:
        assert reason.endswith(f"reaches 1 token a second: {way}, the fastest, makes {significant(speed, 2)} tokens/s")
