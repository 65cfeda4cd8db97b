"""Turn a GGUF into a normal checkpoint: `python -m harness.worker.gguf.convert GGUF DIRECTORY`, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import pre_tokenizers

# What the loaders note about where the files came from; none of it is true of the checkpoint.
_LEFTOVERS = ("_name_or_path", "_model_name_or_path", "_from_model_config", "name_or_path", "is_local", "local_files_only")


def convert(source: Path, directory: Path) -> None:
    """Write `source` as bf16 safetensors, config and tokenizer with chat template into `directory`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = _load(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if _pre_tokenizer(source) == "smollm":
        _split_digits(tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _tidy(directory)


def _load(source: Path) -> Any:
    """Load the weights as bf16."""
    arguments: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    # Earlier versions of transformers 5 always dequantize and have no such class.
    if hasattr(transformers, "GgufConfig"):
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(source.parent, **arguments)


def _pre_tokenizer(source: Path) -> str | None:
    """Read how the GGUF says text is split before its merges apply."""
    field = gguf.GGUFReader(source).get_field("tokenizer.ggml.pre")
    return field.contents() if field else None


def _split_digits(tokenizer: Any) -> None:
    """Split numbers into digits first, as the model was trained; transformers' conversion drops this."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _tidy(directory: Path) -> None:
    """Drop the leftovers and let everybody read the weights who may read the config."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = directory / name
        settings = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in _LEFTOVERS}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mode = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(mode)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
