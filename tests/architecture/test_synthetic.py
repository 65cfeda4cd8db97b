"""Synthetic checkpoints have the shape of the real ones, load, and compute finite numbers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture import random_weights, skeleton_source, synthetic, validate
from harness.catalog import resolve
from harness.checkpoint import reader
from harness.cli.entry import main
from harness.core.errors import CheckpointError, UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Outcome
from harness.results.store import Store
from harness.worker import build_skeleton as worker
from tests.support import small_models
from tests.support.packed_files import save_awq, save_gptq, spec


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "codegen", "mixtral"])
def test_it_loads_and_computes_finite_numbers(name: str, kind: str, tmp_path: Path) -> None:
    small_models.save(name, tmp_path / "real")
    source = resolve.resolve(str(tmp_path / "real"))
    there = synthetic.write_synthetic(synthetic.describe(source, file_format=kind, shard_bytes=500_000), tmp_path / "twin")
    assert len(list(there.glob(f"*.{'bin' if kind == 'bin' else 'safetensors'}"))) > 1
    real, twin = reader.read(tmp_path / "real"), reader.read(there)
    assert (twin.parameters, twin.dtype_bytes) == (real.parameters, real.dtype_bytes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(there, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        logits = model.half()(torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "glm", "gpt_neox", "mixtral", "bloom"])
def test_activations_have_as_few_outliers_for_int8_as_those_of_trained_models(name: str, tmp_path: Path) -> None:
    """Norms before, behind and around layers: LLM.int8() takes every column with a number above 6 in 16 bits, which is slow."""
    settings = {"n_layer": 32} if name == "bloom" else {"num_hidden_layers": 32}
    small_models.save(name, tmp_path / "real", **settings)
    there = synthetic.write_synthetic(synthetic.describe(resolve.resolve(str(tmp_path / "real"))), tmp_path / "twin")
    model, columns, outliers = AutoModelForCausalLM.from_pretrained(there), 0, 0

    def count(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal columns, outliers
        highest = given[0].reshape(-1, given[0].shape[-1]).abs().amax(dim=0)
        columns, outliers = columns + len(highest), outliers + int((highest > 6).sum())

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(count)
    with torch.inference_mode():
        model(torch.arange(3, 67)[None])
    assert columns > 10_000
    assert outliers <= columns / 1000


def test_a_head_that_is_stored_again_is_tied_as_in_the_real_files(tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "real", tie_word_embeddings=True)
    once = synthetic.describe(resolve.resolve(str(tmp_path / "real")))
    (shard,) = once.shards
    embedding = next(tensor for tensor in shard if tensor.name == "model.embed_tokens.weight")
    head = msgspec.structs.replace(embedding, name="lm_head.weight", repeats=embedding.name)
    there = synthetic.write_synthetic(msgspec.structs.replace(once, shards=((*shard, head),)), tmp_path / "twin")
    model = AutoModelForCausalLM.from_pretrained(there)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_the_catalog_stores_again_repeats_its_original() -> None:
    made = synthetic.describe(resolve.resolve("chatglm-6b"))
    tensors = {tensor.name: tensor for shard in made.shards for tensor in shard}
    head, original = tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"]
    assert bytes(next(iter(random_weights.contents(head)))) == bytes(next(iter(random_weights.contents(original))))


PUBLISHED = {
    "chatglm-6b": (13_416_906_785, 0.0001),
    "chatglm2-6b": (12_487_168_064, 0.0001),
    "codegen-6b-mono": (14_266_839_040, 0.0),
    "stablelm-tuned-alpha-3b": (14_817_801_431, 0.0001),
    "qwen3-0.6b": (1_503_264_768, 0.0),
    "moss-moon-003-sft-int4": (10_783_000_000, 0.005),
    "moss-moon-003-sft-plugin-int8": (18_540_000_000, 0.005),
    "chatglm-6b-int4": (3_890_000_000, 0.005),
    "chatglm-6b-int8": (6_710_000_000, 0.005),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_bytes_of_the_published_files(name: str) -> None:
    """Differences are headers of zip files and buffers of rotary frequencies."""
    made = synthetic.describe(resolve.resolve(name))
    size, near = PUBLISHED[name]
    assert made.bytes == pytest.approx(size, rel=near)


def test_its_shards_are_cut_where_the_published_are() -> None:
    shards = synthetic.describe(resolve.resolve("stablelm-tuned-alpha-3b")).shards
    sizes = [sum(tensor.bytes for tensor in shard) for shard in shards]
    assert sizes == pytest.approx([10_161_140_290, 4_656_666_941], rel=0.0001)
    shards = synthetic.describe(resolve.resolve("chatglm2-6b")).shards
    assert len(shards) == 7
    assert sum(tensor.bytes for tensor in shards[0]) == pytest.approx(1_827_780_615, rel=0.0001)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-int4", "moss-moon-003-sft-int4", "moss-moon-003-sft-plugin-int8"])
def test_hollow_checkpoints_of_full_size_are_planned_from(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the catalog plans it before it is here, whatever its files hold beside the weights."""
    assert main(["synth", name, str(tmp_path / "hollow"), "--hollow"]) == 0
    capsys.readouterr()
    found, known = (plan_of(model, capsys) for model in (str(tmp_path / "hollow"), name))
    size, near = PUBLISHED[name]
    assert found["model"]["parameters"] == known["model"]["parameters"]
    assert found["model"]["checkpoint_bytes"] == pytest.approx(size, rel=near)
    weights, expected = ({plan["placement"]: held(plan) for plan in one["plans"] if plan["tiers"]} for one in (found, known))
    assert weights == pytest.approx(expected, rel=0.005)
    assert sum(file.stat().st_blocks for file in (tmp_path / "hollow").iterdir()) * 512 < 4 << 20  # a page a tensor


