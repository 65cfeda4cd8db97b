"""Device maps: the same as transformers' own, module for module."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from harness.architecture import skeleton_source
from harness.architecture.skeleton import Skeleton
from harness.catalog import shipped
from harness.core.errors import UsageError
from harness.core.units import GIB
from harness.planning.device_map.infer import STRATEGIES, Device, Widths, device_of, infer, measure, merge

# Architecture by architecture: tied and untied, grouped heads, experts, GPT-2's Conv1D, parallel blocks, latent attention.
MODELS = (
    "qwen2.5-0.5b-instruct",
    "qwen2.5-7b-instruct",
    "qwen3-30b-a3b",
    "smollm2-135m-instruct",
    "mixtral-8x7b-instruct-v0.1",
    "gemma-2-2b-it",
    "gemma-3-270m-it",
    "phi-2",
    "glm-4-9b-chat-hf",
    "gpt-oss-20b",
    "codegen-350m-mono",
    "stablelm-base-alpha-3b",
    "deepseek-v2-lite-chat",
    "gpt2",
    "opt",
)
BUILT: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "opt": {"model_type": "opt", "num_hidden_layers": 4},
}
PRECISIONS = (("bfloat16", None), ("float16", "int8"), ("bfloat16", "int4"), ("float32", None))
# Each architecture in two of them, each of them in half of the architectures.
PAIRS = [(name, *PRECISIONS[(at + more) % len(PRECISIONS)]) for at, name in enumerate(MODELS) for more in (0, 1)]


def imported(name: str) -> Any:
    """Import what takes seconds only in the tests that need it, and untyped as it is."""
    return import_module(name)


def budgets(total: float, seed: str, count: int) -> Iterator[dict[Device, int]]:
    """Make budgets from far too small to ample, for no to three GPUs, often without "cpu"."""
    rng = random.Random(seed)
    for index in range(count):
        memory: dict[Device, int] = {
            gpu: int(total * rng.choice([0, 0.02, 0.1, 0.2, 0.3, 0.5, 0.8, 1.3])) + rng.randrange(1000) for gpu in range(index % 4)
        }
        if rng.random() < 0.7 or not memory:
            memory["cpu"] = int(total * rng.choice([0.1, 0.3, 0.6, 2]))
        yield memory


def described(name: str) -> tuple[dict[str, Any], Skeleton]:
    from harness.worker import build_skeleton as worker

    if name in BUILT:
        return BUILT[name], worker.build_skeleton(BUILT[name])
    config = shipped.catalog()[shipped.hub_id(name)].config
    return config, skeleton_source.named(name)


def as_loaded(config: dict[str, Any], dtype: str, quantizer: str | None, folder: Path) -> tuple[Any, Any]:
    """Build a model, and its quantizer, in the state in which `from_pretrained` infers the device map."""
    torch, transformers, quantizers = imported("torch"), imported("transformers"), imported("transformers.quantizers")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    read = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM._model_mapping[type(read)]
    found = None
    if quantizer:
        asked = transformers.BitsAndBytesConfig(load_in_8bit=quantizer == "int8", load_in_4bit=quantizer == "int4")
        found = quantizers.AutoHfQuantizer.from_config(asked, pre_quantized=False)
        # It refuses spilled maps; here it is asked only which map it would refuse.
        found.validate_environment = lambda **_: None
    with ExitStack() as stack:
        for context in kind.get_init_context(getattr(torch, dtype), quantizer is not None, False, None):
            stack.enter_context(context)
        model = kind(read)
        if found is not None:
            found.preprocess_model(model=model, dtype=getattr(torch, dtype), device_map="auto", checkpoint_files=None)
    return model, found


@pytest.mark.parametrize(("name", "dtype", "quantizer"), PAIRS, ids=lambda value: str(value))
def test_map_is_transformers_own(name: str, dtype: str, quantizer: str | None, tmp_path: Path) -> None:
    theirs = imported("transformers.integrations.accelerate")
    config, ours = described(name)
    model, found = as_loaded(config, dtype, quantizer, tmp_path)
    for memory in budgets(measure(ours, Widths(dtype, quantizer))[""], f"{name} {dtype} {quantizer}", 8):
        for strategy in STRATEGIES:
            expected = theirs._get_device_map(model, strategy, dict(memory), found)
            got = infer(ours, Widths(dtype, quantizer), strategy=strategy, max_memory=memory)
            assert got == expected, f"{strategy} {memory}"


def test_module_that_holds_a_weight_tied_to_an_earlier_one_is_split() -> None:
    from harness.worker import build_skeleton as worker

    torch, theirs, own = imported("torch"), imported("transformers.integrations.accelerate"), imported("harness.models")
    sizes = {"hidden_size": 64, "inner_hidden_size": 256, "num_layers": 4, "num_attention_heads": 4, "vocab_size": 128}
    with torch.device("meta"):
        model: Any = own.ChatGLMForCausalLM(own.ChatGLMConfig(**sizes)).to(torch.bfloat16)
    model.add_module("transformer", model._modules.pop("transformer"))  # behind the head
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # from_pretrained ties after it has made the map
    ours = worker._of_model(model)
    assert [child.path for child in ours.root.children] == ["lm_head", "transformer"]
    for memory in budgets(measure(ours)[""], "head first", 24):
        for strategy in STRATEGIES:
            expected = theirs._get_device_map(model, strategy, dict(memory), None)
            assert infer(ours, strategy=strategy, max_memory=memory) == expected, f"{strategy} {memory}"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Skeleton]:
    """A model as it is while its map is made, and ours of it."""
    config, ours = described("smollm2-135m-instruct")
    return as_loaded(config, "bfloat16", None, tmp_path_factory.mktemp("small"))[0], ours


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gpus", [(), (0.4,), (0.97,), (1.05,), (1.3,), (0.3, 0.4), (0.6, 0.6, 0.6), (0, 1.02)])
def test_margins_of_free_memory_are_transformers_own(
    strategy: str, gpus: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, small: tuple[Any, Skeleton]
) -> None:
    theirs, (model, ours) = imported("transformers.integrations.accelerate"), small
    total = measure(ours)[""]
    free: dict[Device, int] = {gpu: int(total * share) for gpu, share in enumerate(gpus)} | {"cpu": int(total * 0.5)}
    asked = theirs.accelerate_max_memory
    monkeypatch.setattr(theirs, "accelerate_max_memory", lambda given=None: dict(free) if given is None else asked(given))
    assert infer(ours, strategy=strategy, free=free) == theirs._get_device_map(model, strategy, None, None)


def test_map_is_the_one_that_loading_makes(tmp_path: Path) -> None:
    from harness.worker import build_skeleton as worker

    torch, transformers = imported("torch"), imported("transformers")
    config: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**config)).save_pretrained(tmp_path)
    ours = worker.build_skeleton(json.loads((tmp_path / "config.json").read_text()))
    memory: dict[Device, int] = {"cpu": int(measure(ours, Widths("float32"))[""] * 0.8)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=dict(memory), dtype=torch.float32, offload_folder=tmp_path / "offload"
    )
    assert infer(ours, Widths("float32"), max_memory=memory) == model.hf_device_map
    assert "disk" in model.hf_device_map.values()


def blocks(device_map: dict[str, Device]) -> dict[Device, int]:
    """Count MOSS's blocks by device."""
    places = [device_of(device_map, f"transformer.h.{i}") for i in range(34)]
    return {place: places.count(place) for place in dict.fromkeys(places) if place is not None}


