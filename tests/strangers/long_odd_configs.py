"""Every key of some configs with a dozen odd values: either a model is planned that writes, or one sentence names the key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.architecture import skeleton_source
from harness.checkpoint import reader
from harness.checkpoint.formats.files import Directory
from harness.core.errors import CheckpointError, UsageError
from harness.worker import build_skeleton as worker
from harness.worker.config.refusal import CONTRADICTIONS
from tests.strangers.stored_forms import SMALL
from tests.worker.test_config_refusal import SOUND

pytestmark = pytest.mark.filterwarnings("ignore")
# Words in which Python, and what transformers checks its configs by, speak of an error.
PYTHON = re.compile(r"\w+Error\b|NoneType|has no attribute|Field '|<class|object is not|subscriptable|not iterable|got an? ")
TEXT = {key: value for key, value in SMALL.items() if key != "architectures"}
SEES = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAVA: Mapping[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": TEXT,
    "vision_config": {**SEES, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    "image_token_index": 511,
}
GPT2: Mapping[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    **dict.fromkeys(("n_layer", "n_head"), 2),
    "n_embd": 32,
    "n_positions": 64,
    "vocab_size": 128,
}
KINDS = {"llama": SMALL, "llava": LLAVA, "gpt2": GPT2, **{kind: {"model_type": kind, **config} for kind, config in SOUND.items()}}
# Beside the keys of each: what somebody writes by hand or a script leaves behind.
KEYS = (
    "text_config", "vision_config", "quantization_config", "rope_scaling", "rope_parameters", "dtype", "auto_map", "layer_types",
    "sliding_window", "attn_implementation", "id2label", "return_dict", "hidden_act",
)  # fmt: skip
VALUES: tuple[Any, ...] = (None, "x", "32", 0, -1, 1.5, True, False, [], ["x"], {"a": 1}, float("nan"))


LARGE = 100_000_000  # parameters of what is made of what the config does not say
# What only a pass with an image, an odd number or a prompt beyond the sizes would show; a size below 1, which some never read.
UNSEEN = {("pad_token_id", "nan"), ("num_key_value_heads", "-1")}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def sentence(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return what is said of a config that lies alone in a folder, None if a model is made of it."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        skeleton_source.of_config(reader.read_config(Directory(folder)), "stranger")
    except (CheckpointError, UsageError) as error:
        return str(error)
    return None


def writes(folder: Path) -> bool:
    """Say whether transformers makes a model of the config in a folder that writes two tokens."""
    try:
        read = transformers.AutoConfig.from_pretrained(folder, return_dict=True)
        auto: Any = transformers.AutoModelForImageTextToText if read.model_type == "llava" else transformers.AutoModelForCausalLM
        if worker.construct(auto, read).num_parameters() < LARGE:
            auto.from_config(read).generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    except CONTRADICTIONS:
        return False
    return True


def changed(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield key, value and config of each change, at the top and in the config of the text model."""
    for key in dict.fromkeys((*config, *KEYS)):
        yield from ((key, value, {**config, key: value}) for value in VALUES)
    inner = config.get("text_config", {})
    for key in inner:
        yield from ((f"text_config.{key}", value, {**config, "text_config": {**inner, key: value}}) for value in VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_value_is_told_where_transformers_takes_none(kind: str, tmp_path: Path) -> None:
    """As many as are told wrong, silently or without need, are listed; a model of no layers, or of no width, is refused here."""
    wrong, told = [], 0
    for key, value, config in changed(KINDS[kind]):
        if value == 0 and key.rpartition(".")[2] in reader.SIZE_KEYS:
            continue
        said = sentence(config, tmp_path)
        told += said is not None
        if said is not None and (PYTHON.search(said) or said.count("\n")):
            wrong.append((key, value, said))
        elif (said is None) != writes(tmp_path) and (key, str(value)) not in UNSEEN:
            wrong.append((key, value, said or "is planned"))
    assert told > 50
    assert wrong == []
