"""Small checkpoints of random weights of as many architectures as people load, each a few megabytes, with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from tests.support import small_models
from tests.support.small_models import write_letters

VOCABULARY = 512  # of few words, any guess is better than what the quality probe takes for broken
_USUAL = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 2, "n_head": 8}
_STATES = {**_USUAL, "state_size": 16}

# model type -> config, beside those of `small_models.MODELS`.
DECODERS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {**_GROUPED, "sliding_window": 32},  # a window shorter than the prompt
    "gemma": {**_GROUPED, "head_dim": 32},
    "gemma3_text": {**_GROUPED, "head_dim": 32, "num_hidden_layers": 6, "sliding_window": 32},
    "granite": _GROUPED,
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {**_GROUPED, "tie_word_embeddings": True},
    "cohere2": {**_GROUPED, "num_hidden_layers": 4, "sliding_window": 32},
    "starcoder2": {**_GROUPED, "sliding_window": 32},
    "gpt_bigcode": {**_GPT, "n_positions": 512, "multi_query": True},
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 256, "num_layers": 2, "num_heads": 8, "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 1]], "window_size": 32,
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 256, "n_layers": 2, "n_heads": 8, "max_seq_len": 512},
    "olmo": _USUAL,
    "olmoe": {**_USUAL, "intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4": {**_GROUPED, "head_dim": 32},
    "glm4_moe": {**_EXPERTS, "head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "smollm3": _GROUPED,
    "nemotron": _GROUPED,
    "persimmon": _USUAL,
    "exaone4": {**_GROUPED, "sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
    "ernie4_5": {**_GROUPED, "head_dim": 32},
    "hunyuan_v1_dense": {**_GROUPED, "head_dim": 32},
    "seed_oss": {**_GROUPED, "head_dim": 32},
    "phimoe": {**_GROUPED, "num_local_experts": 4},
    "llama4_text": {
        **_GROUPED, "head_dim": 32, "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 4,
        "moe_layers": [1],
    },
    "qwen3_next": {
        **_EXPERTS, "head_dim": 32, "num_experts": 4, "shared_expert_intermediate_size": 128, "num_hidden_layers": 4,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "lfm2": {**_GROUPED, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "minimax": {
        **_GROUPED, "head_dim": 32, "num_local_experts": 4, "intermediate_size": 128,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": {**_STATES, "initializer_range": 0.01},
    "mamba2": {**_STATES, "initializer_range": 0.01, "num_heads": 16, "head_dim": 32, "n_groups": 2, "expand": 2},
    "falcon_mamba": {**_STATES, "initializer_range": 0.01},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 2, "attention_hidden_size": 256},
    "jamba": {**_GROUPED, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {
        **_GROUPED, "num_hidden_layers": 3, "head_dim": 32, "lru_width": 256, "attention_window_size": 32,
        "initializer_range": 0.002,
    },
    "biogpt": {**_USUAL, "max_position_embeddings": 512},
    "xglm": {
        "vocab_size": VOCABULARY, "d_model": 256, "ffn_dim": 512, "num_layers": 2, "attention_heads": 8,
        "max_position_embeddings": 512,
    },
    "short context": {"model_type": "gpt2", **_GPT, "n_positions": 48},  # shorter than the texts of the probe
}  # fmt: skip

_TEXT = {**_GROUPED, "model_type": "llama"}
_QWEN_TEXT = {**_GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 64,
}  # fmt: skip
_SIGLIP = {**_CLIP, "model_type": "siglip_vision_model"}
SEEING: Mapping[str, Mapping[str, Any]] = {
    "llava": {"text_config": _TEXT, "vision_config": _CLIP, "image_token_index": 5},
    "llava_next": {"text_config": _TEXT, "vision_config": _CLIP, "image_token_index": 5},
    "llava_onevision": {"text_config": {**_TEXT, "model_type": "qwen2"}, "vision_config": _SIGLIP, "image_token_index": 5},
    "qwen2_vl": {
        "text_config": _QWEN_TEXT, "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2},
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    },
    "qwen2_5_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    },
    "qwen3_vl": {
        "text_config": {**_QWEN_TEXT, "head_dim": 32},
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    },
    "idefics3": {"text_config": _TEXT, "vision_config": {**_CLIP, "model_type": "idefics3_vision"}, "image_token_id": 5},
    "smolvlm": {"text_config": _TEXT, "vision_config": {**_CLIP, "model_type": "smolvlm_vision"}, "image_token_id": 5},
    "gemma3": {
        "text_config": {**_GROUPED, "head_dim": 32, "sliding_window": 32}, "vision_config": _SIGLIP, "mm_tokens_per_image": 4,
        "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
    },
    "paligemma": {
        "text_config": {**_GROUPED, "model_type": "gemma", "head_dim": 32}, "vision_config": _SIGLIP, "image_token_index": 5,
        "projection_dim": 256, "hidden_size": 256,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [28, 28], "patch_size": [14, 14],
        },
        "image_token_id": 5,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"}, "image_token_index": 5,
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    },
    "aya_vision": {
        "text_config": {**_TEXT, "model_type": "cohere2"}, "vision_config": _SIGLIP, "image_token_index": 5,
        "alignment_intermediate_size": 128,
    },
}  # fmt: skip

# What writes no text token by token, and must be refused in a sentence.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "t5": {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "bert": {**_USUAL, "hidden_size": 64, "intermediate_size": 128},
}


def names() -> tuple[str, ...]:
    """Name every architecture that can be made."""
    return tuple(dict.fromkeys((*small_models.MODELS, *DECODERS, *SEEING, *OTHERS)))


def save(name: str, folder: Path) -> Path:
    """Save one with random weights in bfloat16 and a tokenizer of single letters."""
    torch.manual_seed(0)
    config = config_of(name)
    auto_class(name).from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_letters(folder, VOCABULARY)
    return folder


def config_of(name: str, **settings: int) -> Any:
    """Return the config of an architecture, with other settings where some are given."""
    small = {**small_models.MODELS[name], "vocab_size": VOCABULARY} if name in small_models.MODELS else {}
    given = {**(DECODERS.get(name) or SEEING.get(name) or OTHERS.get(name) or small), **settings}
    return AutoConfig.for_model(str(given.pop("model_type", name)), **given)


def auto_class(name: str) -> Any:
    """Return the class of transformers that makes one."""
    if name in OTHERS:
        return AutoModelForSeq2SeqLM if name == "t5" else AutoModelForMaskedLM
    return AutoModelForImageTextToText if name in SEEING else AutoModelForCausalLM