@pytest.mark.parametrize(
    ("strategy", "memory", "expected"),
    [
        ("auto", {0: "24GiB", 1: "24GiB", "cpu": "64GiB"}, {0: 17, 1: 17}),
        ("sequential", {0: "24GiB", 1: "24GiB", "cpu": "64GiB"}, {0: 25, 1: 9}),
        ("balanced_low_0", {0: "24GiB", 1: "24GiB", "cpu": "64GiB"}, {0: 5, 1: 28, "cpu": 1}),
        ("auto", {0: "24GiB", 1: "24GiB", 2: "24GiB", "cpu": "64GiB"}, {0: 11, 1: 14, 2: 9}),
        ("balanced_low_0", {0: "24GiB", 1: "24GiB", 2: "24GiB", "cpu": "64GiB"}, {1: 18, 2: 16}),
        ("auto", {0: "12GiB", "cpu": "26GiB"}, {0: 11, "cpu": 23}),
        ("auto", {0: "12GB", "cpu": "26GB"}, {0: 10, "cpu": 24}),
        ("auto", {0: "8GiB", "cpu": "16GiB"}, {0: 6, "cpu": 17, "disk": 11}),
        ("auto", {0: "12GiB"}, {0: 11, "disk": 23}),
    ],
)
def test_moss_is_spread_as_its_users_saw(strategy: str, memory: dict[Device, int | str], expected: dict[Device, int]) -> None:
    model = skeleton_source.named("moss-moon-003-sft")
    assert blocks(infer(model, Widths("float16"), strategy=strategy, max_memory=memory)) == expected


def test_tied_weights_share_a_device() -> None:
    model = skeleton_source.named("gemma-2-9b-it")
    for memory in budgets(measure(model)[""], "tied", 30):
        found = infer(model, max_memory=memory)
        assert device_of(found, "lm_head") == device_of(found, "model.embed_tokens")


def test_merging_writes_a_module_once() -> None:
    assert merge({"a.b.0": 0, "a.b.1": 0, "a.c": 1, "d": 1}) == {"a.b": 0, "a.c": 1, "d": 1}
    assert merge({"a.b": 0, "c": 0}) == {"": 0}
    assert merge({"a.b.0": 0, "c": 1}) == {"a.b.0": 0, "c": 1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strategy": "balancd"}, "no device map strategy 'balancd': did you mean 'balanced'"),
        ({"max_memory": {"cuda": 8 * GIB}}, "max_memory names 'cuda': a device is a GPU's number"),
        ({"max_memory": {0: "12Gb"}}, "could mean bits"),
        ({"strategy": "balanced_low_0", "max_memory": {1: 8 * GIB, 2: 8 * GIB}}, "needs GPUs numbered from 0: max_memory lacks 0"),
    ],
)
def test_wrong_requests_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        infer(skeleton_source.named("phi-2"), **asked)
