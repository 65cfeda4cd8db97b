"""The files beside the weights: config, tokenizer, templates, code. What they ask for, and bounds before a library reads them.

A library that loads a model takes every string in these files at its word. So before one is asked to, they are bounded in size
and depth, whatever is read through them must lie in the model's own directory, and the code that they name is known: it runs
only with --trust-remote-code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import msgspec

from harness.checkpoint import settings_check
from harness.checkpoint.formats.files import Blob, Folder, check_enclosed, quote
from harness.checkpoint.formats.safetensors_header import marks, parse_config, read_index
from harness.core.errors import CheckpointError
from harness.core.records import Record
from harness.core.units import format_size

MOST_TEXT_BYTES = 64 << 20  # the largest tokenizers known have 35 MB
TEXT_MARKS = 8_000_000
PATH_LETTERS = 4096  # PATH_MAX of Linux: no system opens a longer path
MOST_PATHS = 1000

TOKENIZER_CONFIG = "tokenizer_config.json"
CUSTOM_GENERATE = "custom_generate/generate.py"
TEMPLATES = "additional_chat_templates"  # whose *.jinja transformers reads as well
ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"

# The configs that transformers and the packages of quantizers open; what else is called so is nobody's.
CONFIGS = frozenset((
    "audio_tokenizer_config.json", "config.json", GENERATION, "preprocessor_config.json", "processor_config.json",
    "quant_config.json", "quantize_config.json", "special_tokens_map.json", TOKENIZER_CONFIG, "video_preprocessor_config.json",
))  # fmt: skip
_TEXT = re.compile(r".*\.(txt|model|jinja|tiktoken)|(.*tokenizer.*|.*vocab.*|added_tokens|chat_template|tekken|merges)\.json")
# What a tokenizer is made of; one that counts bytes, or is the model's own code, needs nothing but its config.
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(json|txt)|tekken\.json|.*\.(model|tiktoken)")
_BYTES = ("ByT5Tokenizer", "PerceiverTokenizer")
_TOKENIZER = "tokenizer.json"
_MODEL_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
_TOKENIZER_CLASS = "AutoTokenizer"
KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


class _Tokenizer(msgspec.Struct):
    """What every tokenizer.json has."""

    model: msgspec.Raw


class RemoteCode(Record, frozen=True, kw_only=True):
    """Code that a file of the model asks for. `kind` is model, tokenizer, generate or kernel; `name` what `file` names."""

    kind: str
    file: str
    name: str

    def needed(self, has_class: bool) -> bool:
        """Say whether nothing loads without it; `has_class`: transformers has a class of its own for this architecture."""
        return self.kind == "kernel" or (self.kind != "generate" and not has_class)

    @property
    def elsewhere(self) -> bool:
        """Say whether it lies in another repository, as "org/name--file.Class" and the kernels of the hub do."""
        return self.kind == "kernel" or (self.kind != "generate" and ("--" in self.name or "/" in self.name))

    def __str__(self) -> str:
        return self.name if self.name == self.file else f"{self.name} ({self.file})"


def remote_code(folder: Folder, config: Mapping[str, Any]) -> tuple[RemoteCode, ...]:
    """Find the code that a model's config, tokenizer and own `generate` would have a library run. Runs nothing.

    Raises:
        CheckpointError: the tokenizer's config cannot be understood.
    """
    found = [RemoteCode(kind=kind, file="config.json", name=name) for kind, name in _named(config)]
    if folder.size(TOKENIZER_CONFIG):
        with closing(folder.open(TOKENIZER_CONFIG)) as blob:
            tokenizer = parse_config(blob)
        named = (name for kind, name in _named(tokenizer) if kind == "tokenizer")
        found += [RemoteCode(kind="tokenizer", file=TOKENIZER_CONFIG, name=name) for name in named]
    if folder.size(CUSTOM_GENERATE) is not None:
        found.append(RemoteCode(kind="generate", file=CUSTOM_GENERATE, name=CUSTOM_GENERATE))
    return tuple(dict.fromkeys(found))


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield kind and name of what one config asks for: classes in `auto_map`, kernels of the hub instead of attention."""
    classes = config.get("auto_map")
    if isinstance(classes, dict):
        for key in _MODEL_CLASSES:
            yield from (("model", name) for name in _texts(classes.get(key)))
        classes = classes.get(_TOKENIZER_CLASS)
    yield from (("tokenizer", name) for name in _texts(classes))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if KERNEL_KEYS.fullmatch(key):
                choices = value.values() if isinstance(value, dict) else (value,)
                yield from (("kernel", name) for choice in choices for name in _texts(choice) if "/" in name)


