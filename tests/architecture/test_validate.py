"""A checkpoint against its config: what is wrong is said before memory is spent; what transformers loads is not called wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from harness.architecture import model_spec, skeleton_source, synthetic, validate
from harness.architecture.key_mapping import MOST_LETTERS, Naming, Place, Renaming
from harness.architecture.model_spec import ModelSpec
from harness.catalog import download, resolve, shipped
from harness.checkpoint import reader
from harness.checkpoint.formats.tensor_writer import TensorToWrite
from harness.cli.entry import main
from harness.core.errors import CheckpointError, UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Verdict
from harness.measure import quality
from harness.measure.protocol import ScoreDone
from harness.planning.planner import Planner
from harness.run.options import Options
from harness.run.session import Session
from harness.worker import build_skeleton as worker
from tests.support import builders, small_models
from tests.support.checkpoint_files import FORMS, specs, write_checkpoint
from tests.support.gguf_files import write_llama
from tests.support.packed_files import packed_layout, spec, write_hollow, write_packed

ROOT = Path(__file__).parents[2]
SMOLLM2 = shipped.catalog()["HuggingFaceTB/SmolLM2-135M-Instruct"].config
Tensors = dict[str, TensorToWrite]
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    monkeypatch.setattr(skeleton_source, "build_gguf", lambda metadata, tensors, _: worker.build_gguf_skeleton(metadata, tensors))
    transformers.logging.disable_progress_bar()


def smollm2() -> Tensors:
    found = skeleton_source.shipped(SMOLLM2)
    assert found is not None
    return specs(found)


def odd(one: ModelSpec) -> tuple[str, ...]:
    """What is said of the files beside that they have no tokenizer."""
    return tuple(note for note in one.notes if "tokenizer" not in note)


# ---- damage -----------------------------------------------------------------------------------------------------------------


def changed(tensors: Tensors, name: str, **how: Any) -> Tensors:
    return tensors | {name: TensorToWrite(**{"name": name, "dtype": "bfloat16", "shape": tensors[name].shape, **how})}


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    changed = (TensorToWrite(name=name.replace(old, new), dtype=one.dtype, shape=one.shape) for name, one in tensors.items())
    return {one.name: one for one in changed}


BELONGS = "use the config.json that belongs to the weights"
COMPLETE = f"complete the download, or {BELONGS}"
# what was done -> (how, what is said)
DAMAGES: Mapping[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "wrong shape": (
        lambda tensors: changed(tensors, UP, shape=(1536, 577)),
        f"'{UP}' is 1536 x 577, the config asks for 1536 x 576: {BELONGS}",
    ),
    "wrong shapes": (
        lambda tensors: (
            tensors | {name: TensorToWrite(name=name, dtype="bfloat16", shape=(577,)) for name in tensors if "norm" in name}
        ),
        f"'model.layers.0.input_layernorm.weight' is 577, the config asks for 576 (and 60 more): {BELONGS}",
    ),
    "one is missing": (
        lambda tensors: without(tensors, UP),
        f"config.json: asks for '{UP}', which {{where}} holds: {COMPLETE}",
    ),
    "many are missing": (
        lambda tensors: without(tensors, "model.layers.2"),
        f"config.json: asks for 'model.layers.2.self_attn.q_proj.weight' (and 98 more), which {{where}} holds: {COMPLETE}",
    ),
    "renamed": (
        lambda tensors: renamed(tensors, UP, f"{UP}s"),
        f"config.json: asks for '{UP}', and the files hold as many by other names, as '{UP}s': {BELONGS}",
    ),
    "another model's names": (
        lambda tensors: renamed(tensors, "model.layers", "transformer.layers"),
        "(and 269 more), and the files hold as many by other names, as 'transformer.layers.0.self_attn.q_proj.weight'",
    ),
    "some renamed, one missing": (
        lambda tensors: renamed(without(tensors, UP), "model.layers.2", "layer.2"),
        f"which {{where}} holds: {COMPLETE}",
    ),
    "another model": (
        lambda tensors: renamed(tensors, "model.", "decoder."),
        "config.json: asks for 272 tensors of LlamaForCausalLM, and the files hold none of them, but 'decoder.embed_tokens.weight'",
    ),
    "no numbers": (
        lambda tensors: changed(tensors, UP, dtype="bool"),
        f"'{UP}' is bool, and the config says nothing of packed weights: {BELONGS}",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_by_plan_and_before_a_run(
    damage: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and status 2; a run names it in `prepare`, before its worker, which is none here."""
    monkeypatch.chdir(tmp_path)
    change, sentence = DAMAGES[damage]
    write_checkpoint(tmp_path / "made", SMOLLM2, list(change(smollm2()).values()), form)
    where = "none of the 3 files" if "shards" in form else "no file"
    assert main(["plan", "made", "--ram", "16GiB"]) == 2
    said = capsys.readouterr().err
    assert sentence.format(where=where) in said
    assert said.count("\n") == 1
    session = Session(Options(given={"model": ["made"], "results": "results"}))
    try:
        with pytest.raises(CheckpointError) as error:
            session.prepare(session.cases())
        assert sentence.format(where=where) in str(error.value)
        assert not session.store.read()[0]
    finally:
        session.close()


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_pytest_ends_with_the_sentence(form: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "made", SMOLLM2, list(without(smollm2(), UP).values()), form)
    words = ["cases/", "--model", str(tmp_path / "made"), "--results", str(tmp_path / "results"), "-p", "no:cacheprovider"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=ROOT, env=settings, check=False
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert f"asks for '{UP}', which" in done.stderr


def test_the_file_with_the_wrong_tensor_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "made", SMOLLM2, list(changed(smollm2(), "model.norm.weight", shape=(9,)).values()), "shards")
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: 'model\.norm\.weight' is 9, "):
        spec(tmp_path / "made")


