"""Checkpoints as directories, files and hub repositories: what is read, what is refused, and what travels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.checkpoint import reader
from harness.checkpoint.formats.files import Directory
from harness.checkpoint.reader import Checkpoint, StoredTensor, read
from harness.core.errors import CheckpointError, UsageError
from tests.support.gguf_files import small_gguf
from tests.support.hub_server import COMMIT, HubServer, serving
from tests.support.packed_files import write_packed

ROOT = Path(__file__).parents[2]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "max_position_embeddings": 128,
}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    layers = {
        f"model.layers.{layer}.{name}.weight": torch.zeros(shape, dtype=dtype)
        for layer in range(2)
        for name, shape in {"self_attn.q_proj": (8, 8), "mlp.up_proj": (32, 8), "input_layernorm": (8,)}.items()
    }
    return {"model.embed_tokens.weight": torch.zeros(16, 8, dtype=dtype), **layers, "model.norm.weight": torch.ones(8)}


def total(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def write_config(folder: Path, config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, suffix: str, stem: str) -> Path:
    """Write two shards and their index."""
    write_config(folder)
    state = list(weights().items())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((dict(state[:4]), dict(state[4:])), start=1):
        name = f"{stem}-{number:05}-of-00002.{suffix}"
        save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_index(folder: Path, *shards: str) -> Path:
    write_config(folder)
    mapped = {f"t{number}": name for number, name in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_config(tmp_path / "model")
    safetensors.torch.save_file(weights(), tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


# What is read


def test_a_directory_with_one_file(model: Path) -> None:
    checkpoint = read(model)
    assert checkpoint.path == str(model)
    assert checkpoint.bytes == total(weights())
    assert checkpoint.parameters == sum(tensor.numel() for tensor in weights().values())
    assert checkpoint.dtype_bytes == {"bfloat16": total(weights()) - 32, "float32": 32}
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.context_length == 128
    assert checkpoint.quantization is None
    assert checkpoint.size("n_embd", "hidden_size") == 8
    (file,) = checkpoint.files
    assert (file.name, file.bytes, file.format) == ("model.safetensors", (model / file.name).stat().st_size, "safetensors")


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_give_the_same_totals(tmp_path: Path, suffix: str, stem: str) -> None:
    checkpoint = read(write_sharded(tmp_path / "model", suffix, stem))
    assert checkpoint.bytes == total(weights())
    assert {tensor.name for tensor in checkpoint.tensors} == set(weights())
    assert [file.name for file in checkpoint.files] == [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    assert {tensor.file for tensor in checkpoint.tensors} == {file.name for file in checkpoint.files}


def test_the_order_is_that_of_transformers(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", "bin", "pytorch_model")
    small_gguf(folder / "x.gguf")
    torch.save({"one": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert [tensor.name for tensor in read(folder).tensors] == ["one"]
    write_sharded(folder, "safetensors", "model")
    assert [file.format for file in read(folder).files] == ["safetensors", "safetensors"]
    safetensors.torch.save_file({"two": torch.zeros(1)}, folder / "model.safetensors")
    assert [tensor.name for tensor in read(folder).tensors] == ["two"]


def test_a_single_file_uses_the_config_beside_it(model: Path) -> None:
    checkpoint = read(model / "model.safetensors")
    assert checkpoint.path == str(model / "model.safetensors")
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors == read(model).tensors


def test_a_gguf_speaks_for_itself(tmp_path: Path) -> None:
    path = small_gguf(write_config(tmp_path / "model") / "small.gguf")
    for checkpoint in (read(path), read(path.parent)):
        assert checkpoint.architecture == "llama"
        assert checkpoint.context_length == 2048
        assert checkpoint.quantization == "gguf q4_1, q8_0"
        assert checkpoint.parameters == 3 * 64 + 2 * 32 + 5
        assert checkpoint.bytes == 3 * 64 // 32 * 34 + 2 * 20 + 10


def test_a_gguf_in_parts_is_read_whole(tmp_path: Path) -> None:
    for part in (1, 2):
        small_gguf(tmp_path / f"m-{part:05}-of-00002.gguf")
    assert len(read(tmp_path).files) == 2
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing: 'm-00002-of-00002"):
        read(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing: 'm-00001-of-00002"):
        read(tmp_path)
    for name in ("z-00000-of-00000.gguf", "z-00007-of-00002.gguf"):
        assert len(read(small_gguf(tmp_path / name)).files) == 1


def test_shared_bytes_count_once_and_repeated_ones_twice(tmp_path: Path) -> None:
    embed = torch.zeros(16, 8)
    torch.save({"embed": embed, "head": embed, "again": embed.clone()}, write_config(tmp_path) / "pytorch_model.bin")
    checkpoint = read(tmp_path)
    assert len(checkpoint.tensors) == 3
    assert checkpoint.bytes == 2 * 16 * 8 * 4
    assert checkpoint.parameters == 2 * 16 * 8
    assert checkpoint.dtype_bytes == {"float32": checkpoint.bytes}


def test_a_hub_cache_is_a_directory_of_links(model: Path, tmp_path: Path) -> None:
    repository = write_sharded(tmp_path / "models--o--m" / "blobs", "safetensors", "model").parent
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((repository / "blobs").iterdir())):
        path.rename(path.with_name(f"{number}" * 40))
        (snapshot / path.name).symlink_to(Path("../../blobs") / (f"{number}" * 40))
    assert read(snapshot).bytes == read(model).bytes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq 4-bit, groups of 128"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}}, "awq 4-bit, groups of 64"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes 8-bit"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            "bitsandbytes 4-bit nf4",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}},
            "compressed-tensors 4-bit",
        ),
        ({"wbits": 4, "groupsize": 128}, "gptq 4-bit, groups of 128"),
        ({"wbits": 8, "groupsize": -1}, "gptq 8-bit"),
        ({"wbits": 32, "groupsize": 128}, None),
        ({"quantization_bit": 4}, "chatglm 4-bit"),
        ({"quantization_bit": 0}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "\x1b[31m", "bits": "4"}}, "unknown method"),
    ],
)
def test_quantization_in_words(config: dict[str, Any], words: str | None) -> None:
    assert Checkpoint(path="x", config=config, tensors=(), files=()).quantization == words


def packed(name: str, dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(name=name, dtype=dtype, shape=shape, bytes=1, file="f")


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        # MOSS int4, out_proj of one block
        (
            {"wbits": 4, "groupsize": 128},
            [
                packed("h.0.out.qweight", "int32", 768, 6144),
                packed("h.0.out.qzeros", "int32", 48, 768),
                packed("h.0.out.scales", "float16", 48, 6144),
                packed("h.0.out.g_idx", "int32", 6144),
            ],
            6144 * 6144,
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            [
                packed("q.weight", "uint8", 32, 1),
                packed("q.weight.absmax", "float32", 1),
                packed("q.weight.quant_map", "float32", 16),
                packed("q.weight.quant_state.bitsandbytes__nf4", "uint8", 86),
            ],
            64,
        ),
        ({"quantization_bit": 4}, [packed("d.weight", "int8", 8, 4), packed("d.weight_scale", "float16", 8)], 64),
        ({"quantization_bit": 8}, [packed("d.weight", "int8", 8, 8), packed("d.weight_scale", "float16", 8)], 64),
        ({}, [packed("up_blocks", "uint8", 2, 16), packed("up_scales", "uint8", 2)], 64),
        ({}, [packed("h.0.attn.bias", "float32", 1, 1, 9, 9), packed("h.0.attn.c_attn.bias", "float32", 9)], 9),
        ({}, [packed("h.0.attn.causal_mask", "bool", 1, 1, 9, 9), packed("rotary_emb.inv_freq", "float32", 9)], 0),
    ],
)
def test_parameters_are_weights_and_not_their_packing(config: dict[str, Any], tensors: list[StoredTensor], parameters: int) -> None:
    assert Checkpoint(path="x", config=config, tensors=tuple(tensors), files=()).parameters == parameters


# What is refused


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/../../b.safetensors",
        "..\\b.safetensors",
        "C:\\b.safetensors",
        "",
        "\n.bin",
    ],
)
def test_an_index_must_stay_in_its_directory(tmp_path: Path, shard: str) -> None:
    safetensors.torch.save_file({"t0": torch.zeros(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="outside its directory") as caught:
        read(write_index(tmp_path / "model", shard))
    assert caught.value.path.endswith("model.safetensors.index.json")


def test_a_link_that_an_index_names_must_not_leave(tmp_path: Path) -> None:
    safetensors.torch.save_file({"t0": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = write_index(tmp_path / "model", "a.safetensors")
    (folder / "a.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(CheckpointError, match="outside its directory"):
        read(folder)
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError):
        read(folder)
    (folder / "a.safetensors").unlink()
    (folder / "sub").mkdir()
    safetensors.torch.save_file({"t0": torch.zeros(1)}, folder / "sub" / "b.safetensors")
    (folder / "a.safetensors").symlink_to("sub/b.safetensors")
    assert read(folder).bytes == 4


def test_the_index_of_the_most_experts_that_are_published_is_read(tmp_path: Path) -> None:
    """Four parts of each of 92,160 experts' weights in GPTQ."""
    stored = write_packed(tmp_path, "Qwen3.5-397B-A17B", 4, 128)
    assert reader.read(tmp_path).bytes == stored