def plan_of(model: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["plan", model, "--gpu", "16GiB", "--ram", "32GiB", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def held(plan: Any) -> int:
    return sum(tier["weights_bytes"] for tier in plan["tiers"].values())


def test_writing_takes_the_memory_of_a_piece(tmp_path: Path) -> None:
    made = synthetic.describe(resolve.resolve("codegen-350m-mono"))
    tracemalloc.start()
    try:
        synthetic.write_synthetic(made, tmp_path / "twin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.bytes > 700 << 20
    assert peak < 200 << 20


def test_the_cache_keeps_it_and_lets_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    source = resolve.resolve(str(tmp_path / "real"))
    there = synthetic.fetch_synthetic(source)
    stamp = (there / "model.safetensors").stat().st_mtime_ns
    assert synthetic.fetch_synthetic(source) == there
    assert (there / "model.safetensors").stat().st_mtime_ns == stamp
    assert synthetic.is_synthetic(there)
    assert not synthetic.is_synthetic(tmp_path / "real")
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert not there.exists()
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert "no synthetic real in the cache" in capsys.readouterr().out


def test_runs_that_want_the_same_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    source = resolve.resolve(str(tmp_path / "real"))
    filled, begun, waits, fill = [], threading.Event(), threading.Event(), synthetic._fill

    def slow(*given: Any) -> None:
        filled.append(given)
        begun.set()
        assert waits.wait(60)
        fill(*given)

    def report(step: str, *_: object) -> None:
        if "waiting for another run" in step:
            waits.set()

    monkeypatch.setattr(synthetic, "_fill", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(synthetic.fetch_synthetic, source)
        assert begun.wait(60)
        second = pool.submit(synthetic.fetch_synthetic, source, report)
        assert first.result() == second.result()
    assert len(filled) == 1


def test_what_the_cache_holds_of_a_model_goes_whatever_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    source = resolve.resolve(str(tmp_path / "real"))
    twins = [synthetic.make_cached(synthetic.describe(source, file_format=file_format)) for file_format in ("safetensors", "bin")]
    other = twins[0].rename(twins[0].with_name(twins[0].name.replace("real-", "real-too-")))
    synthetic.fetch_synthetic(source)
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert capsys.readouterr().out.count("removed ") == 2
    assert [path for path in other.parent.iterdir() if path.is_dir()] == [other]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("there",), "--remove empties the cache and takes no DIR: drop 'there', or delete it yourself"),
        (("--format", "bin"), "--format has no effect with --remove, which writes nothing: drop one of them"),
        (("--shard", "1GiB"), "--shard has no effect with --remove, which writes nothing: drop one of them"),
        (("--hollow",), "--hollow has no effect with --remove, which writes nothing: drop one of them"),
    ],
)
def test_removing_takes_nothing_that_is_about_writing(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    small_models.save("llama", tmp_path / "real")
    there = synthetic.fetch_synthetic(resolve.resolve(str(tmp_path / "real")))
    assert main(["synth", str(tmp_path / "real"), *words, "--remove"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert there.exists()


@pytest.mark.parametrize("words", [("--format", "bin"), ("--shard", "1GiB")])
def test_the_cache_takes_a_model_only_as_it_is_published(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "codegen-350m-mono", *words]) == 2
    assert "--format and --shard need DIR" in capsys.readouterr().err


def test_it_is_written_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["synth", "codegen-350m-mono", ".", "--hollow"]) == 0
    assert synthetic.is_synthetic(Path.cwd())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_directory_and_a_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "mine").write_text("kept")
    assert main(["synth", "codegen-350m-mono", str(tmp_path / "twin")]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["synth", "codegen-350m-mono", str(tmp_path / "other")]) == 2
    assert "no disk space" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


def test_what_ends_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    made = synthetic.describe(resolve.resolve("codegen-350m-mono"))

    def interrupted(_step: str, done_bytes: int = 0, _total_bytes: int | None = None, /) -> None:
        if done_bytes > 64 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.write_synthetic(made, tmp_path / "twin", report=interrupted)
    assert list(tmp_path.iterdir()) == []


# ---- quantized ----------------------------------------------------------------------------------------------------------


MOSS = {
    "model_type": "moss", "architectures": ["MossForCausalLM"], "n_embd": 256, "n_layer": 2, "n_head": 8, "rotary_dim": 16,
    "vocab_size": 1500, "n_positions": 512, "n_ctx": 512, "tie_word_embeddings": False, "torch_dtype": "float16",
    "bos_token_id": 1, "eos_token_id": 2, "groupsize": 128,
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 256, "inner_hidden_size": 1024, "num_layers": 2,
    "num_attention_heads": 8, "vocab_size": 1500, "max_sequence_length": 512, "torch_dtype": "float16", "pad_token_id": 3,
    "bos_token_id": 1004, "eos_token_id": 1005, "mask_token_id": 1000, "gmask_token_id": 1001,
}  # fmt: skip
PACKED = {
    "moss int4": (MOSS | {"wbits": 4}, "transformer.h.1.mlp.fc_out"),
    "moss int8": (MOSS | {"wbits": 8}, "transformer.h.1.attn.qkv_proj"),
    "chatglm int4": (CHATGLM | {"quantization_bit": 4}, "transformer.layers.1.mlp.dense_4h_to_h"),
    "chatglm int8": (CHATGLM | {"quantization_bit": 8}, "transformer.layers.1.attention.query_key_value"),
}


def source_of(folder: Path, config: dict[str, Any]) -> resolve.Source:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return resolve.resolve(str(folder), weights=False)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))


