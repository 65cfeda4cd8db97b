"""A checkpoint from its headers: config, files, tensors; of a directory, of one file, of a hub repository.

Nothing here reads a weight. Which files count is decided as transformers decides it: `model.safetensors`, its index,
`pytorch_model.bin`, its index, in this order; then a GGUF file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from harness.checkpoint import settings_check
from harness.checkpoint.auxiliary_files import RemoteCode, remote_code
from harness.checkpoint.foreign_folder import is_model_file, refuse
from harness.checkpoint.formats.files import OWN_CONFIG, Directory, Folder, check_enclosed, quote
from harness.checkpoint.formats.safetensors_header import StoredTensor, check_metadata, parse_config, read_index, read_safetensors
from harness.checkpoint.own_files import with_own_file
from harness.checkpoint.quantization import describe_quantization, weights_in
from harness.checkpoint.tied_head import other_head
from harness.core.dtypes import FLOAT_NAMES
from harness.core.errors import CheckpointError, UsageError, did_you_mean
from harness.core.families import GGUF
from harness.core.records import Record

__all__ = ["Checkpoint", "FileInfo", "StoredTensor", "read", "read_hub"]

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES: Mapping[str, str] = {
    ".safetensors": "safetensors",
    ".bin": "bin",
    ".pt": "bin",
    ".pth": "bin",
    GGUF.suffix: GGUF.name,
}

PARALLEL_REQUESTS = 8
LARGEST_SIZE = 1 << 32
MOST_LAYERS = 4096
MOST_SHARDS = 8192  # DeepSeek-V3 comes in 163, and each is looked for on the disk

LAYER_KEYS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers"})
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx")
WIDTH_KEYS = frozenset({"hidden_size", "n_embd", "d_model", "head_dim", "kv_channels", "vocab_size", "padded_vocab_size"})
INNER_KEYS = frozenset({"intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner", "ffn_dim"})
HEAD_KEYS = frozenset({"num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "multi_query_group_num"})
# Where a config gives one of these it must be a size. Experts and windows are not among them: 0 there means "none". Nor is
# max_position_embeddings, which models without a tensor of positions are loaded with whatever it is.
SIZE_KEYS = LAYER_KEYS | WIDTH_KEYS | INNER_KEYS | HEAD_KEYS | frozenset(CONTEXT_KEYS[1:])
# A model that sees or hears keeps its language model's sizes one level down.
INNER_CONFIGS = ("text_config", "llm_config", "language_config")

_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_FIRST = r"\g<stem>-00001-of-\g<count>.gguf"


class FileInfo(Record, frozen=True, kw_only=True):
    """One file with weights; `format` is safetensors, bin or gguf."""

    name: str
    bytes: int
    format: str


class Checkpoint(Record, frozen=True, kw_only=True):
    """The files of a model. `path` is a local path or a hub id; `config` is config.json, or a GGUF's own metadata.

    `remote_code` is the code that these files ask for; reading them runs none of it. `listed` is the file of each tensor by the
    index, and `duplicates` are tensors that a later file holds again.
    """

    path: str
    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    files: tuple[FileInfo, ...]
    remote_code: tuple[RemoteCode, ...] = ()
    listed: dict[str, str] = {}
    duplicates: tuple[StoredTensor, ...] = ()
    other_head: str | None = None  #: the name of an output head whose values are not the embedding's, whatever the config ties

    @property
    def distinct(self) -> Iterator[StoredTensor]:
        """Yield the tensors, those that share their bytes with an earlier one left out."""
        seen = set()
        for tensor in self.tensors:
            key = (tensor.file, tensor.storage)
            if tensor.storage is None or key not in seen:
                seen.add(key)
                yield tensor

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors, shared ones once."""
        return sum(tensor.bytes for tensor in self.distinct)

    @property
    def parameters(self) -> int:
        """Return how many weights are stored: packed ones unpacked, masks and scales left out, shared ones once."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return sum(weights_in(tensor, shapes, self.config) for tensor in self.distinct)

    @property
    def dtype_bytes(self) -> dict[str, int]:
        """Return the bytes by dtype, largest first."""
        total: Counter[str] = Counter()
        for tensor in self.distinct:
            total[tensor.dtype] += tensor.bytes
        return dict(total.most_common())

    @property
    def architecture(self) -> str | None:
        """Return the class that config.json names, else its model type; GGUF's name of the architecture."""
        named = self.config.get("architectures")
        first = named[0] if isinstance(named, list) and named else None
        candidates = (first, self.config.get("model_type"), self.config.get("general.architecture"))
        return next((name for name in candidates if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200), None)

    @property
    def quantization(self) -> str | None:
        """Say in a few words how the stored weights are quantized, None if they are not."""
        return describe_quantization(self.config, self.tensors)

    @property
    def context_length(self) -> int | None:
        """Return the most tokens the config promises, None if it does not say."""
        return context_length(self.config)

    def size(self, *keys: str) -> int:
        """Return the first of these sizes that the config (or the config of its language model) gives.

        Raises:
            CheckpointError: none is given.
        """
        value = _find_size(self.config, keys)
        if value is None:
            wanted = " or ".join(repr(key) for key in keys)
            raise CheckpointError(f"{self.path}/{CONFIG}", f"gives no {wanted}: {OWN_CONFIG}")
        return value