def test_an_index_of_endlessly_many_shards_is_refused_before_one_is_looked_for(tmp_path: Path) -> None:
    where = {f"t{number}": f"{number}.safetensors" for number in range(reader.MOST_SHARDS + 1)}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match=r"names 8,193 shards, and no model has more than 8,192: correct the index"):
        reader.shard_names(Directory(tmp_path), "model.safetensors.index.json")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(("kinds", "reads"), [("bin bin", True), ("bin safetensors", True), ("safetensors bin", False)])
def test_shards_of_two_kinds_are_refused_where_transformers_cannot_read_them(
    index: str, kinds: str, reads: bool, tmp_path: Path
) -> None:
    names, files = ("model.norm.weight", "lm_head.weight"), [f"{number}.{kind}" for number, kind in enumerate(kinds.split())]
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1, vocab_size=8)
    weights = dict(LlamaForCausalLM(config).state_dict())
    config.save_pretrained(tmp_path)
    where = {name: files[name in names] for name in weights}
    for file in files:
        part = {name: weights[name].clone() for name in weights if where[name] == file}
        if file.endswith("safetensors"):
            safetensors.torch.save_file(part, tmp_path / file, metadata={"format": "pt"})
        else:
            torch.save(part, tmp_path / file)
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    try:
        LlamaForCausalLM.from_pretrained(tmp_path)
    except safetensors.SafetensorError:
        assert not reads
        with pytest.raises(CheckpointError, match=r"'0\.safetensors' and '1\.bin', and transformers reads all as .* first"):
            reader.shard_names(Directory(tmp_path), index)
    else:
        assert reads
        assert reader.shard_names(Directory(tmp_path), index) == files


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "model", *(f"{n}.safetensors" for n in range(20)))
    with pytest.raises(
        CheckpointError, match=r"20 of 20 shards are missing: '0.safetensors', .* and 12 more: complete the download"
    ):
        read(folder)


