"""What the kernels of packed weights take on a card: traces from a config alone, and the plan's formulas, which say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from harness.architecture import skeleton, traces
from harness.architecture.card_kernels import CARDS
from harness.architecture.model_spec import ModelSpec
from harness.architecture.traced_memory import evaluate
from harness.checkpoint import quantization
from harness.core.methods.kernels import PACKED_KERNELS, kernel_for, scheme_of
from harness.core.precisions import PRECISIONS
from harness.core.records import Workload
from harness.planning.cost import estimate, memory
from harness.planning.cost.inventory import Inventory
from harness.worker.build_skeleton import build_skeleton
from harness.worker.trace.direct import trace
from harness.worker.trace.record import record

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "vocab_size": 2048, "head_dim": 32}
SMALL |= {
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 4}
GPT_OSS = {"model_type": "gpt_oss", **SMALL, "intermediate_size": 256, "num_key_value_heads": 2, "num_experts_per_tok": 2}
GPT_OSS |= {"num_local_experts": 8, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
LOAD = Workload(prompt_tokens=700, new_tokens=3, batch=4)


def _stored(config: Mapping[str, Any], method: str, bits: int = 4, **more: Any) -> dict[str, Any]:
    return {**config, "quantization_config": {"quant_method": method, "bits": bits, "group_size": 128, **more}}


def _inventory(config: Mapping[str, Any], precision: str) -> Inventory:
    built, packed = build_skeleton(config), quantization.packed(config)
    assert packed is not None
    size = skeleton.packed_model_bytes(built, packed)
    stored = {"int32": size}
    spec = ModelSpec(name="m", source="m", skeleton=built, stored=stored, checkpoint_bytes=size, packed=packed, config=config)
    row = spec.adapted(PRECISIONS[precision])
    return Inventory(spec, estimate.weight_format(row, row.dtype, spec))


@pytest.mark.parametrize(
    ("config", "precision", "capability", "kernel"),
    [
        (_stored({"model_type": "llama", **SMALL, **GROUPED}, "gptq"), "gptq-int4", "8.0", "Marlin"),
        (_stored({"model_type": "mistral", **SMALL, "sliding_window": 96}, "gptq"), "gptq-int4", "7.0", "ExLlamaV2"),
        (_stored({"model_type": "phi3", **SMALL, **GROUPED}, "gptq", 8), "gptq-int8", "10.0", "Swordfish"),
        (_stored({"model_type": "qwen2", **SMALL}, "gptq", 8, desc_act=True), "gptq-int8", "7.0", "Triton"),
        (_stored({"model_type": "qwen2", **SMALL, **GROUPED}, "awq"), "awq-int4", "8.6", "Marlin"),
        (_stored({"model_type": "llama", **SMALL}, "awq"), "awq-int4", "7.5", "ExLlamaV2"),
        (_stored({"model_type": "phi3", **SMALL, **GROUPED}, "awq"), "awq-int4", "9.0", "Machete"),
        ({**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", "8.0", "gpt-oss-triton-kernels"),
        ({**GPT_OSS, "num_local_experts": 16, "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", "9.0", "gpt-oss-triton"),
        (
            {**GPT_OSS, "num_experts_per_tok": 4, "quantization_config": {"quant_method": "mxfp4"}},
            "mxfp4",
            "12.0",
            "gpt-oss-triton",
        ),
    ],
)
def test_formulas_say_of_packed_weights_what_a_trace_says(
    config: dict[str, Any], precision: str, capability: str, kernel: str
) -> None:
    traced, counted = trace(config, precision, [LOAD], capability=capability)[0], _inventory(config, precision)
    kv = sum(memory.kv_bytes(counted.skeleton, LOAD.cached_tokens, LOAD.batch, counted.fmt.element_bytes))
    assert traced.guesses == 0
    assert kv == traced.kv_bytes
    assert counted.total.held + kv + counted.on_gpu(capability).bytes(LOAD) == pytest.approx(traced.peak_bytes, rel=0.02)
    assert kernel in counted.on_gpu(capability).kernel


def test_a_record_of_packed_weights_gives_what_a_trace_gives() -> None:
    config = _stored({"model_type": "llama", **SMALL, **GROUPED}, "gptq")
    made = record(config, "gptq-int4", capability="8.6", check=False)
    traced = trace(config, "gptq-int4", [LOAD], capability="8.6")[0]
    given = evaluate(made, LOAD.batch, LOAD.prompt_tokens, LOAD.new_tokens, "8.6")
    assert given is not None
    assert given.weights_bytes == traced.weights_bytes
    assert given.allocated_bytes == pytest.approx(traced.peak_bytes, rel=0.005)
    assert evaluate(made, LOAD.batch, LOAD.prompt_tokens, LOAD.new_tokens, "9.0") is None


def test_cards_take_the_kernels_that_gptqmodel_prefers() -> None:
    schemes = {
        name: scheme_of(_stored({}, method, bits))
        for name, method, bits in [("g4", "gptq", 4), ("g8", "gptq", 8), ("a4", "awq", 4)]
    }
    found = {}
    for name, scheme in schemes.items():
        assert scheme is not None
        kernels = [kernel_for(scheme, card.capability[0] + card.capability[1] / 10) for card in CARDS]
        found[name] = [kernel.name for kernel in kernels if kernel]
    new = ["Marlin"] * 3 + ["Machete", "Swordfish", "Marlin"]
    assert found == {"g4": ["ExLlamaV2", "Marlin", *new], "g8": ["Triton", "Marlin", *new], "a4": ["ExLlamaV2", "ExLlamaV2", *new]}


def test_zero_points_and_other_layouts_are_for_other_kernels() -> None:
    asymmetric = scheme_of(_stored({}, "gptq", sym=False))
    assert asymmetric is not None
    kernel = kernel_for(asymmetric, 8.6)
    assert kernel is not None
    assert kernel.name == "ExLlamaV2"
    assert scheme_of(_stored({}, "awq", version="gemv")) is None
    assert scheme_of({"quantization_config": {"quant_method": "mxfp4"}}) is None


def test_every_kernel_names_its_source_and_marlin_sums_up_in_tiles() -> None:
    assert all(kernel.source.startswith("gptqmodel") for kernel in PACKED_KERNELS)
    marlin = next(kernel for kernel in PACKED_KERNELS if kernel.reduces)
    assert [marlin.reduction_bytes(rows, 108) for rows in (1, 17, 64, 4096)] == [1769472, 3538944, 7077888, 7077888]


@pytest.mark.parametrize(
    ("config", "precision", "why"),
    [
        (_stored({"model_type": "llama", **SMALL}, "awq", version="gemv"), "awq-int4", "no kernel is known"),
        ({"model_type": "llama", **SMALL}, "gptq-int4", "no kernel is known"),
        (
            _stored({"model_type": "llama", **SMALL, "intermediate_size": 704}, "awq"),
            "awq-int4",
            "Machete takes no weight of 704 x 256",
        ),
        ({"model_type": "llama", **SMALL}, "mxfp4", "keeps no experts of LlamaForCausalLM packed"),
    ],
)
def test_what_cannot_be_traced_is_said_by_name(config: dict[str, Any], precision: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        trace(config, precision, [LOAD], capability="9.0")


def test_records_of_packed_weights_go_by_how_they_are_packed() -> None:
    one, other = (_stored({"model_type": "llama", **SMALL}, "gptq", group_size=size) for size in (64, 128))
    assert traces.key_of(one) == traces.key_of(other)
    assert traces.packed_key(one, "gptq-int4") != traces.packed_key(other, "gptq-int4")
    assert traces.packed_key(one, "bf16") == traces.key_of(one)
