"""Make models of random weights and different shape: `python synthetic.py DIRECTORY NAME`. A process of its own, for its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from harness.architecture.random_weights import NORM_SCALE

# name -> dtype of the file, shape. Tied and untied heads, biases, grouped heads, explicit head_dim, experts; 0.16 to 1.1 B.
MODELS: dict[str, tuple[torch.dtype, type[PretrainedConfig], dict[str, Any]]] = {
    "neox": (
        torch.bfloat16,
        GPTNeoXConfig,
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50304},
    ),
    "gemma2": (
        torch.float32,
        Gemma2Config,
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 64000},
    ),
    "moe": (
        torch.bfloat16,
        Qwen3MoeConfig,
        {"hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 384, "num_hidden_layers": 10,
         "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
         "vocab_size": 50000},
    ),
    "codegen": (torch.float16, CodeGenConfig, {"n_embd": 1024, "n_layer": 20, "n_head": 16, "rotary_dim": 32, "vocab_size": 51200}),
    "qwen2": (
        torch.bfloat16,
        Qwen2Config,
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "llama": (
        torch.bfloat16,
        LlamaConfig,
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
    ),
    "gpt2": (torch.float32, GPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257}),
    "opt": (
        torch.float16,
        OPTConfig,
        {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50272,
         "word_embed_proj_dim": 1024},
    ),
    "bloom": (torch.float16, BloomConfig, {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 100352}),
    "qwen3": (
        torch.bfloat16,
        Qwen3Config,
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "phi3": (
        torch.bfloat16,
        Phi3Config,
        {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 32064},
    ),
    "olmo2": (
        torch.float32,
        Olmo2Config,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 100352},
    ),
}  # fmt: skip


def main() -> None:
    directory, name = sys.argv[1:]
    dtype, config, sizes = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = AutoModelForCausalLM.from_config(config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.eq(1).all():  # scales of norms, as synthetic checkpoints have them
                parameter.fill_(NORM_SCALE)
    model.save_pretrained(Path(directory) / name)


if __name__ == "__main__":
    main()
