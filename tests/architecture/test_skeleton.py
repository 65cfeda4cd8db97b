"""Skeletons: what is shipped agrees with the published totals and with transformers' own models, and needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers.activations import ACT2FN

from harness.architecture import skeleton, skeleton_source
from harness.catalog import shipped
from harness.checkpoint.published import published
from harness.core.errors import UsageError
from harness.data import DATA

CATALOG = shipped.catalog()
# Where a config stands: a repository, and a file of it at a commit or a release, or one of its threads.
PLACE = re.compile(r"[\w.-]+/[\w.-]+ (?:\S+ @[\w.]{6,}|(?:issue|pull) \d+)")
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", CATALOG)
def test_total_is_the_published_one(name: str) -> None:
    assert skeleton_source.named(name).parameters == CATALOG[name].parameters


@pytest.mark.parametrize("name", CATALOG)
def test_total_is_what_others_publish(name: str) -> None:
    entry, stored = CATALOG[name], published(name)
    head = sum(weight.elements for weight in skeleton_source.named(name).weights if weight.tied_to)
    counted = {entry.parameters, entry.parameters + (head if stored and stored.repeats_head else 0)}
    assert min(abs(number / entry.published - 1) for number in counted) < 0.01
    assert entry.published_by


@pytest.mark.parametrize("name", CATALOG)
def test_a_config_stands_in_a_public_repository(name: str) -> None:
    source = CATALOG[name].source
    assert PLACE.search(source)
    # Neither decides a shape.
    assert set(re.findall(r"(\S+) from memory", source)) <= {"torch_dtype", "rope_theta"}


def test_what_no_public_file_says_is_told_where_a_user_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    from harness.cli.entry import main

    unsure = [name for name, entry in CATALOG.items() if entry.doubts]
    assert unsure == [name for name in CATALOG if re.search(r"torch_dtype from memory|not confirmed", CATALOG[name].source)]
    for model, said in (("phi-1_5", "dtype not confirmed"), ("olmo-3-1025-7b", "context not confirmed")):
        for command in (["plan", model, "--gpu", "RTX 3060 12GB", "--ram", "32GiB"], ["inspect", model]):
            main(command)
            assert said in capsys.readouterr().out
    main(["inspect", "qwen2.5-7b-instruct"])
    assert "not confirmed" not in capsys.readouterr().out


def test_catalog_has_its_models_under_short_names_too() -> None:
    assert len(CATALOG) >= 150
    assert shipped.hub_id("qwen2.5-7b-instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert shipped.hub_id("ChatGLM-6B") == shipped.hub_id("thudm/chatglm-6b") == "THUDM/chatglm-6b"
    assert len({name.rpartition("/")[2].casefold() for name in CATALOG}) == len(CATALOG)


def test_unknown_name_is_answered_with_its_neighbor() -> None:
    with pytest.raises(UsageError, match=r"no model 'chatglm-6' in the catalog: did you mean .*'chatglm-6b'"):
        skeleton_source.named("chatglm-6")


def test_planning_a_catalog_model_needs_neither_torch_nor_time() -> None:
    code = (
        "import sys, time; from harness.planning.device_map import infer, recommended;"
        "from harness.architecture import skeleton_source; start = time.perf_counter();"
        "skeleton_source.named('qwen2.5-72b-instruct'); print(time.perf_counter() - start);"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parent.parent)
    seconds, heavy = done.stdout.split("\n")[:2]
    assert heavy == "[]"
    assert float(seconds) < 0.02


def test_shipped_data_is_small() -> None:
    assert sum(file.stat().st_size for file in DATA.glob("*.json*")) < 1_500_000


def test_tensors_carry_full_names_shapes_and_what_quantizers_do() -> None:
    weights = {weight.path: weight for weight in skeleton_source.named("qwen2.5-0.5b-instruct").weights}
    assert weights["model.layers.23.self_attn.k_proj.weight"].tensor.shape == (128, 896)
    assert weights["model.layers.23.self_attn.k_proj.weight"].quantizes
    assert not weights["model.layers.23.self_attn.k_proj.bias"].quantizes
    assert not weights["lm_head.weight"].quantizes
    assert weights["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert weights["model.rotary_emb.inv_freq"].tensor.kind == "unsaved"
    assert weights["model.rotary_emb.inv_freq"].tensor.dtype == "float32"


def test_repeated_blocks_are_stored_once() -> None:
    model = skeleton_source.named("llama-3.3-70b-instruct")
    assert len(model.blocks) < 20
    assert sum(module.whole for module in model.root.walk()) == len(model.layers) == 80


@pytest.mark.parametrize(
    "name", ["llama-3.3-70b-instruct", "gemma-3-1b-it", "gpt-oss-20b", "deepseek-v2-lite-chat", "chatglm-6b", "phi-2"]
)
def test_pieces_hold_every_tensor_once_and_are_counted_by_kind(name: str) -> None:
    model = skeleton_source.named(name)
    named = [
        f"{path}{weight.path.removeprefix(like.path)}"
        for path, _, like in model.pieces
        for module in like.walk()
        for weight in module.weights
    ]
    assert named == [weight.path for weight in model.weights]
    assert sum(count for _, count in model.tally) == len(named)
    assert sum(weight.elements * count for weight, count in model.tally) == sum(weight.elements for weight in model.weights)
    assert len(model.kinds) < 12


def test_pieces_with_tied_weights_are_like_no_other() -> None:
    """Two equal tables in a list; the second is the first's."""
    table = skeleton.Block(class_name="Embedding", tensors=(skeleton.ParameterSpec(name="weight", shape=(8, 4)),))
    root = skeleton.Block(class_name="Model", children=(skeleton.Child(name="0", block=0, count=4),))
    plain = msgspec.structs.replace(skeleton_source.named("phi-2"), blocks=(table, root), tied={})
    tied = msgspec.structs.replace(plain, tied={"3.weight": "1.weight"})
    assert [piece.like.path for piece in plain.pieces] == ["0", "0", "0", "0"]
    assert [piece.like.path for piece in tied.pieces] == ["0", "1", "0", "3"]
    assert (plain.parameters, tied.parameters) == (128, 96)


