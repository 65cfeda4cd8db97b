"""A rough skeleton of an unknown architecture, from the tensors of its checkpoint and the usual keys of its config.

Which modules are Linear is guessed from shapes and names, the KV cache from the config. What is planned from it has a wider
interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from harness.architecture.skeleton import Attention, Block, Child, ParameterSpec, Skeleton
from harness.checkpoint.reader import INNER_CONFIGS, INNER_KEYS, Checkpoint
from harness.checkpoint.size_breakdown import kind_of, ties
from harness.core.errors import CheckpointError

SOURCE = "tensors"

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_NUMBER = re.compile(r"\d{1,5}")

# GGUF's names, behind that of the architecture, of what configs call otherwise.
_GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}

_Tree = dict[str, Any]


def infer_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """Infer the module tree that the names of the tensors describe.

    Raises:
        CheckpointError: the config, or the metadata of a GGUF, does not give layers, heads and width.
    """
    checkpoint = _translated(checkpoint)
    layers, heads, hidden = (checkpoint.size(*keys) for keys in (_LAYERS, _HEADS, _HIDDEN))
    config = _language(checkpoint.config)
    width = _first(config, ("head_dim", "kv_channels")) or hidden // heads
    kv_heads = _first(config, _KV_HEADS) or heads
    blocks: list[Block] = []
    _add_block("Model", _tree(checkpoint), blocks)
    return Skeleton(
        model_class=checkpoint.architecture or "unknown",
        model_type=str(checkpoint.config.get("model_type", "unknown")),
        source=SOURCE,
        blocks=tuple(blocks),
        no_split=("Repeated",),
        tied=_tied(checkpoint),
        not_converted=(),
        attention=(Attention(heads=kv_heads, key_dim=width, value_dim=width),),
        layers=(0,) * layers,
        hidden_size=hidden,
        intermediate_size=_first(config, tuple(sorted(INNER_KEYS))) or 4 * hidden,
        heads=heads,
        vocab_size=_first(config, ("padded_vocab_size", "vocab_size")) or 0,
    )


def _translated(checkpoint: Checkpoint) -> Checkpoint:
    """Give the metadata of a GGUF the names that configs have."""
    kind = checkpoint.config.get("general.architecture")
    if kind is None:
        return checkpoint
    values = {key: checkpoint.config.get(f"{kind}.{name}") for name, key in _GGUF_KEYS.items()}
    lacking = [f"{kind}.{name}" for name in list(_GGUF_KEYS)[:3] if type(checkpoint.config.get(f"{kind}.{name}")) is not int]
    if lacking:
        raise CheckpointError(checkpoint.path, f"does not say {' nor '.join(lacking)}: get a GGUF file of a whole model")
    words = checkpoint.config.get("tokenizer.ggml.tokens")
    if isinstance(words, dict) and values["vocab_size"] is None:
        values["vocab_size"] = words.get("count")
    return replace(checkpoint, config={"model_type": kind, **{key: value for key, value in values.items() if type(value) is int}})


def _language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model, which stands one level down in models that see or hear."""
    inner = (config.get(key) for key in INNER_CONFIGS)
    return next((found for found in inner if isinstance(found, dict) and not set(_HIDDEN).isdisjoint(found)), config)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(config[key]) for key in keys if type(config.get(key)) is int and config[key] > 0), None)


def _tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Map each name to the one whose bytes it shares, where the file has both."""
    return {name: tie.names[0] for tie in ties(checkpoint) for name in tie.names[1:]}


def _tree(checkpoint: Checkpoint) -> _Tree:
    root: _Tree = {}
    for tensor in checkpoint.tensors:
        *path, name = tensor.name.split(".")
        place = root
        for step in path:
            place = place.setdefault(step, {})
        integer = tensor.dtype if tensor.dtype.startswith(("int", "uint", "bool")) else None
        place.setdefault("", []).append((tensor.name, ParameterSpec(name=name, shape=tensor.shape, dtype=integer)))
    return root


def _add_block(class_name: str, tree: _Tree, blocks: list[Block]) -> int:
    """Add the block of a module, after those inside it; return its place in `blocks`. Blocks that are alike are one."""
    children = tuple(
        Child(name=name, block=_add_block("Repeated" if _NUMBER.fullmatch(name) else "Module", inside, blocks))
        for name, inside in tree.items()
        if name
    )
    named = tree.get("", [])
    kinds = {kind_of(full) for full, _ in named}
    flat = any(tensor.name == "weight" and len(tensor.shape) == 2 for _, tensor in named)
    block = Block(
        class_name=class_name,
        tensors=tuple(tensor for _, tensor in named),
        children=children,
        linear="linear" if flat and not kinds & {"embedding", "norm"} else None,
        exempt="head" in kinds,
    )
    if block not in blocks:
        blocks.append(block)
    return blocks.index(block)
