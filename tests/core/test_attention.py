"""The tables of KV caches and of attention say what the installed transformers does."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, cache_utils
from transformers.generation import configuration_utils

from harness.core.attention import ATTENTIONS, GROUP, KV_FORMS, RESIDUAL_TOKENS, KvForm, lacks
from harness.core.records import USUAL_KV
from harness.data import DATA
from harness.models.cache_argument import kv_cache_of
from harness.planning.generating import NO_CACHE
from harness.worker.attention_support import support

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 32


def test_every_cache_of_generate_is_in_the_table() -> None:
    offered = {
        *configuration_utils.DYNAMIC_CACHE_IMPLEMENTATIONS,
        *configuration_utils.STATIC_CACHE_IMPLEMENTATIONS,
    }
    ours = {row.arguments.get("cache_implementation", USUAL_KV) for row in KV_FORMS.values()}
    # What is static and offloaded at once has the bytes of one and the traffic of the other.
    assert offered - {"offloaded_static"} == ours


def test_every_backend_of_a_quantized_cache_is_in_the_table() -> None:
    known = set(re.findall(r'backend == "(\w+)"', inspect.getsource(cache_utils.QuantizedCache.__init__)))
    assert known == {row.arguments["cache_config"]["backend"] for row in KV_FORMS.values() if row.is_quantized}


def test_groups_and_residual_are_the_library_s() -> None:
    usual = {name: one.default for name, one in inspect.signature(cache_utils.QuantizedLayer.__init__).parameters.items()}
    assert (usual["q_group_size"], usual["residual_length"]) == (GROUP, RESIDUAL_TOKENS)


@pytest.mark.parametrize("form", KV_FORMS.values(), ids=lambda form: form.name)
def test_the_arguments_are_those_that_generate_takes(form: KvForm) -> None:
    GenerationConfig(**form.arguments).validate(strict=True)


def test_a_class_without_a_cache_is_one_by_the_library() -> None:
    import transformers

    without = {name for name in dir(transformers) if name.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead"))}
    classes: dict[str, Any] = {name: getattr(transformers, name) for name in without}
    ours = {
        name
        for name, one in classes.items()
        if hasattr(one, "_supports_default_dynamic_cache") and not one._supports_default_dynamic_cache()
    }
    assert ours == NO_CACHE


def test_the_classes_without_an_implementation_are_the_library_s() -> None:
    assert support() == json.loads((DATA / "attention.json").read_bytes()), "run python -m harness.worker.attention_support"


def test_what_a_class_lacks() -> None:
    assert lacks("BloomForCausalLM", "sdpa")
    assert not lacks("BloomForCausalLM", "eager")
    assert lacks("BloomForCausalLM", "flash_attention_2")
    assert not any(lacks("LlamaForCausalLM", name) for name in ATTENTIONS)


@pytest.fixture
def model() -> Any:
    """Make a model for each test: it keeps a static cache, and takes it again."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=128,
        hidden_size=HEADS * WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def held(value: Any) -> int:
    """Add up the tensors of a cache, taken apart where a package has packed them."""
    if isinstance(value, torch.Tensor):
        inside = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        return sum(held(getattr(value, name)) for name in inside) if inside else value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(held(part) for part in parts)


@pytest.mark.parametrize(("prompt", "new"), [(200, 2), (200, 60), (7, 128)])
@pytest.mark.parametrize("form", [form for form in KV_FORMS.values() if not form.in_ram], ids=lambda form: form.name)
def test_a_cache_holds_what_the_table_says(form: KvForm, prompt: int, new: int, model: Any) -> None:
    for module in form.needs:
        pytest.importorskip(module)
    ids = torch.arange(prompt)[None].repeat(2, 1) % 128
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(pad_token_id=0, **form.arguments),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        return_dict_in_generate=True,
    )
    cached, one = prompt + new - 1, LAYERS * 2 * 2 * KV_HEADS * WIDTH  # batch, keys and values
    measured = sum(held(vars(layer)) for layer in kv_cache_of(output).layers)
    expected = LAYERS * form.kept_bytes(one // LAYERS * cached, cached, new - 1, 2)
    assert measured == pytest.approx(expected, rel=0.01)
