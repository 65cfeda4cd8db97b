"""Models of strangers: with code of their own, with pickles that would run commands."""

from __future__ import annotations

import json
import textwrap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({canary!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "fitmatrix_own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
{body}
"""


class Runs:
    """Touches a file when it is unpickled by a careless reader."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def save_llama(folder: Path) -> Path:
    """Save a random Llama of a few hundred kB, without a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def change(file: Path, changes: Mapping[str, Any]) -> None:
    """Change the keys of a JSON file, and make it if it is not there."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**before, **changes}), encoding="utf-8")


def save_with_code(folder: Path, canary: Path, body: str = "pass") -> Path:
    """Save a Llama that only its own code can load; the code touches `canary`, and `body` runs when a model is made."""
    save_llama(folder)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder / "config.json", {"model_type": "fitmatrix_own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map})
    code = CODE.format(canary=str(canary), body=textwrap.indent(textwrap.dedent(body), " " * 8))
    (folder / "modeling_own.py").write_text(code, encoding="utf-8")
    return folder


def save_pickle(folder: Path, canary: Path) -> Path:
    """Put a pickle that runs code beside a config, in place of weights."""
    save_llama(folder)
    (folder / "model.safetensors").unlink()
    return add_pickle(folder, canary)


def add_pickle(folder: Path, canary: Path) -> Path:
    """Put a pickle that runs code into a model's directory, as torch.save would have."""
    state = OrderedDict({"model.embed_tokens.weight": torch.zeros(96, 64), "evil": Runs(canary)})
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def runs_when_unpickled(file: Path, canary: Path) -> None:
    """Do what the reader must not, so that the tests know that the pickle is a real one."""
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False)
    assert canary.exists()
    canary.unlink()