def test_tensors_beside_modules_are_told_apart_by_more_than_their_numbers() -> None:
    scales = (skeleton.ParameterSpec(name="scale1", shape=(8,)), skeleton.ParameterSpec(name="scale2", shape=(4,)))
    norm = skeleton.Block(class_name="Norm", tensors=(skeleton.ParameterSpec(name="weight", shape=(8,)),))
    part = skeleton.Block(class_name="Part", tensors=scales, children=(skeleton.Child(name="norm", block=0),))
    root = skeleton.Block(class_name="Model", children=(skeleton.Child(name="0", block=1, count=3),))
    model = msgspec.structs.replace(skeleton_source.named("phi-2"), blocks=(norm, part, root))
    assert [(weight.path, count) for weight, count in model.tally] == [("0.scale1", 3), ("0.scale2", 3), ("0.norm.weight", 3)]
    assert model.parameters == 60


def test_float32_parts_of_half_models_are_marked() -> None:
    kept = {weight.path for weight in skeleton_source.named("gpt-oss-20b").weights if weight.tensor.fp32}
    assert "model.norm.weight" in kept
    assert "model.layers.3.input_layernorm.weight" in kept
    assert not any("proj" in path or "embed" in path for path in kept)


@pytest.mark.parametrize(
    ("name", "layers", "per_token", "windows"),
    [
        ("chatglm-6b", 28, 2 * 32 * 128, {None}),
        ("chatglm2-6b", 28, 2 * 2 * 128, {None}),
        ("mistral-nemo-instruct-2407", 40, 2 * 8 * 128, {None}),
        ("gemma-3-1b-it", 26, 2 * 256, {None, 512}),
        ("gpt-oss-20b", 24, 2 * 8 * 64, {None, 128}),
        ("moss-moon-003-sft", 34, 2 * 24 * 256, {None}),
        ("internlm2-chat-20b", 48, 2 * 8 * 128, {None}),
    ],
)
def test_cache_by_layer(name: str, layers: int, per_token: int, windows: set[int | None]) -> None:
    model = skeleton_source.named(name)
    found = [model.attention[i] for i in model.layers]
    assert len(found) == layers
    assert {layer.per_token for layer in found} == {per_token}
    assert {layer.window for layer in found} == windows


def test_latent_attention_caches_its_latent() -> None:
    model = skeleton_source.named("deepseek-v2-lite-chat")
    layer = model.attention[model.layers[0]]
    assert layer.per_token == 512 + 64
    assert layer.expanded == 16 * (192 + 128)


def test_described_models_have_the_tensors_of_their_checkpoints() -> None:
    chatglm = {weight.path: weight.tensor.shape for weight in skeleton_source.named("chatglm-6b").weights}
    # 368 in the checkpoint's index, 28 of them the frequencies of the rotary embedding, which loading ignores.
    assert len(chatglm) == 368 - 28
    assert chatglm["transformer.layers.27.attention.query_key_value.weight"] == (12288, 4096)
    assert all(weight.tensor.dtype is None for weight in skeleton_source.named("chatglm-6b").weights)
    assert "model.layers.0.self_attn.W_pack.weight" in {w.path for w in skeleton_source.named("baichuan2-7b-chat").weights}
    assert skeleton_source.named("baichuan2-13b-chat").no_split == ("BaichuanLayer",)