def multiplied_with(layer: Any) -> torch.Tensor:
    """Return the weights, inputs x outputs, that a layer multiplies with: what it makes of each unit vector."""
    with torch.inference_mode():
        exact = deepcopy(layer).float()
        products: torch.Tensor = exact(torch.eye(layer.in_features)) - exact(torch.zeros(1, layer.in_features))
    return products


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", PACKED)
def test_a_quantized_model_is_imitated_in_its_own_layout(name: str, kind: str, tmp_path: Path) -> None:
    config, module = PACKED[name]
    made = synthetic.describe(source_of(tmp_path / "only", config), file_format=kind, shard_bytes=500_000)
    there = synthetic.write_synthetic(made, tmp_path / "twin")
    assert len(made.shards) > 1
    one = spec(there)
    assert validate.check(reader.read(there), one.skeleton, one.packed) == ()
    assert one.packed is not None
    loaded: Any = AutoModelForCausalLM.from_pretrained(there, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weight = multiplied_with(model.get_submodule(module))
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean()) < 0.0005
    prompt = torch.tensor([[5, 6, 7, 1001, 1004]])
    with torch.inference_mode():
        logits = model(prompt).logits
        answer = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    assert answer.shape[1] > prompt.shape[1]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # optimum 2.3 asks for it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel 7.6 leaves a temporary folder