def test_surplus_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = smollm2() | {"vision.weight": TensorToWrite(name="vision.weight", dtype="bfloat16", shape=(4, 4))}
    write_checkpoint(tmp_path / "made", SMOLLM2, list(more.values()))
    sentence = "LlamaForCausalLM has no place for 'vision.weight' in 'model.safetensors': transformers leaves out what"
    assert sentence in odd(spec(tmp_path / "made"))[0]
    assert main(["plan", str(tmp_path / "made"), "--ram", "16GiB", "--json"]) == 0
    assert sentence in json.loads(capsys.readouterr().out)["model"]["notes"][0]


def test_inspect_tells_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who looks into a checkpoint wants to see what is wrong with it."""
    write_checkpoint(tmp_path / "made", SMOLLM2, list(without(smollm2(), UP).values()))
    assert main(["inspect", str(tmp_path / "made"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [f"config.json: asks for '{UP}', which no file holds: {COMPLETE}"]
    assert main(["inspect", str(tmp_path / "made" / "model.safetensors")]) == 0


# ---- shards -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "made", SMOLLM2, list(smollm2().values()), "shards")


def relist(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": change(json.loads(index.read_text())["weight_map"])}))


def test_a_shard_without_what_the_index_says_is_named(shards: Path) -> None:
    second = shards / "model-00002-of-00003.safetensors"
    second.write_bytes((shards / "model-00003-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: does not hold 'model\.layers\.\d+\.") as error:
        spec(shards)
    assert "(and 90 more), which the index says it does: download it again" in str(error.value)


def test_swapped_shards_load_and_are_a_note(shards: Path) -> None:
    first, second = (shards / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    first.rename(shards / "x")
    second.rename(first)
    (shards / "x").rename(second)
    assert (
        "the index says that 'model.embed_tokens.weight' is in 'model-00001-of-00003.safetensors', and it is in"
        in odd(spec(shards))[0]
    )


def test_shards_of_different_wholes_are_a_note(shards: Path) -> None:
    (shards / "model-00003-of-00003.safetensors").rename(shards / "model-00002-of-00002.safetensors")
    relist(shards, lambda listed: {name: file.replace("00003-of-00003", "00002-of-00002") for name, file in listed.items()})
    notes = odd(spec(shards))
    assert notes == (
        "'model-00001-of-00003.safetensors' and 'model-00002-of-00002.safetensors' are parts of different wholes, by their names: "
        "they may be of two downloads",
    )


def test_fewer_shards_than_their_names_say_are_a_note(shards: Path) -> None:
    for file in sorted(shards.glob("*-of-*")):
        file.rename(shards / file.name.replace("of-00003", "of-00004"))
    relist(shards, lambda listed: {name: file.replace("of-00003", "of-00004") for name, file in listed.items()})
    assert odd(spec(shards)) == (
        "'model-00001-of-00004.safetensors' is one of 4 by its name, and the index lists 3 of them: they may be of two downloads",
    )


def test_of_shards_that_are_named_for_what_they_hold_nothing_is_said(shards: Path) -> None:
    (shards / "model-00003-of-00003.safetensors").rename(shards / "head-00001-of-00001.safetensors")
    (shards / "model-00002-of-00003.safetensors").rename(shards / "model-00002-of-00002.safetensors")
    (shards / "model-00001-of-00003.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    relist(
        shards,
        lambda listed: {
            name: file.replace("model-00003-of-00003", "head-00001-of-00001").replace("of-00003", "of-00002")
            for name, file in listed.items()
        },
    )
    assert odd(spec(shards)) == ()


def test_of_one_shard_that_is_looked_at_nothing_is_said(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shards / "model-00002-of-00003.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_a_tensor_in_two_files_is_a_note(tmp_path: Path) -> None:
    tensors = list(smollm2().values())
    write_checkpoint(tmp_path / "made", SMOLLM2, [*tensors, tensors[0]], "bin shards")
    assert odd(spec(tmp_path / "made")) == (
        "'model.embed_tokens.weight' stands in 'pytorch_model-00001-of-00003.bin' and in 'pytorch_model-00003-of-00003.bin': "
        "the later one counts",
    )


def test_dtypes_that_change_between_files_are_a_note(tmp_path: Path) -> None:
    tensors = list(smollm2().values())
    mixed = [
        TensorToWrite(name=one.name, dtype="float32", shape=one.shape) if place > 181 else one for place, one in enumerate(tensors)
    ]
    write_checkpoint(tmp_path / "made", SMOLLM2, mixed, "shards")
    note = odd(spec(tmp_path / "made"))[0]
    assert note.startswith("'model.layers.N.") is True
    assert "is bfloat16 in 'model-00001-of-00003.safetensors' and float32 in 'model-00003-of-00003.safetensors'" in note


# ---- hostile names ------------------------------------------------------------------------------------------------------------


def test_a_name_without_end_meets_no_pattern() -> None:
    """Patterns with a gap take the square of its letters; a header has room for 25 MB of them."""
    renaming = Renaming(pattern="(?P<g0>experts..*end)", target="experts")
    naming = Naming(renamings=(renaming,))
    assert naming.place("experts.0.end", ()) == Place("experts")
    endless = f"experts.{'experts.' * MOST_LETTERS}end"
    assert naming.place(endless, ()) == Place(endless)


# ---- no false alarms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small_models.MODELS)
def test_what_transformers_saves_is_whole(name: str, tmp_path: Path) -> None:
    small_models.save(name, tmp_path)
    one = spec(tmp_path)
    assert one.skeleton.naming is not None
    assert odd(one) == ()


# One of each type, with a head of its own and without: what is checked goes by names, which differ by nothing else.
EACH_KIND = {
    (entry.config["model_type"], entry.config.get("tie_word_embeddings")): name for name, entry in shipped.catalog().items()
}


@pytest.mark.parametrize("name", EACH_KIND.values())
def test_what_is_made_of_the_catalog_is_whole(name: str, tmp_path: Path) -> None:
    try:
        made = synthetic.describe(resolve.resolve(name, weights=False))
    except UsageError:
        pytest.skip("published quantized")
    synthetic.write_synthetic(made, tmp_path / "made", hollow=True)
    assert odd(spec(tmp_path / "made")) == ()


def published(name: str, *renames: tuple[str, str]) -> tuple[dict[str, Any], Tensors]:
    """A model of the catalog whose files have names of their own."""
    config = shipped.catalog()[shipped.hub_id(name)].config
    tensors = specs(skeleton_source.named(name), "float16")
    for old, new in renames:
        tensors = renamed(tensors, old, new)
    return dict(config), tensors


def more(tensors: Tensors, name: str, *shape: int, dtype: str = "float16") -> Tensors:
    return tensors | {name: TensorToWrite(name=name, dtype=dtype, shape=shape)}


def stablelm() -> tuple[dict[str, Any], Tensors]:
    """Names of 2023: another head, masks and frequencies in every layer."""
    config, tensors = published("stablelm-tuned-alpha-3b", ("lm_head.", "embed_out."))
    for layer in range(16):
        base = f"gpt_neox.layers.{layer}.attention"
        tensors = more(tensors, f"{base}.bias", 1, 1, 4096, 4096, dtype="bool")
        tensors = more(tensors, f"{base}.masked_bias")
        tensors = more(tensors, f"{base}.rotary_emb.inv_freq", 16)
    return config, tensors


def llama2() -> tuple[dict[str, Any], Tensors]:
    config, tensors = published("llama-2-7b-hf")
    return config, more(tensors, "model.layers.0.self_attn.rotary_emb.inv_freq", 64)


def moss() -> tuple[dict[str, Any], Tensors]:
    config, tensors = published("moss-moon-003-sft")
    return config, more(tensors, "transformer.h.0.attn.causal_mask", 1, 1, 2048, 2048, dtype="bool")


def chatglm2() -> tuple[dict[str, Any], Tensors]:
    config, tensors = published(
        "chatglm2-6b",
        ("model.layers", "transformer.encoder.layers"),
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    )
    for layer in range(28):
        base = f"transformer.encoder.layers.{layer}.self_attention.query_key_value"
        tensors = more(more(without(tensors, f".{layer}.self_attn."), f"{base}.weight", 4608, 4096), f"{base}.bias", 4608)
    return config, more(tensors, "transformer.rotary_pos_emb.inv_freq", 32)


def mixtral() -> tuple[dict[str, Any], Tensors]:
    """Experts one by one, in a module of another name."""
    config, tensors = published("mixtral-8x7b-instruct-v0.1", (".mlp.", ".block_sparse_moe."))
    tensors = without(tensors, "_proj") | {name: one for name, one in tensors.items() if "self_attn" in name}
    for layer in range(32):
        for expert in range(8):
            base = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            tensors = more(tensors, f"{base}.w1.weight", 14336, 4096)
            tensors = more(tensors, f"{base}.w3.weight", 14336, 4096)
            tensors = more(tensors, f"{base}.w2.weight", 4096, 14336)
    return config, tensors


def tied_twice() -> tuple[dict[str, Any], Tensors]:
    config, tensors = published("qwen3-0.6b")
    return config, more(tensors, "lm_head.weight", 151936, 1024)


def base_model() -> tuple[dict[str, Any], Tensors]:
    return published("smollm2-135m-instruct", ("model.", ""))


PUBLISHED = (stablelm, llama2, moss, chatglm2, mixtral, tied_twice, base_model)


@pytest.mark.parametrize("made", PUBLISHED)
def test_names_that_transformers_knows_are_whole(made: Callable[[], tuple[dict[str, Any], Tensors]], tmp_path: Path) -> None:
    config, tensors = made()
    assert odd(spec(write_checkpoint(tmp_path / "made", config, list(tensors.values())))) == ()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "experts.7.w3.weight",
            "15 tensors, do not make 'model.layers.0.mlp.experts.gate_up_proj', 8 x 28672 x 4096 by the config",
        ),
        (
            "block_sparse_moe.gate.weight",
            "config.json: asks for 'model.layers.0.mlp.gate.weight' (and 31 more), which no file holds",
        ),
    ],
)
def test_an_expert_that_is_missing_is_noticed(part: str, said: str, tmp_path: Path) -> None:
    config, tensors = mixtral()
    write_checkpoint(tmp_path / "made", config, list(without(tensors, part).values()))
    with pytest.raises(CheckpointError) as error:
        spec(tmp_path / "made")
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["baichuan2-7b-chat", "internlm3-8b-instruct"])
def test_of_the_names_of_strangers_nothing_is_said(name: str, tmp_path: Path) -> None:
    """Their own code loads them, so only what has the same name is compared."""
    config, tensors = published(name, ("model.layers.0.", "model.first."))
    assert odd(spec(write_checkpoint(tmp_path / "made", config, list(tensors.values())))) == ()


# Architectures that transformers converts in as many ways: experts, joined and split projections, scopes and prefixes.
KINDS = (
    "gemma3", "llama4", "granitemoe", "jamba", "phimoe", "ernie4_5_moe", "qwen3_next", "bamba", "gpt_oss", "longcat_flash",
    "deepseek_v3", "olmoe", "mixtral", "lfm2", "falcon_h1",
)  # fmt: skip
# Which of four layers attends: hybrids whose usual pattern first does so later, without which transformers generates nothing.
ATTENDS: dict[str, dict[str, Any]] = {"jamba": {"attn_layer_offset": 3}, "bamba": {"attn_layer_indices": [3]}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_would_save_is_whole_and_anything_less_is_not(kind: str) -> None:
    """On the meta device, through transformers' own reversal of its conversions: names of the hub at the sizes of its defaults."""
    config: Any = transformers.CONFIG_MAPPING[kind](**ATTENDS.get(kind, {}))
    for part in (config, getattr(config, "text_config", config)):
        part.num_hidden_layers = 4
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found = worker._of_model(model)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    saved = revert_weight_conversion(model, kept)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert validate.check(of_shapes(shapes), found) == ()
    for name in random.Random(kind).sample(sorted(shapes), 8):
        for damaged in (shapes | {name: (*shapes[name][:-1], 7)}, {one: shapes[one] for one in shapes if one != name}):
            with pytest.raises(CheckpointError):
                validate.check(of_shapes(damaged), found)


