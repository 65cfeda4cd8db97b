"""Checkpoints that are no causal decoders: each is told for what it is, and loaded by the class that loads it or by none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from harness.architecture import model_spec
from harness.architecture.ask_worker import NotMeasured
from harness.catalog import resolve
from harness.checkpoint import auxiliary_files, foreign_folder, reader, tied_head
from harness.checkpoint.formats.files import Directory
from harness.core.errors import CheckpointError
from harness.worker.auto_class import auto_class_of
from tests.support import gguf_files, strangers

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

# The class that a config names, its config class, and what the refusal must say: the kind and the class that loads it.
OTHERS = [
    ("T5ForConditionalGeneration", "T5Config", "an encoder-decoder", "AutoModelForSeq2SeqLM"),
    ("BartForConditionalGeneration", "BartConfig", "an encoder-decoder", "AutoModelForSeq2SeqLM"),
    ("WhisperForConditionalGeneration", "WhisperConfig", "writes down speech", "AutoModelForSpeechSeq2Seq"),
    ("BertForMaskedLM", "BertConfig", "an encoder", "AutoModelForMaskedLM"),
    ("RobertaForSequenceClassification", "RobertaConfig", "sequence classification", "AutoModelForSequenceClassification"),
    ("LlamaForSequenceClassification", "LlamaConfig", "sequence classification", "AutoModelForSequenceClassification"),
    ("Qwen3ForTokenClassification", "Qwen3Config", "token classification", "AutoModelForTokenClassification"),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", "writes down speech", "AutoModelForCTC"),
    ("ViTForImageClassification", "ViTConfig", "image classification", "AutoModelForImageClassification"),
    ("CLIPModel", "CLIPConfig", "zero shot image classification", "AutoModelForZeroShotImageClassification"),
]


@pytest.mark.parametrize(("named", "config", "kind", "auto"), OTHERS)
def test_other_kinds_are_told_with_what_loads_them(named: str, config: str, kind: str, auto: str) -> None:
    with pytest.raises(NotMeasured) as error:
        auto_class_of(getattr(transformers, config)(), named)
    assert f"names {named}, " in str(error.value)
    assert kind in str(error.value)
    assert f"which {auto} loads" in str(error.value)


@pytest.mark.parametrize(
    ("named", "config", "auto"),
    [
        ("LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM"),
        ("QWenLMHeadModel", "Qwen2Config", "AutoModelForCausalLM"),  # code of its own, which transformers' class replaces
        (None, "MistralConfig", "AutoModelForCausalLM"),
        ("Gemma3ForConditionalGeneration", "Gemma3Config", "AutoModelForCausalLM"),
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "AutoModelForImageTextToText"),
        ("LlavaForConditionalGeneration", "LlavaConfig", "AutoModelForImageTextToText"),
        ("SmolVLMForConditionalGeneration", "SmolVLMConfig", "AutoModelForImageTextToText"),
    ],
)
def test_decoders_are_loaded_by_their_class(named: str | None, config: str, auto: str) -> None:
    assert auto_class_of(getattr(transformers, config)(), named).__name__ == auto


def save(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def spec_of(folder: Path) -> model_spec.ModelSpec:
    return model_spec.read_spec(resolve.resolve(str(folder)))


def small_vision_model(folder: Path) -> Path:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        image_token_index=5,
    )
    return save(transformers.LlavaForConditionalGeneration(config), folder)


def test_a_model_that_sees_is_planned_with_its_tower(tmp_path: Path) -> None:
    folder = small_vision_model(tmp_path / "sees")
    spec = spec_of(folder)
    real = AutoModelForImageTextToText.from_pretrained(folder)
    assert spec.skeleton.auto_class == "AutoModelForImageTextToText"
    assert spec.skeleton.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert any("vision" in weight.path for weight in spec.skeleton.weights)


def test_a_whole_embedding_model_is_no_broken_download(tmp_path: Path) -> None:
    folder = save(transformers.Qwen3Model(transformers.Qwen3Config(**TEXT, tie_word_embeddings=False)), tmp_path / "embeds")
    with pytest.raises(CheckpointError, match=r"but its output head .*as embedding models do.* AutoModel loads it"):
        spec_of(folder)


def test_a_base_model_whose_head_is_tied_generates(tmp_path: Path) -> None:
    """Its files hold no head either, and need none."""
    folder = save(transformers.LlamaModel(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)), tmp_path / "base")
    assert spec_of(folder).skeleton.model_class == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}, r"'LORA' of rank 8.* planned on top of 'org/base'"),
        ({"peft_type": "IA3"}, "write the model that it was made for as base_model_name_or_path"),
    ],
)
def test_a_repository_with_an_adapter_is_told(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    """Of a directory with one `tests/planning/test_adapters.py` tells more."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_index.json": {}}, "DiffusionPipeline loads it"),
        ({"pytorch_lora_weights.safetensors": {}}, "load_lora_weights of its pipeline"),
        ({"imatrix.dat": {}}, "take the GGUF of the model itself"),
        ({"params.json": {}, "consolidated.00.pth": {}}, "take the copy for transformers"),
        ({"config.json": {}, "model.onnx": {}}, "onnxruntime"),
        ({"config.json": {}, "tf_model.h5": {}}, "a checkpoint of TensorFlow"),
    ],
)
def test_folders_of_others_are_told(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        resolve.resolve(str(tmp_path))
    with pytest.raises(CheckpointError, match=said):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("config.json", "diffusion_pytorch_model.safetensors"), "a part of a pipeline of diffusers"),
        (("mmproj-F16.gguf",), "the part of a model that sees"),
        (("tiny.imatrix.gguf", "README.md"), "what llama.cpp counted"),
    ],
)
def test_files_of_others_that_end_as_weights_do_are_told_when_they_are_read(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        spec_of(tmp_path)


@pytest.mark.parametrize("beside", ["mmproj-F16.gguf", "tiny.mmproj-f16.gguf", "imatrix.gguf", "tiny-imatrix.gguf"])
def test_what_lies_beside_a_gguf_is_no_second_model(beside: str, tmp_path: Path) -> None:
    model = gguf_files.small_gguf(tmp_path / "tiny-Q8_0.gguf")
    shutil.copy(model, tmp_path / beside)
    assert [file.name for file in reader.read(tmp_path).files] == [model.name]


def test_a_folder_of_nobody_knows_what_keeps_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json: give the directory"):
        resolve.resolve(str(tmp_path))
    assert foreign_folder.what_it_is(Directory(tmp_path), ["notes.md"]) is None


# Heads


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_is_compared_with_the_embedding(tmp_path: Path, file_format: str, same: bool) -> None:
    folder = strangers.save_llama(tmp_path / "model")
    strangers.change(folder / "config.json", {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if file_format == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = spec_of(folder)
    real = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tied = real.lm_head.weight.data_ptr() == real.model.embed_tokens.weight.data_ptr()
    assert tied is same
    assert bool(spec.skeleton.tied) is same
    assert any("the files hold another" in note for note in spec.notes) is not same
    assert spec.skeleton.parameters == sum(parameter.numel() for parameter in real.parameters())


def test_one_row_that_differs_is_enough(tmp_path: Path) -> None:
    """Where the first rows are alike, as those of unused tokens are."""
    weights = {"model.embed_tokens.weight": torch.randn(5000, 16), "lm_head.weight": torch.zeros(1)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][1000:] += 1
    save_file(weights, tmp_path / "model.safetensors")
    read = reader.read(tmp_path / "model.safetensors")
    assert tied_head.other_head(Directory(tmp_path), read.tensors) == "lm_head.weight"


# What transformers reads, and nothing else


def test_only_files_that_transformers_reads_are_checked(tmp_path: Path) -> None:
    folder = strangers.save_llama(tmp_path / "model")
    for name in ("data_config.json", "eval_config.json", "my-run_config.json"):
        (folder / name).write_text('[{"name": "pairs"}]', encoding="utf-8")
    assert spec_of(folder).skeleton.model_class == "LlamaForCausalLM"


def test_configs_are_those_of_transformers() -> None:
    names = {value for value in vars(transformers.utils).values() if isinstance(value, str) and value.endswith("config.json")}
    assert names - {auxiliary_files.ADAPTER} <= auxiliary_files.CONFIGS


def test_an_index_without_metadata_is_told(tmp_path: Path) -> None:
    folder = strangers.save_llama(tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(KeyError, match="metadata"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match='has no "metadata"'):
        spec_of(folder)
