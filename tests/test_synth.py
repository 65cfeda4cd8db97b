"""Synthetic checkpoints have the shape of the real ones, load, and compute finite numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

import harness.models  # noqa: F401 registers our own architectures
from harness import catalog, checkpoint, synth
from harness.case import Outcome
from harness.cli import main
from harness.errors import CheckpointError, UsageError
from harness.store import Store
from tests import small_models


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "codegen", "mixtral"])
def test_it_loads_and_computes_finite_numbers(name: str, kind: str, tmp_path: Path) -> None:
    small_models.save(name, tmp_path / "real")
    source = catalog.resolve(str(tmp_path / "real"))
    there = synth.write(synth.describe(source, file_format=kind, shard_bytes=500_000), tmp_path / "twin")
    assert len(list(there.glob(f"*.{'bin' if kind == 'bin' else 'safetensors'}"))) > 1
    real, twin = checkpoint.read(tmp_path / "real"), checkpoint.read(there)
    assert (twin.parameters, twin.dtype_bytes) == (real.parameters, real.dtype_bytes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(there, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        logits = model.half()(torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_head_that_is_stored_again_is_tied_as_in_the_real_files(tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "real", tie_word_embeddings=True)
    once = synth.describe(catalog.resolve(str(tmp_path / "real")))
    (shard,) = once.shards
    embedding = next(tensor for tensor in shard if tensor.name == "model.embed_tokens.weight")
    head = msgspec.structs.replace(embedding, name="lm_head.weight", repeats=embedding.name)
    there = synth.write(msgspec.structs.replace(once, shards=((*shard, head),)), tmp_path / "twin")
    model = AutoModelForCausalLM.from_pretrained(there)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_the_catalog_stores_again_repeats_its_original() -> None:
    made = synth.describe(catalog.resolve("chatglm-6b"))
    tensors = {tensor.name: tensor for shard in made.shards for tensor in shard}
    head, original = tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"]
    assert bytes(next(iter(synth.contents(head)))) == bytes(next(iter(synth.contents(original))))


PUBLISHED = {
    "chatglm-6b": (13_416_906_785, 0.0001),
    "chatglm2-6b": (12_487_168_064, 0.0001),
    "codegen-6b-mono": (14_266_839_040, 0.0),
    "stablelm-tuned-alpha-3b": (14_817_801_431, 0.0001),
    "qwen3-0.6b": (1_503_264_768, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_bytes_of_the_published_files(name: str) -> None:
    """Differences are headers of zip files and buffers of rotary frequencies."""
    made = synth.describe(catalog.resolve(name))
    size, near = PUBLISHED[name]
    assert made.bytes == pytest.approx(size, rel=near)


def test_its_shards_are_cut_where_the_published_are() -> None:
    shards = synth.describe(catalog.resolve("stablelm-tuned-alpha-3b")).shards
    sizes = [sum(tensor.bytes for tensor in shard) for shard in shards]
    assert sizes == pytest.approx([10_161_140_290, 4_656_666_941], rel=0.0001)
    shards = synth.describe(catalog.resolve("chatglm2-6b")).shards
    assert len(shards) == 7
    assert sum(tensor.bytes for tensor in shards[0]) == pytest.approx(1_827_780_615, rel=0.0001)


def test_hollow_checkpoints_of_full_size_are_planned_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "chatglm-6b", str(tmp_path / "hollow"), "--hollow"]) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "hollow"), "--gpu", "16GiB", "--ram", "32GiB", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["model"]["parameters"] == 6_173_286_400
    assert planned["model"]["checkpoint_bytes"] == pytest.approx(13_416_906_785, rel=0.001)
    assert sum(file.stat().st_blocks for file in (tmp_path / "hollow").iterdir()) * 512 < 2 << 20


def test_writing_takes_the_memory_of_a_piece(tmp_path: Path) -> None:
    made = synth.describe(catalog.resolve("codegen-350m-mono"))
    tracemalloc.start()
    try:
        synth.write(made, tmp_path / "twin")
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
    source = catalog.resolve(str(tmp_path / "real"))
    there = synth.fetch(source)
    stamp = (there / "model.safetensors").stat().st_mtime_ns
    assert synth.fetch(source) == there
    assert (there / "model.safetensors").stat().st_mtime_ns == stamp
    assert synth.is_synthetic(there)
    assert not synth.is_synthetic(tmp_path / "real")
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert not there.exists()
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert "the cache holds no synthetic real" in capsys.readouterr().out


def test_runs_that_want_the_same_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    source = catalog.resolve(str(tmp_path / "real"))
    filled, begun, waits, fill = [], threading.Event(), threading.Event(), synth._fill

    def slow(*given: Any) -> None:
        filled.append(given)
        begun.set()
        assert waits.wait(10)
        fill(*given)

    def report(step: str, *_: object) -> None:
        if "waiting for another run" in step:
            waits.set()

    monkeypatch.setattr(synth, "_fill", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(synth.fetch, source)
        assert begun.wait(10)
        second = pool.submit(synth.fetch, source, report)
        assert first.result() == second.result()
    assert len(filled) == 1


def test_what_the_cache_holds_of_a_model_goes_whatever_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    source = catalog.resolve(str(tmp_path / "real"))
    twins = [synth.keep(synth.describe(source, file_format=file_format)) for file_format in ("safetensors", "bin")]
    other = twins[0].rename(twins[0].with_name(twins[0].name.replace("real-", "real-too-")))
    synth.fetch(source)
    assert main(["synth", str(tmp_path / "real"), "--remove"]) == 0
    assert capsys.readouterr().out.count("removed ") == 2
    assert [path for path in other.parent.iterdir() if path.is_dir()] == [other]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("there",), "--remove is for the cache and takes no DIR: leave 'there' out, or delete it yourself"),
        (("--format", "bin"), "--format says how to write, and --remove writes nothing: leave one of them out"),
        (("--shard", "1GiB"), "--shard says how to write, and --remove writes nothing: leave one of them out"),
        (("--hollow",), "--hollow says how to write, and --remove writes nothing: leave one of them out"),
    ],
)
def test_removing_takes_nothing_that_is_about_writing(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path))
    small_models.save("llama", tmp_path / "real")
    there = synth.fetch(catalog.resolve(str(tmp_path / "real")))
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
    assert synth.is_synthetic(Path.cwd())
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
    made = synth.describe(catalog.resolve("codegen-350m-mono"))

    def interrupted(_step: str, done_bytes: int = 0, _total_bytes: int | None = None, /) -> None:
        if done_bytes > 64 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.write(made, tmp_path / "twin", report=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_quantised_models_are_not_imitated() -> None:
    with pytest.raises(UsageError, match="published quantised"):
        synth.describe(catalog.resolve("moss-moon-003-sft-int4"))


def test_a_run_measures_a_model_of_which_only_the_config_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    small_models.save("llama", tmp_path / "real")
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "real" / "config.json", tmp_path / "only")
    command = [sys.executable, "-m", "pytest", "cases", "-q", "-p", "no:cacheprovider", "--model", str(tmp_path / "only")]
    command += ["--weights", "synthetic", "--precision", "bf16", "--placement", "cpu", "--results", str(tmp_path / "results")]
    done = subprocess.run([*command, "--new-tokens", "2", "--repeats", "1"], capture_output=True, text=True, check=False)
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
        catalog.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "int7"}))
    source = catalog.resolve(str(tmp_path), weights=False)
    with pytest.raises(UsageError, match="torch_dtype 'int7'"):
        synth.describe(source)
