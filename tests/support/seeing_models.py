"""Small models that see, of random weights: configs of every kind of vision tower, and one as files with its processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

_TEXT = {
    "vocab_size": 1500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_TURNED = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
_GRID = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "spatial_merge_size": 2}
_POOLED = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "global_head_dim": 16, "patch_size": 16, "pooling_kernel_size": 4,
}  # fmt: skip

# model type -> config: fixed sizes, tiles, grids of any size, pooled ones.
SEEING: Mapping[str, Mapping[str, Any]] = {
    "llava": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": {**_TOWER, "model_type": "clip_vision_model"}},
    "llava_next": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": {**_TOWER, "model_type": "clip_vision_model"}},
    "gemma3": {"text_config": _TEXT, "vision_config": _TOWER, "mm_tokens_per_image": 4},
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "qwen2_5_vl": {"text_config": _TURNED, "vision_config": {**_GRID, "patch_size": 14}},
    "qwen3_vl": {"text_config": _TURNED, "vision_config": {**_GRID, "patch_size": 16, "deepstack_visual_indexes": [0]}},
    "gemma4": {"text_config": _TEXT, "vision_config": _POOLED},
    "llama4": {
        "text_config": {**_TEXT, "num_local_experts": 2, "intermediate_size_mlp": 128},
        "vision_config": {
            **_TOWER, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
        },
    },
    "lfm2_vl": {
        "text_config": {**_TEXT, "model_type": "lfm2"},
        "vision_config": {**_TOWER, "patch_size": 16, "num_patches": 16, "model_type": "siglip2_vision_model"},
    },
}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """Return the config of a small model as published."""
    found: dict[str, Any] = AutoConfig.for_model(kind, **SEEING[kind]).to_dict()
    return found


def built(config: Mapping[str, Any]) -> Any:
    """Build a model of random weights in bfloat16 on the processor."""
    torch.manual_seed(0)
    kind = AutoConfig.for_model(**config)
    return AutoModelForImageTextToText.from_config(kind, dtype=torch.bfloat16).eval()


def save_llava(folder: Path) -> None:
    """Save a small LLaVA with its processor, whose tokens are single characters and the word for an image."""
    config = {**config_of("llava"), "image_token_id": 1, "image_token_index": 1}
    built(config).save_pretrained(folder)
    words = {"<image>": 1, "?unknown": 0, " ": 2} | {chr(33 + number): 3 + number for number in range(90)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?unknown"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?unknown", pad_token=" ", additional_special_tokens=["<image>"]
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        image_processor=LlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