def read(path: Path) -> Checkpoint:
    """Read a directory, or one .safetensors, .gguf or .bin file, from their headers.

    Raises:
        CheckpointError: no weights there, or files that are unreadable, incomplete or hostile.
    """
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except OSError as error:  # a name that is too long, for one
        raise CheckpointError(quote(str(path)), f"is no path ({error.strerror}): check it") from error
    if is_file:
        return _read(Directory(path.parent), path.name, str(path))
    if is_directory:
        return _read(Directory(path), None, str(path))
    raise CheckpointError(path, "is neither a directory nor a file: check the path")


def read_hub(repo_id: str, revision: str | None = None, file: str | None = None) -> Checkpoint:
    """Read a hub repository, from the local cache if its weights are there, else by ranged requests for headers only.

    `file` picks one file of the repository, as a repository with several GGUF files needs it. Settings are those of
    huggingface_hub: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        CheckpointError: as `read`.
        UsageError: the repository cannot be had: offline, gated, no such name or revision, no answer.
    """
    from harness.checkpoint import hub

    cached = hub.cached_snapshot(repo_id, revision)
    if cached is not None and _is_complete(Directory(cached), file):
        return msgspec.structs.replace(_read(Directory(cached), file, str(cached)), path=repo_id)
    with hub.connected():
        return _read(hub.Repository(repo_id, revision), file, repo_id)


def _read(folder: Folder, file: str | None, path: str) -> Checkpoint:
    names, listed = _weight_files(folder, file)
    if names[0].endswith(GGUF.suffix):
        return _read_split_gguf(folder, names, path)
    config = read_config(folder)
    parts = _read_files(folder, names)
    # As in transformers, a name that two shards hold means the later one.
    tensors = {tensor.name: tensor for _, found in parts for tensor in found}
    duplicates = [tensor for _, found in parts for tensor in found if tensors[tensor.name] is not tensor]
    return Checkpoint(
        path=path,
        config=config,
        tensors=tuple(tensors.values()),
        files=tuple(info for info, _ in parts),
        remote_code=remote_code(folder, config),
        listed=listed,
        duplicates=tuple(duplicates),
        other_head=other_head(folder, tensors.values()) if _may_tie(config) else None,
    )


def _may_tie(config: Mapping[str, Any]) -> bool:
    """Say whether a config leaves it open that head and embedding are one; that of the language model inside may say so as well."""
    said = [part["tie_word_embeddings"] for part in _with_inner(config) if "tie_word_embeddings" in part]
    return True in said or False not in said