@pytest.mark.parametrize(("method", "save"), [("gptq", partial(save_gptq, bits=4)), ("awq", save_awq)])
def test_gptq_and_awq_are_imitated_as_their_packages_load_them(method: str, save: Callable[..., object], tmp_path: Path) -> None:
    save(tmp_path / "real", group=128)
    real = reader.read(tmp_path / "real")
    there = synthetic.write_synthetic(synthetic.describe(resolve.resolve(str(tmp_path / "real"))), tmp_path / "twin")
    twin = reader.read(there)
    shapes, wanted = ({tensor.name: (tensor.dtype, tensor.shape) for tensor in one.tensors} for one in (twin, real))
    assert shapes == wanted
    parts = load_file(there / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    fields, zeros = (nibbles(parts[f"{module}.{part}"]) for part in ("qweight", "qzeros"))
    assert len(zeros.unique()) == len(parts[f"{module}.scales"].unique()) == 1
    weight = (fields - zeros[0] - int(method == "gptq")) * parts[f"{module}.scales"].float()[0, 0]
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean()) < 0.0005
    for package in PRECISIONS[f"{method}-int4"].needs:
        pytest.importorskip(package)
    model = AutoModelForCausalLM.from_pretrained(there)
    layer: Any = model.get_submodule(module)
    assert layer(torch.eye(256, dtype=torch.float16)).float().detach().std() == pytest.approx(0.02, rel=0.02)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the unsigned numbers of 4 bits in int32 words, in whatever order."""
    pairs = words.flatten().view(torch.uint8)
    return torch.cat((pairs & 15, pairs >> 4)).float()


def test_packed_weights_take_the_memory_of_a_piece(tmp_path: Path) -> None:
    made = synthetic.describe(resolve.resolve("chatglm-6b-int4"))
    few = msgspec.structs.replace(made, shards=(made.shards[0][1:60],))  # without the embedding
    tracemalloc.start()
    try:
        synthetic.write_synthetic(few, tmp_path / "twin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert few.bytes > 300 << 20
    assert peak < 200 << 20


LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
REFUSED = {
    "of unknown parts": (LLAMA, {"quant_method": "fp8"}, "how its files hold that is not known here"),
    "bitsandbytes": (LLAMA, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "how its files hold that is not known here"),
    "3 bits": (LLAMA, GPTQ | {"bits": 3}, "no --precision here runs its 3 bits"),
    "other bits for some": (LLAMA, GPTQ | {"dynamic": {"+:.*q_proj.*": {"bits": 8}}}, "packs some modules otherwise"),
    "not all modules": (LLAMA, GPTQ | {"lm_head": True}, "packs some modules otherwise"),
    "half a word": (LLAMA | {"intermediate_size": 771}, GPTQ, "gate_proj.weight, 771 x 256, does not fill whole words"),
    "experts": (
        {"model_type": "mixtral", **small_models.MODELS["mixtral"]},
        GPTQ,
        "under which names it packs each expert is not known",
    ),
    "Conv1D": ({"model_type": "gpt2", **small_models.MODELS["gpt2"]}, GPTQ, "how it packs Conv1D is not known here"),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_quantized_otherwise_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    config, settings, why = REFUSED[name]
    source = source_of(tmp_path / "model", config | {"torch_dtype": "float16", "quantization_config": settings})
    with pytest.raises(UsageError, match=rf"^model is quantized \(.+\), and .*{re.escape(why)}.*: name the 16-bit model"):
        synthetic.describe(source)


def test_a_run_measures_a_model_of_which_only_the_config_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "real" / "config.json", tmp_path / "only")
    command = [sys.executable, "-m", "pytest", "cases", "-q", "-p", "no:cacheprovider", "--model", str(tmp_path / "only")]
    command += ["--weights", "synthetic", "--precision", "bf16", "--placement", "cpu", "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [*command, "--new-tokens", "2", "--repeats", "1", "--calibrate", "never"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,), problems = Store(tmp_path / "results").read()
    assert not problems
    assert (result.outcome, result.weights) == (Outcome.OK, "synthetic")
    assert result.metrics["decode_tok_s"] > 0
    assert not {"perplexity", "answers_correct"} & result.metrics.keys()
    assert result.quality is not None
    assert result.quality.verdict == "not measured"
    assert "--weights synthetic" in str(result.command)


def test_a_config_alone_is_refused_where_real_weights_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        resolve.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "int7"}))
    source = resolve.resolve(str(tmp_path), weights=False)
    with pytest.raises(UsageError, match="torch_dtype 'int7'"):
        synthetic.describe(source)
