"""Configs that no tensors can follow, and that tensors contradict: each told before loading, where transformers ends or errs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.quantizers.auto import get_hf_quantizer

from harness.architecture import model_spec, skeleton_source
from harness.architecture.ask_worker import RefusedConfig
from harness.checkpoint import quantization, reader
from harness.core.errors import CheckpointError
from harness.worker import build_skeleton as worker
from tests.strangers.stored_forms import BF16, F8, F32, FORMS, I32, MXFP4, SMALL, Form, Tensors, save_tensors, tensors_of

Parts = Callable[[int, int], Tensors]
HALF = torch.float16


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def save(folder: Path, parts: Parts, settings: Any = None, **changed: Any) -> Path:
    """Write a small Llama whose weights lie in such parts, with settings of quantization and other values in its config."""
    config = {**SMALL, **changed, **({} if settings is None else {"quantization_config": settings})}
    shape = {**SMALL, "num_key_value_heads": config["num_key_value_heads"]}
    return save_tensors(folder, config, *tensors_of(shape, Form(parts, {})))


def told(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        model_spec.of_checkpoint("stranger", "stranger", reader.read(folder), folder)
    return str(error.value)


def runs(folder: Path) -> bool:
    """Say whether transformers loads all that the files hold, nothing else, and writes with it."""
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", output_loading_info=True)
        loaded[0].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, StrictDataclassError, KeyError):
        return False
    return not any(loaded[1].values())


def plain(outputs: int, inputs: int) -> Tensors:
    return {".weight": (BF16, (outputs, inputs))}


def scaled(part: str) -> Parts:
    return lambda outputs, inputs: {".weight": (F8, (outputs, inputs)), part: (F32, (outputs, 1))}


def gptq(group: int) -> Parts:
    return lambda outputs, inputs: {
        ".qweight": (I32, (inputs // 8, outputs)),
        ".qzeros": (I32, (-(-inputs // group), outputs // 8)),
        ".scales": (HALF, (-(-inputs // group), outputs)),
        ".g_idx": (I32, (inputs,)),
    }


# Sizes

MAKES_NONE = r", and transformers 5\S* makes no working model of that( \(without the key it takes \S+\))?"
SIZES = [
    (
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        r'transformers 5\S* refuses it: ".* is not a multiple of the number of attention heads \(5\)"',
    ),
    ({"num_key_value_heads": 3}, rf"gives num_key_value_heads as 3{MAKES_NONE}"),
    (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 7},
        r"gives num_attention_heads as 7 and num_key_value_heads as 2, and .* makes no working model of these together",
    ),
    ({"text_config": "x"}, rf"gives text_config as 'x'{MAKES_NONE}"),
    ({"rope_parameters": {"rope_type": "none such"}}, rf"gives rope_parameters\.rope_type as 'none such'{MAKES_NONE}"),
    ({"layer_types": ["full_attention"]}, 'refuses it: ".* must be equal to the number of `layer_types`.*"'),
]


@pytest.mark.parametrize(("changed", "said"), SIZES, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_sizes_that_contradict_each_other_are_told_before_loading(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", plain, **changed)
    assert re.search(rf"config\.json: .*{said}: use the config\.json that belongs to the weights", told(folder))
    assert not runs(folder)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_embd": 60, "n_head": 8}), ("opt", {"hidden_size": 60, "num_attention_heads": 8}),
        ("gpt_neox", {"hidden_size": 60, "num_attention_heads": 8}), ("bloom", {"hidden_size": 60, "n_head": 8}),
        ("gptj", {"n_embd": 60, "n_head": 8}), ("mpt", {"d_model": 60, "n_heads": 8}),
        ("mixtral", {"hidden_size": 60, "num_attention_heads": 8}), ("phi", {"hidden_size": 60, "num_attention_heads": 8}),
    ],
)  # fmt: skip
def test_heads_that_do_not_divide_are_told_of_every_architecture(kind: str, sizes: dict[str, int]) -> None:
    with pytest.raises(RefusedConfig, match=r"transformers 5\S* (refuses it: |makes no working model of th(at|ese together))"):
        worker.build_skeleton({"model_type": kind, "vocab_size": 99, "num_hidden_layers": 1, "intermediate_size": 64, **sizes})


def test_a_head_size_of_its_own_needs_no_division() -> None:
    config = {**SMALL, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 60, "head_dim": 16}
    assert worker.build_skeleton({**config, "num_attention_heads": 8}).heads == 8


# Settings of quantization

NF4, INT8, METAL = (FORMS[name].settings for name in ("bnb-nf4", "bnb-int8", "metal"))
CONTRADICTIONS: Mapping[str, tuple[Parts, Any, str]] = {
    "words for settings": (plain, "int4", "gives quantization_config as 'int4', which is no table of settings"),
    "nf4 said, 16 bits stored": (plain, NF4, "says bitsandbytes 4-bit nf4, and no tensor of the files is packed so"),
    "int8 said, 16 bits stored": (plain, INT8, "says bitsandbytes 8-bit, and no tensor of the files is packed so"),
    "fp4 said, nf4 stored": (FORMS["bnb-nf4"].parts, {**NF4, "bnb_4bit_quant_type": "fp4"}, "says 'fp4', and .* is nf4"),
    "int8 said, nf4 stored": (FORMS["bnb-nf4"].parts, INT8, r"without its .*SCB"),
    "nf4 said, int8 stored": (FORMS["bnb-int8"].parts, NF4, r"without its .*absmax"),
    "metal said, 16 bits stored": (plain, METAL, "says metal 4-bit, groups of 64, and no tensor"),
    "8 bits said, 4 stored": (FORMS["metal"].parts, {**METAL, "bits": 8}, "which means 4 bits, and the config says 8"),
    "other groups said": (FORMS["metal"].parts, {**METAL, "group_size": 32}, "128 x 4, the config asks for 128 x 8"),
    "groups do not divide": (FORMS["metal"].parts, {**METAL, "group_size": 48}, "which groups of 48 do not divide"),
    "bitnet said, 16 bits stored": (plain, FORMS["bitnet"].settings, "says bitnet, and no tensor of the files is packed so"),
    "nothing said, fp8 with scales": (scaled(".weight_scale"), None, "is float8_e4m3fn with .*weight_scale' beside it, which"),
    "nothing said, fp8 in blocks": (FORMS["fp8-blocks"].parts, None, "weight_scale_inv' beside it, which transformers leaves out"),
    "nothing said, int8 stored": (FORMS["ct-int8"].parts, None, "is int8, and the config says nothing of packed weights"),
    "nothing said, nf4 stored": (FORMS["bnb-nf4"].parts, None, "x 1, the config asks for"),
    "nothing said, gptq stored": (gptq(128), None, "says nothing of packed weights, and .*qweight"),
    "both bits said": (FORMS["bnb-nf4"].parts, {**NF4, "load_in_8bit": True}, "says both load_in_4bit and load_in_8bit"),
    "block of none": (FORMS["fp8-blocks"].parts, {**FORMS["fp8-blocks"].settings, "weight_block_size": [0, 128]}, "two numbers"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_tensors_contradict_is_told_and_transformers_does_not_load_it(name: str, tmp_path: Path) -> None:
    parts, settings, said = CONTRADICTIONS[name]
    folder = save(tmp_path / "model", parts, settings)
    assert re.search(said, told(folder))
    assert not runs(folder)


# What a processor would unpack right by the shapes alone, and a card would multiply wrong.
BLOCKS = [
    ("fp8-blocks", "fp8-small-blocks", "is 1 x 2, and blocks of 64 x 64, as the config says, have 2 x 4 scales"),
    ("fp8-small-blocks", "fp8-blocks", "is 2 x 4, and blocks of 128 x 128, as the config says, have 1 x 2 scales"),
    ("mxfp8", "fp8-blocks", "is 128 x 8, and blocks of 128 x 128, as the config says, have 1 x 2 scales"),
    ("fp8-blocks", "mxfp8", "is 1 x 2, and blocks of 1 x 32, as the config says, have 128 x 8 scales"),
]


@pytest.mark.parametrize(("stored", "said", "sentence"), BLOCKS)
def test_blocks_that_the_scales_contradict_are_told(stored: str, said: str, sentence: str, tmp_path: Path) -> None:
    assert sentence in told(save(tmp_path / "model", FORMS[stored].parts, FORMS[said].settings))


@pytest.mark.parametrize("group", [100, 96])
def test_groups_that_no_kernel_of_gptqmodel_takes_are_told(group: int, tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group}
    assert f"is packed in groups of {group} by the config, and kernels know 16, 32" in told(save(tmp_path, gptq(group), settings))


def test_a_mode_that_stores_16_bits_is_none_that_packs(tmp_path: Path) -> None:
    """BitNet's checkpoints for training: its layers are made of plain weights while loading."""
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    folder = save(tmp_path / "model", plain, settings)
    assert model_spec.of_checkpoint("m", "m", reader.read(folder), folder).packed is not None


def test_of_two_places_the_first_counts_as_in_transformers(tmp_path: Path) -> None:
    config = {**SMALL, "quantization_config": FORMS["fp8-blocks"].settings, "text_config": {"quantization_config": MXFP4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = quantization.packed(config)
    assert read is not None
    quantizer, _, _ = get_hf_quantizer(transformers.AutoConfig.from_pretrained(tmp_path), None, None, True, {})
    assert read.name == quantizer.quantization_config.quant_method == "fp8"
