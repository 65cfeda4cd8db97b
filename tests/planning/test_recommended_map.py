"""The recommended map leaves inference its room, splits nothing that must stay whole, and has no more off the GPU than auto."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.architecture import skeleton_source
from harness.architecture.skeleton import Skeleton
from harness.core.units import GIB
from harness.planning.cost.memory import WeightFormat
from harness.planning.device_map.infer import Device, Widths, device_of, infer, measure
from harness.planning.device_map.recommended import RecommendedMap, Recommender, recommend_map
from tests.support.builders import weight_bytes

NOTHING_FITS = "No GPU can hold a block beside what inference needs."
MODELS = ("qwen2.5-7b-instruct", "moss-moon-003-sft", "gemma-2-9b-it", "chatglm-6b", "deepseek-v2-lite-chat", "qwen3-30b-a3b")


def cache(model: Skeleton, tokens: int) -> list[int]:
    return [2 * model.attention[i].per_token * tokens for i in model.layers]


def off_gpu(model: Skeleton, device_map: dict[str, Device]) -> float:
    """Add up the weights that a map puts in RAM or on disk."""
    sizes = measure(model)
    return sum(sizes[piece.path] for piece in model.pieces if device_of(device_map, piece.path) in ("cpu", "disk"))


def needed(model: Skeleton, device_map: dict[str, Device], kv_bytes: list[int]) -> dict[Device, float]:
    """Add up what inference needs by device: weights, cache and, on the first GPU, a copy of the largest module that is on none."""
    sizes = weight_bytes(model, WeightFormat(dtype="bfloat16"))
    gpus = [device for device in device_map.values() if isinstance(device, int)]
    main: Device = min(gpus, default="cpu")
    total: dict[Device, float] = dict.fromkeys({*device_map.values(), main}, 0)
    layers, largest = iter(kv_bytes), 0.0
    for module in model.root.walk():
        owned = sum(sizes[weight.path] for weight in module.weights)
        device = device_of(device_map, module.path)
        if device is not None:
            total[device] += owned
        if device in ("cpu", "disk") and main != "cpu":
            largest = max(largest, owned)
        if module.whole and device is not None:
            total[main if device in ("cpu", "disk") else device] += next(layers)
    return total | {main: total[main] + largest}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    gpus=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    ram=st.integers(1, 80),
    tokens=st.sampled_from([0, 512, 8192]),
)
def test_every_tensor_has_a_place_and_inference_its_room(name: str, gpus: list[int], ram: int, tokens: int) -> None:
    model = skeleton_source.named(name)
    budgets: dict[Device, int] = {index: size * GIB for index, size in enumerate(gpus)} | {"cpu": ram * GIB}
    found = recommend_map(model, budgets, kv_bytes=cache(model, tokens), reserve=dict.fromkeys(range(len(gpus)), GIB // 2))
    assert all(device_of(found.device_map, weight.path) is not None for weight in model.weights)
    assert {device_of(found.device_map, path) for path in (*model.tied, *model.tied.values())} <= {*found.device_map.values()}
    for target, source in model.tied.items():
        assert device_of(found.device_map, target) == device_of(found.device_map, source)
    for module in model.root.walk():
        if module.whole:
            assert not any(path.startswith(f"{module.path}.") for path in found.device_map)
    assert sum(found.kv_bytes.values()) == sum(cache(model, tokens))
    needs = needed(model, found.device_map, cache(model, tokens))
    assert all(needs.get(index, 0) <= max(0, budgets[index] - GIB // 2) for index in range(len(gpus)))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(name=st.sampled_from(MODELS), gpus=st.lists(st.integers(2, 40), min_size=1, max_size=3))
def test_no_more_is_off_the_gpu_than_auto_would_have(name: str, gpus: list[int]) -> None:
    model = skeleton_source.named(name)
    budgets: dict[Device, int] = {index: size * GIB for index, size in enumerate(gpus)} | {"cpu": 200 * GIB}
    found = recommend_map(model, budgets, kv_bytes=cache(model, 2048))
    assume(not found.why.startswith(NOTHING_FITS))  # then all runs in RAM, where auto would send all of it through the GPU
    auto = infer(model, max_memory={device: size - found.kv_bytes.get(device, 0) for device, size in budgets.items()})
    if off_gpu(model, found.device_map) > off_gpu(model, auto):
        needs = needed(model, auto, cache(model, 2048))
        assert any(needs[device] > budgets[device] for device in needs if isinstance(device, int))
        assert "auto, told to leave the same room for inference, has" in found.why
        assert "and would leave it" in found.why


def spread(found: RecommendedMap) -> tuple[int, int]:
    return found.blocks - found.blocks_off, found.blocks_off


def test_head_stays_on_the_gpu_where_auto_sends_it_away() -> None:
    model = skeleton_source.named("qwen2.5-7b-instruct")
    found = recommend_map(model, {0: 8 * GIB, "cpu": 64 * GIB}, kv_bytes=cache(model, 4096), reserve={0: GIB})
    assert spread(found) == (10, 18)
    assert found.device_map["lm_head"] == found.device_map["model.embed_tokens"] == 0
    assert found.why == (
        "Off the GPU: 18 of 28 blocks (7.81 GiB); auto, told to leave the same room for inference, has 18 of 28 blocks, lm_head "
        "(8.83 GiB) there. Given the whole budget, auto would leave inference 914 MiB short on gpu:0."
    )


def test_model_that_fits_is_one_entry() -> None:
    found = recommend_map(skeleton_source.named("qwen2.5-7b-instruct"), {0: 24 * GIB, "cpu": 64 * GIB})
    assert found.device_map == {"": 0}
    assert found.why == "All of it is on the GPU."


def test_gpu_too_small_for_anything_is_left_out() -> None:
    found = recommend_map(skeleton_source.named("qwen2.5-7b-instruct"), {0: GIB // 4, 1: 24 * GIB, "cpu": 64 * GIB})
    assert found.device_map == {"": 1}


def test_gpu_that_could_only_pass_weights_through_is_not_used() -> None:
    model = skeleton_source.named("moss-moon-003-sft")
    found = recommend_map(model, {0: 3 * GIB, "cpu": 64 * GIB}, Widths("float16"), kv_bytes=cache(model, 2048))
    assert found.device_map == {"": "cpu"}
    assert found.why.startswith(NOTHING_FITS)


def test_without_gpu_ram_comes_first_then_the_disk() -> None:
    found = recommend_map(skeleton_source.named("chatglm-6b"), {"cpu": 8 * GIB}, Widths("float16"))
    assert found.device_map["transformer.word_embeddings"] == found.device_map["lm_head"] == "cpu"
    assert found.device_map["transformer.layers.27"] == "disk"
    assert 7 * GIB < found.weights_bytes["cpu"] < 8 * GIB


@pytest.mark.parametrize("tokens", [0, 4096])
def test_cache_of_spilled_layers_lies_where_they_run(tokens: int) -> None:
    model = skeleton_source.named("moss-moon-003-sft")
    found = recommend_map(model, {0: 12 * GIB, "cpu": 40 * GIB}, Widths("float16"), kv_bytes=cache(model, tokens))
    assert found.kv_bytes[0] == sum(cache(model, tokens))
    assert found.kv_bytes.get("cpu", 0) == 0


def test_weights_can_be_given_by_tensor() -> None:
    model = skeleton_source.named("qwen2.5-7b-instruct")
    half = {path: size / 2 for path, size in measure(model).items()}
    assert recommend_map(model, {0: 9 * GIB, "cpu": 64 * GIB}, Widths(weights=half)).device_map == {"": 0}


def test_what_is_kept_of_one_reserve_is_not_taken_for_another() -> None:
    model, widths = skeleton_source.named("qwen2.5-7b-instruct"), Widths()
    budgets: dict[Device, int] = {0: 12 * GIB, "cpu": 64 * GIB}
    recommender = Recommender(model, budgets, widths)
    for gib in (1, 6, 1):
        for explain in (False, True, False):
            reserve: dict[Device, int] = {0: gib * GIB}
            found = recommender.recommend(reserve, explain=explain)
            assert found == recommend_map(model, budgets, widths, reserve=reserve, explain=explain)
            assert bool(found.why) is explain
