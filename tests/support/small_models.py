"""Models of random weights, a few megabytes each, of every kind of architecture; and the bytes that a loaded model really holds."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Skeleton
from harness.catalog import download
from harness.core.options import DEFAULT_MODEL
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Precision
from harness.measure.protocol import Load
from harness.planning.code import loading_code
from harness.planning.cost import estimate
from harness.planning.feasibility import gate
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.support.builders import case, machine, weight_bytes

_USUAL = {"vocab_size": 1500, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_GPT = {"vocab_size": 1500, "n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 512}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT = {
    **_USUAL, **_EXPERTS, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 8,
}  # fmt: skip

# model type -> config. So small that scales and code books count for more than in real models.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},  # tied, with biases
    "qwen3": {**_GROUPED, "head_dim": 64},
    "gemma2": {**_GROUPED, "head_dim": 64},  # tied
    "phi": _USUAL,  # biases everywhere
    "phi3": {**_GROUPED, "pad_token_id": 0},  # joined projections
    "glm": {**_GROUPED, "head_dim": 32, "pad_token_id": 0},
    "olmo2": _USUAL,
    "mixtral": {**_GROUPED, "intermediate_size": 256, "num_local_experts": 4},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "head_dim": 32, "num_experts": 8},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 200},
    "gpt_oss": {**_GROUPED, "intermediate_size": 128, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 192, "n_group": 2, "topk_group": 1},
    "gpt_neox": _USUAL,
    "stablelm": {**_USUAL, "num_key_value_heads": 8},
    "codegen": {**_GPT, "rotary_dim": 16, "n_ctx": 512},  # masks as buffers
    "gptj": {**_GPT, "rotary_dim": 16},
    "gpt2": _GPT,  # Conv1D, tied
    "opt": {
        "vocab_size": 1500, "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
        "max_position_embeddings": 512, "word_embed_proj_dim": 128,
    },
    "bloom": {"vocab_size": 1500, "hidden_size": 256, "n_layer": 2, "n_head": 8},
    "falcon": {"vocab_size": 1500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8},  # Linears of its own
    "mamba": {"vocab_size": 1500, "hidden_size": 256, "num_hidden_layers": 2},
}  # fmt: skip


# Every way of holding weights that makes something of these models in RAM, where its packages are installed.
WAYS: Mapping[str, Precision] = {
    name: row
    for name, row in PRECISIONS.items()
    if row.requires_checkpoint is None and gate(case(name, "cpu"), machine(), here=False) is None
}


def save(name: str, folder: Path, **settings: int) -> Skeleton:
    """Save the model with random weights in bfloat16; return its skeleton, built from the config that was written."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**MODELS[name], **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return worker.build_skeleton(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def write_letters(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of single characters from the space on, which ends a text; the last token is for all others."""
    letters = {chr(32 + index): index for index in range(vocabulary - 1)} | {"?unknown": vocabulary - 1}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="?unknown"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?unknown", eos_token=" ").save_pretrained(folder)


def save_talking(folder: Path) -> Path:
    """Save a Llama of random weights in float32, 100 MB for its vocabulary: that of the default model, with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **MODELS["llama"], eos_token_id=None)
    config.vocab_size = 49152
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    default = download.fetch(DEFAULT_MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default / name, folder / name)
    return folder


def load(folder: Path, way: Precision) -> PreTrainedModel:
    """Load in RAM by the code that `plan` prints; skip the test where a package is missing."""
    for module in way.needs:
        pytest.importorskip(module)
    code = loading_code(way, PLACEMENTS["cpu"], way.dtype)
    request = Load(model=str(folder), code=code, imports=way.needs, tokenizer=False)
    loaded, _ = work.load(request, lambda _: contextlib.nullcontext())
    return loaded.module


def estimated(skeleton: Skeleton, way: Precision) -> int:
    """Return the bytes of weights that the planner counts for a model that is not quantized yet."""
    spec = ModelSpec(name="small", source="small", skeleton=skeleton, stored={}, checkpoint_bytes=0)
    return sum(weight_bytes(skeleton, estimate.weight_format(way, way.dtype, spec, on_cards=False)).values())


def held_bytes(model: torch.nn.Module) -> int:
    """Count the storage of all parameters and buffers and of what bitsandbytes hangs on them, shared storage once.

    A tensor that is a view of a mapped file counts as itself.
    """
    sizes: dict[tuple[int, int], int] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        size = tensor.nbytes if storage.filename or tensor.is_meta else storage.nbytes()
        place = (id(tensor), 0) if tensor.is_meta else (tensor.data_ptr() if storage.filename else storage.data_ptr(), size)
        sizes[place] = size
    return sum(sizes.values())


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield from work.plain(tensor)
        state = getattr(tensor, "quant_state", None)
        owners = (tensor, state, getattr(state, "state2", None))
        hung = (getattr(owner, name, None) for owner in owners for name in ("CB", "SCB", "absmax", "code", "offset"))
        yield from (part for part in hung if isinstance(part, torch.Tensor))