@pytest.mark.parametrize("name", ["config.json", "x.gguf", "model"])
def test_a_shard_must_be_a_file_of_weights(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither \.safetensors nor \.bin"):
        read(write_index(tmp_path / "model", name))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "n_positions", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, "4096", 4096.5, True, [], {"a": 1}, [8, 0], 1 << 40, 1e400])
def test_a_size_in_a_config_is_a_size(model: Path, key: str, value: Any) -> None:
    if value == []:
        value = [[]]
    write_config(model, {**CONFIG, key: value})
    with pytest.raises(CheckpointError, match=f"config.json: gives '{key}' as .*; it must be a whole number"):
        read(model)
    write_config(model, {"text_config": {**CONFIG, key: value}})
    with pytest.raises(CheckpointError, match=f"gives '{key}'"):
        read(model)


def test_sizes_are_found_one_level_down_and_missed_by_name(model: Path) -> None:
    write_config(model, {"text_config": {**CONFIG, "head_dim": None}, "max_position_embeddings": None})
    checkpoint = read(model)
    assert checkpoint.size("hidden_size") == 8
    assert checkpoint.context_length == 128
    with pytest.raises(CheckpointError, match=r"config.json: gives no 'head_dim' or 'n_embd'"):
        checkpoint.size("head_dim", "n_embd")