def _texts(value: object) -> list[str]:
    """Return the strings that a value is or lists, shortened to what a sentence bears."""
    values = value if isinstance(value, list) else [value]
    return [text if len(text) <= 120 else f"{text[:120]}..." for text in values if isinstance(text, str)]


def has_tokenizer(folder: Folder) -> bool:
    """Say whether the files have a tokenizer: a vocabulary, or a config that needs none. Raises CheckpointError."""
    if any(_VOCABULARY.fullmatch(name) and folder.size(name) for name in folder.names()):
        return True
    if not folder.size(TOKENIZER_CONFIG):
        return False
    with closing(folder.open(TOKENIZER_CONFIG)) as blob:
        config = parse_config(blob)
    return config.get("tokenizer_class") in _BYTES or any(kind == "tokenizer" for kind, _ in _named(config))


def check_files(folder: Folder) -> None:
    """Refuse what must not reach a library: text without bound, and anything that leads out of the directory.

    Text comes out again, in answers and messages, so it may not be a link to elsewhere either; weights may.

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
    """
    names = folder.names()
    if ADAPTER in names:
        raise CheckpointError(
            f"{folder.where}/{ADAPTER}",
            "makes transformers load an adapter on top of the weights, or another model, where peft is installed: "
            "merge the adapter into the weights, or take this file away",
        )
    for name in names + [name for name in folder.names(TEMPLATES) if name.endswith(".jinja")]:
        if name.endswith(".index.json"):
            with closing(folder.open(name)) as blob:
                for shard in sorted(set(read_index(blob).values())):
                    check_enclosed(folder, blob.where, f"the shard {quote(shard)}", shard)
        elif name in CONFIGS or _TEXT.fullmatch(name):
            _check_text(folder, name)


def _check_text(folder: Folder, name: str) -> None:
    if not folder.encloses(name):
        raise CheckpointError(f"{folder.where}/{name}", "is a link to a place outside its directory: put a copy in its place")
    if not folder.size(name):
        return  # an empty file holds nothing; whoever needs it says so
    with closing(folder.open(name)) as blob:
        if name in CONFIGS:
            config = parse_config(blob)
            _check_paths(folder, blob.where, config)
            if name == GENERATION and (fault := settings_check.generation_fault(config)):
                raise CheckpointError(blob.where, f"{fault}: correct it, or take the file away")
        else:
            _check_bounds(blob)


def _check_paths(folder: Folder, where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that names a file of this machine outside its directory, seen from there or from anywhere below /.

    Authors leave paths of their own machines behind; those lead nowhere here and do no harm.
    """
    paths = {text for text in _strings(config) if text.startswith(("/", ".")) or "/../" in text}
    if len(paths) > MOST_PATHS:
        raise CheckpointError(where, f"names {len(paths):,} paths: this is not what its name says")
    for path in paths:
        if len(path) < PATH_LETTERS and "\0" not in path:
            for meant in (path, "/" + path.lstrip("./")):
                if folder.size(meant) is not None and not folder.encloses(meant):
                    raise CheckpointError(
                        where, f"names the file {quote(path)}, outside its directory: do not use it, or remove the entry"
                    )


def _check_bounds(blob: Blob) -> None:
    if blob.size > MOST_TEXT_BYTES:
        raise CheckpointError(
            blob.where,
            f"has {format_size(blob.size)} while {format_size(MOST_TEXT_BYTES)} is the most: this is not what its name says",
        )
    if not blob.name.endswith(".json"):
        return
    data = blob.read(0, blob.size)
    if marks(data) > TEXT_MARKS:
        raise CheckpointError(blob.where, f"holds more than {TEXT_MARKS:,} values: this is not what its name says")
    try:
        if blob.name == _TOKENIZER:
            _check_tokenizer(blob, data)
        else:
            msgspec.json.decode(data, type=msgspec.Raw)  # walks it all and builds nothing
    except RecursionError as error:
        raise CheckpointError(blob.where, "is nested too deep: this is not what its name says") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(blob.where, f"cannot be understood as JSON ({error}): download it again") from error


def _check_tokenizer(blob: Blob, data: bytes) -> None:
    try:
        msgspec.json.decode(data, type=_Tokenizer)
    except msgspec.ValidationError as error:
        msgspec.json.decode(data, type=msgspec.Raw)  # no JSON at all would be the first thing to say
        what = f"is no tokenizer ({error}): download it again, or take it away to measure without quality"
        raise CheckpointError(blob.where, what) from error


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a config, whose depth is bounded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
