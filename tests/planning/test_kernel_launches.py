"""What a token starts, as counted from the skeleton, against what torch dispatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models.cache_argument import CACHE, kv_cache_of
from harness.planning.cost import kernel_launches
from harness.planning.cost.kernel_launches import Operations
from harness.worker.build_skeleton import build_skeleton

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 64}
GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_head": 4, "vocab_size": 64}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "phi": SIZES,
    "gpt2": GPT2_SIZES,
    "codegen": {**GPT2_SIZES, "rotary_dim": 8},
    "bloom": {"hidden_size": 64, "n_head": 4, "vocab_size": 64},
    "mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 16, "num_experts": 8},
    "deepseek_v3": {
        **SIZES,
        **LATENT,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 9,
    },
}


class Counter(TorchDispatchMode):
    """Counts what torch dispatches."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def config(name: str, layers: int) -> dict[str, Any]:
    key = "n_layer" if name in ("gpt2", "codegen", "bloom") else "num_hidden_layers"
    return {"model_type": name, **CONFIGS[name], key: layers}


def dispatched(name: str, layers: int) -> int:
    """Count one step with a cache."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(name, layers)), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        past = kv_cache_of(model(torch.arange(8)[None], use_cache=True))
        counter = Counter()  # type: ignore[no-untyped-call]  # torch's class
        with counter:
            model(torch.tensor([[3]]), **{CACHE: past}, use_cache=True)
    return counter.seen


def counted(name: str, layers: int) -> Operations:
    return kernel_launches.count(build_skeleton(config(name, layers)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_starts_what_torch_dispatches(name: str) -> None:
    """Transformers changes its code from version to version: a third is as near as a host cost needs."""
    one, three = counted(name, 1), counted(name, 3)
    linears, others = three.linears - one.linears, three.others - one.others
    assert kernel_launches.LINEAR * linears + others == pytest.approx(dispatched(name, 3) - dispatched(name, 1), rel=0.33)


def test_stacked_experts_are_products_of_their_own() -> None:
    """A processor multiplies by each of 8 experts in turn, up and down; only Linears of attention count as such, and the head."""
    found = counted("qwen3_moe", 2)
    assert (found.experts, found.linears, found.quantizable) == (2 * 8 * 2, 2 * 4 + 1, 2 * 4)
    assert counted("llama", 2).experts == 0