def test_without_a_config_the_weights_are_still_shown(model: Path) -> None:
    (model / "config.json").unlink()
    checkpoint = read(model)
    assert (checkpoint.bytes, checkpoint.architecture, checkpoint.context_length) == (total(weights()), None, None)


@pytest.mark.parametrize("architectures", [None, [], "x", [3], ["\x1b[2J"], {"a": 1}])
def test_an_architecture_that_is_no_name_is_passed_over(model: Path, architectures: Any) -> None:
    write_config(model, {"architectures": architectures, "model_type": "llama"})
    assert read(model).architecture == "llama"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for name in ("nowhere", "x" * 5000, "nul\0"):
        with pytest.raises(CheckpointError, match=r"neither a directory nor a file|is no path"):
            read(tmp_path / name)
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights: model\.safetensors, .* it has 'config\.json'"):
        read(tmp_path)
    with pytest.raises(UsageError, match="no file of weights"):
        read(tmp_path / "config.json")
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        small_gguf(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files; name one, by its path or --file: 'a.gguf', 'b.gguf'"):
        read(tmp_path)


@pytest.mark.parametrize(("whole", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_the_index_that_is_missing_is_named(tmp_path: Path, whole: str, suffix: str) -> None:
    """Shards without it are no less than a loader needs: transformers does not find them."""
    write_config(tmp_path)
    for part in (1, 2):
        (tmp_path / f"{whole}-0000{part}-of-00002.{suffix}").write_bytes(b"")
    said = f"has '{whole}-00001-of-00002.{suffix}', '{whole}-00002-of-00002.{suffix}' without {whole}.{suffix}.index.json, by which"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes as files are POSIX")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    write_config(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no weights"):
        read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(model: Path) -> None:
    (model / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(model)


def test_a_sparse_giant_is_refused_at_once(model: Path) -> None:
    started = time.process_time()
    for name in ("config.json", "model.safetensors"):
        with (model / name).open("r+b") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(CheckpointError, match=rf"{name}: has 1\.00 TiB|{name}: holds .* bytes behind its last tensor"):
            read(model)
        write_config(model)
    assert time.process_time() - started < 1


def test_the_module_is_light() -> None:
    heavy = {"torch", "numpy", "huggingface_hub", "transformers"}
    code = f"import sys, harness.checkpoint.size_breakdown; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "set()"


# The hub

READ_HUB = """
import json, sys
from harness.checkpoint.reader import read_hub
from harness.core.errors import HarnessError
for line in sys.argv[1:]:
    arguments = json.loads(line)
    try:
        found = read_hub(**arguments)
        said = {"path": found.path, "bytes": found.bytes, "tensors": len(found.tensors), "architecture": found.architecture}
    except HarnessError as error:
        said = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(said))
"""


def read_hub(cache: Path, endpoint: str, *calls: dict[str, str], **environment: str) -> list[dict[str, Any]]:
    """Call read_hub in a process of its own, because huggingface_hub reads its settings when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("HF_") and "PROXY" not in name.upper()}
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-W", "error", "-c", READ_HUB, *map(json.dumps, calls)]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **settings}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


BIG = {"model.embed_tokens.weight": torch.zeros(1024, 1024), "model.norm.weight": torch.ones(8)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    for name in ("single", "elsewhere", "wholesale", "gated", "gated-closed", "broken"):
        safetensors.torch.save_file(BIG, write_config(root / "o" / name) / "model.safetensors")
    write_sharded(root / "o" / "sharded", "safetensors", "model")
    torch.save(BIG, write_config(root / "o" / "zip") / "pytorch_model.bin")
    torch.save(BIG, write_config(root / "o" / "wholesale-zip") / "pytorch_model.bin")
    torch.save(BIG, write_config(root / "o" / "legacy") / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for name in ("a.gguf", "b.gguf"):
        small_gguf(write_config(root / "o" / "gguf") / name)
    write_index(root / "o" / "escaping", "../other/model.safetensors")
    with serving(root) as server:
        yield server


def test_only_headers_travel(hub: HubServer, tmp_path: Path) -> None:
    names = ("single", "zip", "legacy", "elsewhere")
    before = hub.sent
    found = read_hub(tmp_path, hub.endpoint, *({"repo_id": f"o/{name}"} for name in names), HF_TOKEN="hf_secret")
    assert [answer["bytes"] for answer in found] == [total(BIG)] * 4, found
    assert [answer["path"] for answer in found] == [f"o/{name}" for name in names]
    assert hub.sent - before < 500_000 < total(BIG) // 8
    assert hub.leaked_tokens == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_shards_gguf_and_revisions_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    calls = [
        {"repo_id": "o/sharded", "revision": "main"},
        {"repo_id": "o/gguf", "file": "b.gguf"},
        {"repo_id": "o/gguf"},
        {"repo_id": "o/gguf", "file": "c.gguf"},
        {"repo_id": "o/single", "revision": "v9"},
        {"repo_id": "o/escaping"},
    ]
    sharded, gguf, several, typo, revision, escaping = read_hub(tmp_path, hub.endpoint, *calls)
    assert sharded["bytes"] == total(weights())
    assert (gguf["tensors"], gguf["architecture"]) == (3, "llama")
    assert "o/gguf: has 2 GGUF files; name one, by its path or --file: 'a.gguf', 'b.gguf'" in several["message"]
    assert "did you mean" in typo["message"]
    assert revision["error"] == "UsageError"
    assert "no such revision" in revision["message"]
    assert "outside its directory" in escaping["message"]


def test_a_hub_that_refuses_is_told_apart(hub: HubServer, tmp_path: Path) -> None:
    names = ("gated", "gated-closed", "missing", "broken", "wholesale", "wholesale-zip", "garbled", "a/b/c")
    calls = [{"repo_id": name if "/" in name else f"o/{name}"} for name in names]
    gated, closed, missing, broken, wholesale, whole_zip, garbled, no_id = read_hub(tmp_path, hub.endpoint, *calls)
    assert "is gated: accept its terms" in gated["message"]
    assert "is gated" in closed["message"]
    assert "no such model" in missing["message"]
    assert "refused (HTTP 503)" in broken["message"]
    assert wholesale["bytes"] == total(BIG)
    assert "sends only whole files" in whole_zip["message"]
    assert "not the hub" in garbled["message"]
    assert "neither a directory here nor a hub id" in no_id["message"]
    refusals = (gated, closed, missing, broken, garbled, no_id)
    assert {answer["error"] for answer in refusals} == {"UsageError"}


def test_offline_is_not_gated(tmp_path: Path) -> None:
    (offline,) = read_hub(tmp_path, "http://127.0.0.1:9", {"repo_id": "o/gated"}, HF_HUB_OFFLINE="1")
    assert offline["error"] == "UsageError"
    assert offline["message"].startswith("offline")
    assert "gated:" not in offline["message"]
    (unreachable,) = read_hub(tmp_path, "http://127.0.0.1:9", {"repo_id": "o/gated"})
    assert "cannot be reached (ConnectError)" in unreachable["message"]


def test_what_is_in_the_cache_needs_no_network(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--o--m"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).rename(repository / "blobs" / name.replace(".", "0"))
        (snapshot / name).symlink_to(f"../../blobs/{name.replace('.', '0')}")
    (found,) = read_hub(tmp_path / "home", "http://127.0.0.1:9", {"repo_id": "o/m"}, HF_HUB_OFFLINE="1")
    assert found == {"path": "o/m", "bytes": total(weights()), "tensors": 8, "architecture": "LlamaForCausalLM"}
    (snapshot / "model.safetensors").unlink()
    (partial,) = read_hub(tmp_path / "home", "http://127.0.0.1:9", {"repo_id": "o/m"}, HF_HUB_OFFLINE="1")
    assert partial["message"].startswith("offline")
