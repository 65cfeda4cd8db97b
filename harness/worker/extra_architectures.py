"""Architectures that transformers lacks, written from their checkpoints' tensors: module trees for the meta device, no forward.

Names and shapes follow the published checkpoints of Baichuan2 and InternLM2; class names are those that
their authors list as not to be split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import empty, nn


class ExtraModel(nn.Module):
    """A tree with what transformers' models say about themselves. `kv` is (heads, key width, value width) of every layer."""

    def __init__(self, config: Mapping[str, Any], no_split: str, kv: tuple[int, int, int], tied: Mapping[str, str]) -> None:
        super().__init__()
        self.config = config
        self.no_split = no_split
        self.kv = kv
        self.tied = dict(tied)


class Tree(nn.Module):
    """A module made of named parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class RMSNorm(nn.Module):
    """A scale without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(width))


class NormHead(nn.Module):
    """Baichuan2's output embedding, whose rows are normalized; not a Linear."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(vocabulary, width))


class DecoderLayer(Tree):
    """A layer of Baichuan2-7B."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(
            self_attn=Tree(W_pack=_flat(hidden, 3 * hidden), o_proj=_flat(hidden, hidden)),
            mlp=Tree(gate_proj=_flat(hidden, inner), down_proj=_flat(inner, hidden), up_proj=_flat(hidden, inner)),
            input_layernorm=RMSNorm(hidden),
            post_attention_layernorm=RMSNorm(hidden),
        )


class BaichuanLayer(DecoderLayer):
    """A layer of Baichuan2-13B: the same tensors, ALiBi in place of rotary positions."""


class InternLM2DecoderLayer(Tree):
    """A layer of InternLM2; `packed` is the width of queries, keys and values together."""

    def __init__(self, hidden: int, inner: int, packed: int) -> None:
        super().__init__(
            attention=Tree(wqkv=_flat(hidden, packed), wo=_flat(hidden, hidden)),
            feed_forward=Tree(w1=_flat(hidden, inner), w3=_flat(hidden, inner), w2=_flat(inner, hidden)),
            attention_norm=RMSNorm(hidden),
            ffn_norm=RMSNorm(hidden),
        )


class BaichuanForCausalLM(ExtraModel):
    """Baichuan2. The 13B model names its context length otherwise, and its layers too."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
        layer = BaichuanLayer if "model_max_length" in config and "max_position_embeddings" not in config else DecoderLayer
        super().__init__(config, layer.__name__, (heads, hidden // heads, hidden // heads), {})
        self.model = Tree(
            embed_tokens=nn.Embedding(config["vocab_size"], hidden),
            layers=nn.ModuleList(layer(hidden, inner) for _ in range(config["num_hidden_layers"])),
            norm=RMSNorm(hidden),
        )
        self.lm_head = NormHead(hidden, config["vocab_size"])


class InternLM2ForCausalLM(ExtraModel):
    """InternLM2 and 2.5: grouped heads, packed by group."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        width = hidden // heads
        super().__init__(config, "InternLM2DecoderLayer", (kv_heads, width, width), {})
        sizes = hidden, config["intermediate_size"], (heads + 2 * kv_heads) * width
        self.model = Tree(
            tok_embeddings=nn.Embedding(config["vocab_size"], hidden),
            layers=nn.ModuleList(InternLM2DecoderLayer(*sizes) for _ in range(config["num_hidden_layers"])),
            norm=RMSNorm(hidden),
        )
        self.output = _flat(hidden, config["vocab_size"])


WRITTEN: Mapping[str, Callable[[Mapping[str, Any]], ExtraModel]] = {
    "baichuan": BaichuanForCausalLM,
    "internlm2": InternLM2ForCausalLM,
}


def _flat(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