def test_config_that_differs_where_no_shape_does_finds_the_shipped_skeleton() -> None:
    config = CATALOG["Qwen/Qwen2.5-7B-Instruct"].config
    told = config | {
        "transformers_version": "4.43.1",
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "dtype": "float16",
    }
    assert skeleton_source.shipped(told) == skeleton_source.named("qwen2.5-7b-instruct")
    assert skeleton_source.shipped(config | {"num_hidden_layers": 29}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "x"),
        ("hidden_act", 5),
        ("rms_norm_eps", "1e-6"),
        ("use_cache", "yes"),
        ("auto_map", []),
        ("pad_token_id", {}),
    ],
)
def test_a_value_that_transformers_may_refuse_finds_no_shipped_skeleton(key: str, value: object) -> None:
    assert skeleton_source.shipped(CATALOG["Qwen/Qwen2.5-7B-Instruct"].config | {key: value}) is None


def test_an_unknown_activation_is_named_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gives hidden_act as 'x', and transformers 5[.\d]* makes no working model of that"):
        skeleton_source.build(CATALOG["HuggingFaceTB/SmolLM2-135M-Instruct"].config | {"hidden_act": "x"}, tmp_path)


def test_the_activations_that_say_nothing_of_a_shape_are_those_of_transformers() -> None:
    assert not skeleton_source.ACTIVATIONS - set(ACT2FN)


def test_other_models_are_built_by_a_worker_once(tmp_path: Path) -> None:
    model = skeleton_source.build(TINY_LLAMA, tmp_path)
    assert model.model_class == "LlamaForCausalLM"
    assert model.parameters == 256 * 64 + 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    start = time.process_time()
    assert skeleton_source.build(TINY_LLAMA, tmp_path) == model
    assert time.process_time() - start < 0.2
    kept = next(tmp_path.iterdir())
    kept.write_bytes(b'{"model_class": "of another version"}')
    assert skeleton_source.build(TINY_LLAMA, tmp_path) == model


def test_unknown_architecture_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no skeleton for model_type 'nonesuch': transformers 5[.\d]* has no class for it"):
        skeleton_source.build({"model_type": "nonesuch"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["qwen2.5-0.5b-instruct", "chatglm2-6b", "moss-moon-003-sft", "chatglm-6b", "deepseek-v2-lite-chat"]
)
def test_shipped_skeletons_are_what_the_worker_builds(name: str) -> None:
    from harness.worker import build_skeleton as worker

    found = skeleton_source.named(name)
    assert msgspec.structs.replace(worker.build_skeleton(CATALOG[shipped.hub_id(name)].config), source=found.source) == found


HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_hidden_layers": 4,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8},
    "lfm2": {"full_attn_idxs": [2], "block_multiple_of": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_dt_rank": 8, "use_mamba_kernels": False},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_states_take_what_a_real_cache_holds_in_16_bits(kind: str) -> None:
    """Some models keep a state in float32 whatever they are, some in their own dtype."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from harness.models.cache_argument import kv_cache_of
    from harness.planning.cost.memory import kv_bytes
    from harness.worker import build_skeleton as worker

    config = TINY_LLAMA | HYBRIDS[kind] | {"model_type": kind}
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = model(torch.ones((2, 24), dtype=torch.long), use_cache=True)
    held = [
        sum(part.nbytes for part in worker.tensors_in(vars(layer)) if part.dim() > 1) for layer in kv_cache_of(out).layers
    ]  # fmt: skip
    assert kv_bytes(worker.build_skeleton(config), 24, 2, 2) == held


def test_layers_of_linear_attention_keep_a_state_of_fixed_size() -> None:
    from harness.worker import build_skeleton as worker

    sizes = {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = worker.build_skeleton(TINY_LLAMA | sizes | experts | {"model_type": "qwen3_next", "num_hidden_layers": 4})
    kinds = [model.attention[i] for i in model.layers]
    # Four heads of 8 x 8, and the last four inputs of a convolution over queries, keys and values.
    # The state stays in float32 in a model of 16 bits.
    assert [(kind.state, kind.float32_state) for kind in kinds] == [(4 * (2 * 16 + 32), 4 * 8 * 8)] * 3 + [(0, 0)]
    assert [kind.per_token for kind in kinds] == [0, 0, 0, 2 * 2 * 16]