def _with_inner(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a config and those of the language models inside."""
    return [config, *(inner for key in INNER_CONFIGS if isinstance(inner := config.get(key), dict))]


def _read_files(folder: Folder, names: list[str]) -> list[tuple[FileInfo, list[StoredTensor]]]:
    if not folder.remote:
        return [_read_file(folder, name) for name in names]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(lambda name: _read_file(folder, name), names))


def _read_file(folder: Folder, name: str) -> tuple[FileInfo, list[StoredTensor]]:
    kind = SUFFIXES[Path(name).suffix]
    with closing(folder.open(name)) as blob:
        return FileInfo(name=name, bytes=blob.size, format=kind), _reader(kind)(blob)


def _reader(kind: str) -> Callable[..., list[StoredTensor]]:
    """Return what reads the headers of a format; that of pickles comes with its own machine and is imported for them alone."""
    if kind == "bin":
        from harness.checkpoint.formats.bin_header import read_bin

        return read_bin
    return read_safetensors


def _read_split_gguf(folder: Folder, names: list[str], path: str) -> Checkpoint:
    """Read the parts of a GGUF; the first has the metadata."""
    from harness.checkpoint.formats.gguf_header import read_gguf

    config: dict[str, Any] = {}
    tensors: list[StoredTensor] = []
    files = []
    for name in names:
        with closing(folder.open(name)) as blob:
            metadata, found = read_gguf(blob)
            files.append(FileInfo(name=name, bytes=blob.size, format=GGUF.name))
        config = {**metadata, **config}
        tensors += found
    return Checkpoint(path=path, config=config, tensors=tuple(tensors), files=tuple(files))


def _weight_files(folder: Folder, file: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files with weights that a loader would open, and the file of each tensor if an index lists them."""
    if file is None:
        file = next((name for name in WEIGHTS if folder.size(name) is not None), None) or _only_gguf(folder)
    if file.endswith(".index.json"):
        listed = _index(folder, file)
        there = _present(folder, sorted(set(listed.values())), file)
        with closing(folder.open(file)) as blob:
            check_metadata(blob)
        return there, listed
    if Path(file).suffix not in SUFFIXES:
        raise UsageError(f"{folder.where}/{file} is no file of weights: name one that ends in {', '.join(SUFFIXES)}")
    if folder.size(file) is None:
        raise UsageError(f"{folder.where} has no file {file!r}: {did_you_mean(file, folder.names())}")
    split = _SPLIT.fullmatch(file)
    parts = [f"{split['stem']}-{part:05}-of-{split['count']}.gguf" for part in range(1, int(split["count"]) + 1)] if split else []
    return _present(folder, parts, file) if file in parts else [file], {}


def _only_gguf(folder: Folder) -> str:
    names = folder.names()
    found = [name for name in names if name.endswith(GGUF.suffix) and is_model_file(name)]
    whole = list(dict.fromkeys(_SPLIT.sub(_FIRST, name) for name in found))
    if len(whole) == 1:
        return next((name for name in whole if name in found), found[0])
    if whole:
        raise CheckpointError(folder.where, f"has {len(whole)} GGUF files; name one, by its path or --file: {_some(whole)}")
    what = f"has no weights: {WEIGHTS[0]}, {WEIGHTS[2]}, an index of theirs or a GGUF file; it has {_some(names)}"
    raise refuse(folder, names, _lost_index(names) or what)


def _lost_index(names: list[str]) -> str | None:
    """Say which index is missing if there are shards of one."""
    for index in WEIGHTS[1::2]:
        whole, suffix = index.removesuffix(".index.json").rsplit(".", 1)
        shard = re.compile(rf"{whole}-\d+-of-\d+\.{suffix}")
        if found := [name for name in names if shard.fullmatch(name)]:
            return f"has {_some(found)} without {index}, by which they are found: download that too"
    return None


def shards(folder: Folder, index: str) -> list[str]:
    """Return the names of the shards of an index, all of them there. Raises CheckpointError."""
    return _present(folder, shard_names(folder, index), index)


def shard_names(folder: Folder, index: str) -> list[str]:
    """Return the names of the shards of an index, none of which leads out of the folder. Raises CheckpointError."""
    return sorted(set(_index(folder, index).values()))


def _index(folder: Folder, index: str) -> dict[str, str]:
    """Return the shard of each tensor, none of which leads out of the folder. Raises CheckpointError."""
    with closing(folder.open(index)) as blob:
        listed = read_index(blob)
        where = blob.where
    names = sorted(set(listed.values()))
    if len(names) > MOST_SHARDS:
        raise CheckpointError(where, f"names {len(names):,} shards, and no model has more than {MOST_SHARDS:,}: correct the index")
    for name in names:
        check_enclosed(folder, where, f"the shard {quote(name)}", name)
        if Path(name).suffix not in SUFFIXES or name.endswith(GGUF.suffix):
            raise CheckpointError(
                where, f"names the shard {quote(name)}, which is neither .safetensors nor .bin: correct the index"
            )
    other = next((name for name in names if not name.endswith(".safetensors")), None)
    if names and names[0].endswith(".safetensors") and other is not None:  # after a first in .bin each is read by its own ending
        what = f"names the shards {quote(names[0])} and {quote(other)}, and transformers reads all as it does the first"
        raise CheckpointError(where, f"{what}: correct the index")
    return listed


def _present(folder: Folder, names: list[str], wanted_by: str) -> list[str]:
    missing = [name for name in names if folder.size(name) is None]
    if missing:
        what = f"{len(missing)} of {len(names)} shards are missing: {_some(missing)}"
        raise CheckpointError(f"{folder.where}/{wanted_by}", f"{what}: complete the download")
    return names


def _is_complete(folder: Folder, file: str | None) -> bool:
    """Say whether a snapshot of the cache has the weights, and not only what was looked up before."""
    try:
        return bool(_weight_files(folder, file))
    except (CheckpointError, UsageError):
        return False


def read_config(folder: Folder) -> dict[str, Any]:
    """Return the checked config.json, {} where there is none: files can be looked at without it. Raises CheckpointError."""
    if folder.size(CONFIG) is None:
        return {}
    with closing(folder.open(CONFIG)) as blob:
        config = parse_config(blob)
        where = blob.where
    for inner in _with_inner(config):
        _check_sizes(where, inner)
        _check_kind(where, inner, "model_type", "text", (str, type(None)))
    _check_kind(where, config, "auto_map", "a table of classes", (dict, list, str))
    refused = settings_check.fault(config) or next(filter(None, map(settings_check.loading_fault, _with_inner(config))), None)
    if refused is not None:
        raise CheckpointError(where, f"{refused}: {OWN_CONFIG}")
    return with_own_file(folder, config)


def _check_kind(where: str, config: Mapping[str, Any], key: str, kind: str, taken: tuple[type, ...]) -> None:
    """Refuse what transformers would look into before it checks anything."""
    if key in config and not isinstance(config[key], taken):
        raise CheckpointError(where, f"gives {key!r} as {quote(config[key])}; it must be {kind}: {OWN_CONFIG}")


def _check_sizes(where: str, config: Mapping[str, Any]) -> None:
    for key in SIZE_KEYS & config.keys():
        value = config[key]
        most = MOST_LAYERS if key in LAYER_KEYS else LARGEST_SIZE
        values = value if isinstance(value, list) else [value]
        wrong = [one for one in values if one is not None and not (type(one) is int and 0 < one < most)]
        if wrong:
            what = f"gives {key!r} as {quote(wrong[0])}; it must be a whole number from 1 to {most - 1}"
            raise CheckpointError(where, f"{what}: {OWN_CONFIG}")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a config, or a GGUF's metadata, promises, None if it does not say."""
    return _find_size(config, (*CONTEXT_KEYS, f"{config.get('general.architecture')}.context_length"))


def stated_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a config, or that of its language model, says its weights have; float16 if neither does."""
    said = (source.get(key) for source in _with_inner(config) for key in ("torch_dtype", "dtype"))
    return next((FLOAT_NAMES.get(dtype, dtype) for dtype in said if isinstance(dtype, str) and dtype), "float16")


def _find_size(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    values = (source.get(key) for source in _with_inner(config) for key in keys)
    return next((value for value in values if type(value) is int and 0 < value < LARGEST_SIZE), None)


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(quote(name) for name in names[:most])
    return (shown or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")
