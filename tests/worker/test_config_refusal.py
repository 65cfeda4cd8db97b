"""What transformers takes while loading and fails with as it generates: refused by key and value, and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

from harness.architecture.ask_worker import RefusedConfig
from harness.worker import build_skeleton as worker
from harness.worker.auto_class import auto_class_of
from harness.worker.config.refusal import CONTRADICTIONS

pytestmark = pytest.mark.filterwarnings("ignore")
_USUAL: Mapping[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
_LATENT: Mapping[str, Any] = {
    **{key: value for key, value in _USUAL.items() if key != "head_dim"},
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
SOUND: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": _LATENT,
    "gemma3_text": {**_USUAL, "sliding_window": 16},
    "gpt_oss": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen3_moe": {**_USUAL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_USUAL, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "falcon": {key: value for key, value in _USUAL.items() if key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "cohere2": {**_USUAL, "sliding_window": 16},
}
DROPOUT = "dropout probability has to be between 0 and 1"
ODD: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("deepseek_v3", {"n_group": None}, r"gives n_group as null, and .* of that \(without the key it takes 8\)"),
    ("deepseek_v3", {"topk_group": None}, r"gives topk_group as null, and .* of that \(without the key it takes 4\)"),
    ("deepseek_v3", {"num_experts_per_tok": 20}, "gives n_routed_experts as 8 and num_experts_per_tok as 20, .* together"),
    ("gemma3_text", {"sliding_window": None}, r"gives sliding_window as null, and .* of that \(without the key it takes 4096\)"),
    ("gpt_oss", {"sliding_window": None}, r"gives sliding_window as null, and .* of that \(without the key it takes 128\)"),
    ("gpt_oss", {"num_experts_per_tok": 9}, "gives num_local_experts as 4 and num_experts_per_tok as 9, .* together"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "gives num_experts as 4 and num_experts_per_tok as 9, .* together"),
    ("mixtral", {"num_experts_per_tok": 9}, "gives num_experts_per_tok as 9, and .* of that"),
    ("mixtral", {"text_config": {}}, "gives text_config as a table, and .* of that"),
    ("opt", {"dropout": 2}, f'gives dropout as 2, and transformers .* refuses it: "{DROPOUT}'),
    ("falcon", {"hidden_dropout": -1}, f'gives hidden_dropout as -1, and transformers .* refuses it: "{DROPOUT}'),
    ("falcon", {"attention_dropout": 2}, f'gives attention_dropout as 2, and transformers .* refuses it: "{DROPOUT}'),
)


def writes(config: Mapping[str, Any]) -> bool:
    """Say whether transformers makes a model of a config that writes two tokens."""
    try:
        model: Any = transformers.AutoModelForCausalLM.from_config(worker.read_model_config(config)).eval()
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    except CONTRADICTIONS:
        return False
    return True


@pytest.mark.parametrize(("kind", "changed", "said"), ODD, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_a_value_that_fails_as_it_generates_is_refused_by_its_key(kind: str, changed: dict[str, Any], said: str) -> None:
    config = {"model_type": kind, **SOUND[kind], **changed}
    with pytest.raises(RefusedConfig, match=f"^{said}"):
        worker.build_skeleton(config)
    assert not writes(config)


@pytest.mark.parametrize("kind", SOUND)
def test_the_same_without_the_odd_value_is_planned(kind: str) -> None:
    config = {"model_type": kind, **SOUND[kind]}
    assert worker.build_skeleton(config).model_type == kind
    assert writes(config)


@pytest.mark.parametrize("kind", ["biogpt", "blip", "gemma4", "idefics", "jetmoe", "kosmos-2"])
def test_a_pass_that_asks_for_values_or_an_image_says_nothing_against_a_config(kind: str) -> None:
    """Of these a meta tensor, or a prompt without an image, gets no answer: which is no fault of the config."""
    config = worker.read_model_config({"model_type": kind})
    model = worker.construct(auto_class_of(config, None), config)
    with pytest.raises((RuntimeError, TypeError, ValueError)), torch.no_grad():
        model(input_ids=torch.ones((1, 1), dtype=torch.long, device="meta"), use_cache=True)
    worker._attention(model)
