"""The anatomy of a checkpoint: blocks, kinds of module, ties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from harness.checkpoint.reader import Checkpoint, StoredTensor
from harness.checkpoint.size_breakdown import SizePart, anatomy, kind_of, ties


def tensor(name: str, *shape: int, dtype: str = "float16", storage: str | None = None) -> StoredTensor:
    elements = 1
    for extent in shape:
        elements *= extent
    return StoredTensor(name=name, dtype=dtype, shape=shape, bytes=elements * 2, file="f", storage=storage)


def checkpoint(tensors: Iterable[StoredTensor], **config: Any) -> Checkpoint:
    return Checkpoint(path="x", config=config, tensors=tuple(tensors), files=())


def llama_block(number: int, *, experts: int = 0) -> list[StoredTensor]:
    mlp = [f"mlp.experts.{expert}.up_proj" for expert in range(experts)] or ["mlp.up_proj"]
    block = [tensor(f"model.layers.{number}.{name}.weight", 4, 4) for name in ("self_attn.q_proj", *mlp)]
    return [*block, tensor(f"model.layers.{number}.input_layernorm.weight", 4)]


EMBED = tensor("model.embed_tokens.weight", 10, 4)
HEAD = tensor("lm_head.weight", 10, 4)
NORM = tensor("model.norm.weight", 4)


def shown(parts: list[SizePart]) -> list[tuple[str, int, str, int, int]]:
    return [(part.block, part.repeats, part.kind, part.tensors, part.bytes) for part in parts]


def test_equal_blocks_become_one_run() -> None:
    blocks = [t for number in (10, 2, 0, 1) for t in llama_block(number)]
    parts = anatomy(checkpoint([HEAD, NORM, *blocks, EMBED]))
    assert shown(parts) == [
        ("", 1, "embedding", 1, 80),
        ("model.layers.0-2,10", 4, "attention", 4, 128),
        ("model.layers.0-2,10", 4, "mlp", 4, 128),
        ("model.layers.0-2,10", 4, "norm", 4, 32),
        ("", 1, "head", 1, 80),
        ("", 1, "norm", 1, 8),
    ]
    assert sum(part.parameters for part in parts) == sum(part.bytes for part in parts) // 2


def test_blocks_that_differ_stay_apart() -> None:
    parts = anatomy(checkpoint([*llama_block(0), *llama_block(1, experts=3), *llama_block(2, experts=3)]))
    assert shown(parts) == [
        ("model.layers.0", 1, "attention", 1, 32),
        ("model.layers.0", 1, "mlp", 1, 32),
        ("model.layers.0", 1, "norm", 1, 8),
        ("model.layers.1-2", 2, "attention", 2, 64),
        ("model.layers.1-2", 2, "mlp", 6, 192),
        ("model.layers.1-2", 2, "norm", 2, 16),
    ]


def test_dtypes_are_kept_apart_and_shared_bytes_counted_once() -> None:
    mixed = [tensor("h.0.mlp.a", 4, storage="0"), tensor("h.0.mlp.b", 4, storage="0"), tensor("h.0.mlp.c", 8, dtype="int8")]
    (part,) = anatomy(checkpoint(mixed))
    assert (part.tensors, part.dtype_bytes) == (2, {"int8": 16, "float16": 8})


KINDS = {
    "embedding": "model.embed_tokens.weight transformer.wte.weight transformer.word_embeddings.weight token_embd.weight "
    "gpt_neox.embed_in.weight transformer.embedding.word_embeddings.weight model.decoder.embed_positions.weight",
    "head": "lm_head.weight lm_head.bias embed_out.weight transformer.output_layer.weight output.weight",
    "norm": "input_layernorm.weight post_attention_layernorm.bias ln_1.weight transformer.ln_f.bias attn_norm.weight "
    "self_attn.q_norm.weight transformer.final_layernorm.weight output_norm.weight",
    "attention": "self_attn.q_proj.weight attention.query_key_value.bias attn.qkv_proj.weight attn_q.weight attn.out_proj.qweight "
    "attention.rotary_emb.inv_freq self_attention.dense.weight attn.causal_mask",
    "mlp": "mlp.dense_h_to_4h.weight mlp.fc_in.weight ffn_gate.weight block_sparse_moe.experts.3.w1.weight feed_forward.w2.weight",
    "other": "rope_freqs.weight transformer.rotary_pos_emb.inv_freq mixer.conv1d.weight",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names.split()])
def test_the_kind_of_a_module(kind: str, name: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("name", ["layers." + "9" * 5000 + ".x", "." * 5000, "a.0.", ".0.x", "0.1.2.3", ""])
def test_any_name_has_an_anatomy(name: str) -> None:
    (part,) = anatomy(checkpoint([tensor(name, 2)]))
    assert part.bytes == 4


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        ([EMBED], {"tie_word_embeddings": True}, [(("model.embed_tokens.weight",), "absent", 0)]),
        ([EMBED, HEAD], {"tie_word_embeddings": True}, [(("model.embed_tokens.weight", "lm_head.weight"), "repeated", 80)]),
        ([EMBED, HEAD], {"tie_word_embeddings": False}, []),
        ([EMBED, HEAD], {}, []),
        ([EMBED], {}, []),
        ([EMBED], {"architectures": ["GPT2LMHeadModel"]}, [(("model.embed_tokens.weight",), "absent", 0)]),
        ([tensor("token_embd.weight", 4)], {"general.architecture": "llama"}, [(("token_embd.weight",), "absent", 0)]),
        (
            [tensor("transformer.word_embeddings.weight", 4), HEAD],
            {"model_type": "chatglm"},
            [(("transformer.word_embeddings.weight", "lm_head.weight"), "repeated", 80)],
        ),
        (
            [tensor("wte.weight", 4, storage="0"), tensor("lm_head.weight", 4, storage="0"), tensor("x", 0, storage="1")],
            {"tie_word_embeddings": True},
            [(("wte.weight", "lm_head.weight"), "shared", 0)],
        ),
    ],
)
def test_ties(tensors: list[StoredTensor], config: dict[str, Any], expected: list[tuple[tuple[str, ...], str, int]]) -> None:
    found = ties(checkpoint(tensors, **config))
    assert [(tie.names, tie.how, tie.extra_bytes) for tie in found] == expected
    assert [tie.extra_parameters for tie in found] == [extra // 2 for _, _, extra in expected]