def of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> reader.Checkpoint:
    file = reader.FileInfo(name="model.safetensors", bytes=1, format="safetensors")
    tensors = (reader.StoredTensor(name=one, dtype="bfloat16", shape=shapes[one], bytes=1, file=file.name) for one in shapes)
    return reader.Checkpoint(path="made", config={}, tensors=tuple(tensors), files=(file,))


def loads(folder: Path) -> bool:
    """Say whether transformers loads every weight from the files."""
    try:
        with warnings.catch_warnings(action="ignore"):
            loader: Any = transformers.AutoModelForCausalLM
            _, told = loader.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, ValueError):
        return False
    return not told["missing_keys"] and not told["mismatched_keys"]


def hurt(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Do one thing to a checkpoint that a download, a conversion or a mistake may do."""
    name, kind = rng.choice(sorted(tensors)), rng.choice(("drop", "rename", "flatten", "grow", "no prefix", "more"))
    whole = dict(tensors)
    if kind == "drop":
        del whole[name]
    elif kind == "rename":
        whole[rng.choice((f"{name}_x", f"x.{name}", name.replace(".0.", ".7.")))] = whole.pop(name)
    elif kind == "flatten":
        whole[name] = whole[name].reshape(1, -1) if whole[name].dim() == 1 else whole[name].reshape(-1)
    elif kind == "grow":
        whole[name] = torch.cat([whole[name], whole[name][:1]])
    elif kind == "no prefix":
        prefix = f"{name.partition('.')[0]}."
        whole = {one.removeprefix(prefix): tensor for one, tensor in whole.items()}
    else:
        whole["more.weight"] = torch.ones(3, 3)
    return whole


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "qwen2_moe", "gpt_neox", "gpt2", "codegen", "phi3"])
def test_damage_is_noticed_exactly_where_transformers_would_miss_something(name: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    small_models.save(name, tmp_path / "good")
    tensors, rng = load_file(tmp_path / "good" / "model.safetensors"), random.Random(name)
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "good" / "config.json").read_bytes())
        whole = {key: tensor.contiguous() for key, tensor in hurt(tensors, rng).items()}
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
        try:
            spec(folder)
            said = None
        except CheckpointError as error:
            said = str(error)
        assert (said is None) == loads(folder), f"{said}, {sorted(whole.keys() ^ tensors.keys())}"


# ---- packed -----------------------------------------------------------------------------------------------------------------


def packed(folder: Path, method: str, **settings: Any) -> Path:
    """Write Qwen2.5-0.5B, hollow, in 4 bits and groups of 128; its config says `settings` instead."""
    write_packed(folder, "qwen2.5-0.5b-instruct", 4, 128, method)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("gptq", {"bits": 8}, f"'{FIRST}.qweight' is 112 x 896, which means 4 bits, and the config says 8 (and "),
        ("awq", {"bits": 8}, f"'{FIRST}.qweight' is 896 x 112, which means 4 bits, and the config says 8 (and "),
        ("gptq", {"group_size": 64}, f"'{FIRST}.qzeros' is 7 x 112, which means groups of 128, and the config says 64 (and "),
        ("awq", {"group_size": 64}, f"'{FIRST}.qzeros' is 7 x 112, which means groups of 128, and the config says 64 (and "),
        ("gptq", {"quant_method": "awq"}, f"'{FIRST}.qweight' is 112 x 896, the config asks for 896 x 112"),
    ],
)
def test_a_config_that_describes_other_packing_is_refused(method: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        spec(packed(tmp_path, method, **settings))
    assert said in str(error.value)
    assert BELONGS in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        (".qzeros", f"holds '{FIRST}.qweight' without its '{FIRST}.qzeros': download it again"),
        (".qweight", f"config.json: asks for '{FIRST}.weight', which no file holds: {COMPLETE}"),
        ("", f"config.json: asks for '{FIRST}.weight', which no file holds: {COMPLETE}"),
    ],
)
def test_a_part_of_a_packed_weight_that_is_missing_is_noticed(method: str, part: str, said: str, tmp_path: Path) -> None:
    packed(tmp_path, method)
    tensors = packed_layout(skeleton_source.named("qwen2.5-0.5b-instruct"), 4, 128, method)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{FIRST}{part}") or name.endswith("bias")}
    write_hollow(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        spec(tmp_path)
    assert said in str(error.value)


def test_packed_weights_need_a_config_that_says_so_and_the_other_way_round(tmp_path: Path) -> None:
    packed(tmp_path / "a", "awq")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"says nothing of packed weights, and '.*qweight' in 'model\.safetensors' is one"):
        spec(tmp_path / "a")
    write_checkpoint(tmp_path / "b", SMOLLM2 | {"quantization_config": settings}, list(smollm2().values()))
    with pytest.raises(
        CheckpointError, match=r"says awq 4-bit, groups of 128, and no tensor of the files is packed so \(\.qweight\)"
    ):
        spec(tmp_path / "b")


def test_awq_packs_whole_groups(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\..*qweight' is of 896 inputs, which groups of 192 do not divide"):
        spec(packed(tmp_path, "awq", group_size=192))


def test_packing_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    """Other versions of AWQ's layout, other bits for some modules, weights of bitsandbytes stored as other numbers."""
    assert odd(spec(packed(tmp_path / "a", "awq", version="gemv"))) == ()
    assert odd(spec(packed(tmp_path / "m", "gptq", bits=8, is_marlin_format=True))) == ()
    with pytest.raises(CheckpointError, match="which means 4 bits, and the config says 8"):  # whatever rules say: none is read
        spec(packed(tmp_path / "b", "gptq", bits=8, dynamic={"+:.*q_proj.*": {"bits": 4}}))
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    }
    folder = write_checkpoint(tmp_path / "c", SMOLLM2 | {"quantization_config": settings}, list(without(smollm2(), UP).values()))
    assert odd(spec(folder)) == ()


@pytest.mark.parametrize(("said", "words"), [(4, "wbits 4"), (32, "wbits 32"), (None, "nothing of wbits")])
def test_the_shapes_of_moss_tell_its_bits(said: int | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One published repository says 4 bits of weights that have 8; our MOSS loads what they have, and it is planned as that."""
    name = "moss-moon-003-sft-int8"
    config = dict(shipped.catalog()[shipped.hub_id(name)].config) | {"wbits": said}
    if said is None:
        del config["wbits"], config["groupsize"]
    write_hollow(tmp_path / "model.safetensors", packed_layout(skeleton_source.named(name), 8, 128))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert download.stored_as(resolve.resolve(str(tmp_path))) == "gptq 8-bit, groups of 128"
    one = spec(tmp_path)
    assert one.packed is not None
    assert one.packed.precision == "gptq-int8"
    assert Planner(one, builders.machine(), here=False).plan(builders.case("gptq-int8", "cpu")).verdict is not Verdict.INVALID
    first = "'transformer.h.0.attn.out_proj.qweight' in 'model.safetensors'"
    note = f"config.json says {words}, and {first} has 8 bits: it is planned and loaded as what it has"
    assert odd(one) == (note,)
    assert reader.read(tmp_path).parameters == pytest.approx(one.skeleton.parameters, rel=0.001)
    assert main(["inspect", str(tmp_path)]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


def test_of_bits_that_are_as_moss_says_nothing_is_said(tmp_path: Path) -> None:
    name = "moss-moon-003-sft-int4"
    write_hollow(tmp_path / "model.safetensors", packed_layout(skeleton_source.named(name), 4, 128))
    (tmp_path / "config.json").write_text(json.dumps(shipped.catalog()[shipped.hub_id(name)].config))
    assert odd(spec(tmp_path)) == ()


# ---- what our architectures lack --------------------------------------------------------------------------------------------


GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "chatglm2-6b",
            {"quantization_bit": 4},
            "quantization_bit is 4: ChatGLM2's own integer files are not supported; load the 16",
        ),
        ("chatglm2-6b", {"add_bias_linear": True}, "add_bias_linear is true: only false"),
        ("chatglm-6b", {"pre_seq_len": 128}, "pre_seq_len 128: P-Tuning prefixes are not supported; load the model without its"),
    ],
)
def test_a_kind_that_our_architectures_lack_is_told_before_loading(
    name: str, given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own code, which no longer loads, is not asked for."""
    monkeypatch.undo()  # a worker says it
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = dict(shipped.catalog()[shipped.hub_id(name)].config)
    whole = skeleton_source.named(name)
    code = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    write_checkpoint(tmp_path / "made", config | given | {"auto_map": code}, list(specs(whole, "float16").values()))
    assert main(["plan", "made", "--ram", "64GiB"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "config.json: " in told
    assert said in told
    assert "--trust-remote-code" not in told
    session = Session(Options(given={"model": ["made"], "results": "results"}))
    try:
        with pytest.raises(CheckpointError, match=re.escape(said)):
            session.prepare(session.cases())
    finally:
        session.close()


def test_an_embedding_that_is_packed_is_refused(tmp_path: Path) -> None:
    """As in ChatGLM-6B's int4-qe files: our class packs what is in the blocks and nothing else."""
    shutil.copytree(GOLDEN / "chatglm_l2_h64_int4", tmp_path / "qe")
    assert ["another" in note for note in odd(spec(tmp_path / "qe"))] == [True]  # of its head, which is random and tied
    file, name = tmp_path / "qe" / "model.safetensors", "transformer.word_embeddings.weight"
    tensors = load_file(file)
    rows, columns = tensors[name].shape
    packed = {name: torch.zeros(rows, columns // 2, dtype=torch.int8), f"{name}_scale": torch.ones(rows, dtype=torch.float16)}
    save_file({key: tensor for key, tensor in tensors.items() if key != name} | packed, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        spec(tmp_path / "qe")
    assert str(error.value) == (
        f"{file}: holds '{name}' packed, and only Linear modules are loaded so, not Embedding: "
        "take a checkpoint that packs those alone, or the 16-bit one with --precision int8 or int4"
    )


@pytest.mark.parametrize(("way", "part"), [("int8", "SCB"), ("int4", "weight.absmax"), ("nf4-dq", "weight.nested_absmax")])
def test_a_part_that_bitsandbytes_needs_is_noticed(way: str, part: str, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "plain")
    model: Any = small_models.load(tmp_path / "plain", PRECISIONS[way])
    model.save_pretrained(tmp_path / "packed")
    assert odd(spec(tmp_path / "packed")) == ()
    file, lost = tmp_path / "packed" / "model.safetensors", f"model.layers.0.self_attn.q_proj.{part}"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"without its '{re.escape(lost)}': download it again"):
        spec(tmp_path / "packed")


# ---- GGUF -------------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_held_against_its_metadata(tmp_path: Path) -> None:
    whole = reader.read(write_llama(tmp_path / "model.gguf"))
    found = model_spec.of_checkpoint("tiny", "tiny", whole, tmp_path).skeleton
    assert found.naming is not None
    lacking = tuple(tensor for tensor in whole.tensors if "ffn_up" not in tensor.name)
    with pytest.raises(
        CheckpointError, match=r"does not hold 'blk\.0\.ffn_up\.weight' \(and 1 more\), which its metadata asks for"
    ):
        validate.check(replace(whole, tensors=lacking), found)
    short = tuple(replace(tensor, shape=(7,)) if tensor.name == "output_norm.weight" else tensor for tensor in whole.tensors)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: 'output_norm\.weight' is 7, the config asks for 256: download it again"
    ):
        validate.check(replace(whole, tensors=short), found)


# ---- beside the weights -----------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_a_note(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "made", SMOLLM2, list(smollm2().values()))
    said = "there is no tokenizer beside the weights: prompts are token ids, and quality is not measured"
    assert spec(folder).notes == (said,)
    assert spec(folder).tokenizer is False
    done = ScoreDone(nll=0.0, positions=0, finite=True, agree=None, kl=None, answers=[], phases=[])
    judged = quality.judge(done, real_weights=True)
    assert (judged.verdict, judged.why) == ("not measured", "there is no tokenizer beside the weights, so no text was scored")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')  # its vocabulary was not downloaded
    assert spec(folder).notes == (said,)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert spec(folder).notes == ()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no tokenizer .*: download it again, or take it away"):
        spec(folder)


def test_an_unknown_model_type_is_planned_with_a_note_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a worker says it
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = SMOLLM2 | {"model_type": "lama"}
    folder = write_checkpoint(tmp_path / "made", config, list(smollm2().values()))
    one = spec(folder)
    assert one.unknown is not None
    assert "no skeleton for model_type 'lama': transformers 5" in one.unknown
    assert "has no class for it, but for 'llama'" in one.unknown
    assert one.unknown.endswith("correct 'model_type' in config.json, or try a newer transformers")
    assert one.unknown in one.notes[0]
    assert Planner(one, builders.machine(), here=False).plan(builders.case()).verdict is Verdict.FITS  # with another transformers
    here = Planner(one, builders.machine()).plan(builders.case())
    assert (here.verdict, here.why) == (Verdict.UNAVAILABLE, one.unknown)
    session = Session(Options(given={"model": ["made"], "results": "results"}))
    try:
        with pytest.raises(CheckpointError, match=r"config\.json: no skeleton for model_type 'lama'"):
            session.prepare(session.cases())
    finally:
        session.close()
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "a.M"}}))
    assert spec(folder).unknown is None  # its own code may know it
