"""The anatomy of a checkpoint: its bytes by block and kind of module, and what it stores twice or not at all."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from harness.checkpoint.quantization import weights_in
from harness.checkpoint.reader import Checkpoint, StoredTensor
from harness.checkpoint.tied_head import EMBEDDING, HEAD
from harness.core.families import family_of
from harness.core.records import Record

# Kinds of module by words in a tensor's name; the first that matches counts, so "attn_norm" is a norm and "embed_out" a head.
KINDS = (
    ("norm", re.compile(r"norm|(^|[._])ln(_|\d|\.|$)|layer_?norm", re.IGNORECASE)),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output|score|classifier)\.")),
    ("embedding", re.compile(r"(^|[._])(wte|wpe|token_embd|tok_embeddings|embed\w*|\w*embeddings?)\.")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj\.|query_key_value|(^|\.)(wq|wk|wv|wo)\.", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|expert|moe|(^|\.)(fc\w*|up_proj|down_proj|gate_proj|gate|w[123])\.", re.IGNORECASE)),
)
OTHER = "other"

_BLOCK = re.compile(r"(?P<prefix>.*?)\.(?P<number>\d{1,5})\.(?P<rest>.+)")


class SizePart(Record, frozen=True, kw_only=True):
    """All tensors of one kind in a run of blocks that are alike; figures are for the whole run.

    `block` is "model.layers.0-29", "model.layers.0,2-5", or "" for what stands outside the blocks. `repeats` counts the blocks.
    """

    block: str
    repeats: int
    kind: str
    tensors: int
    parameters: int
    bytes: int
    dtype_bytes: dict[str, int]


class Tie(Record, frozen=True, kw_only=True):
    """Names that mean the same weights.

    `how`: "shared" (one storage in the file), "absent" (tied by the config, stored once), "repeated" (tied by the config and
    yet stored again). `extra_bytes` and `extra_parameters` are what the repetition adds to the file.
    """

    names: tuple[str, ...]
    how: str
    extra_bytes: int
    extra_parameters: int = 0


def kind_of(name: str) -> str:
    """Return embedding, attention, mlp, norm, head or other for a tensor's name."""
    return next((kind for kind, words in KINDS if words.search(name)), OTHER)


def anatomy(checkpoint: Checkpoint) -> list[SizePart]:
    """Group the tensors by block and kind of module: embeddings, blocks, the rest. Blocks that are alike become one run."""
    weights = _weights(checkpoint)
    outside: list[tuple[str, StoredTensor]] = []
    blocks: dict[tuple[str, int], list[tuple[str, StoredTensor]]] = defaultdict(list)
    for tensor in checkpoint.distinct:
        match = _BLOCK.match(tensor.name)
        home = blocks[match["prefix"], int(match["number"])] if match else outside
        home.append((match["rest"] if match else tensor.name, tensor))
    around = _parts("", 1, outside, weights)
    parts = [part for part in around if part.kind == "embedding"]
    for label, repeats, members in _runs(blocks):
        parts += _parts(label, repeats, members, weights)
    return parts + [part for part in around if part.kind != "embedding"]


def ties(checkpoint: Checkpoint) -> list[Tie]:
    """Return which names mean the same weights, by the file (shared storage) and by the config (tied embeddings)."""
    shared: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in checkpoint.tensors:
        if tensor.storage is not None and tensor.bytes:
            shared[tensor.file, tensor.storage].append(tensor.name)
    found = [Tie(names=tuple(names), how="shared", extra_bytes=0) for names in shared.values() if len(names) > 1]
    embedding = next((tensor for tensor in checkpoint.tensors if EMBEDDING.search(tensor.name)), None)
    head = next((tensor for tensor in checkpoint.tensors if HEAD.search(tensor.name)), None)
    if embedding is None or not _is_tied(checkpoint, head):
        return found
    if head is None:
        return [*found, Tie(names=(embedding.name,), how="absent", extra_bytes=0)]
    if any({embedding.name, head.name} <= set(tie.names) for tie in found):
        return found
    again = {"extra_bytes": head.bytes, "extra_parameters": _weights(checkpoint)[head.name]}
    return [*found, Tie(names=(embedding.name, head.name), how="repeated", **again)]


def _is_tied(checkpoint: Checkpoint, head: StoredTensor | None) -> bool:
    """Say whether the output uses the embedding's weights: a config says so by a key, or the files by leaving the head out."""
    said = checkpoint.config.get("tie_word_embeddings")
    if checkpoint.other_head is not None:
        return False
    if said is None and "general.architecture" in checkpoint.config:
        return head is None
    if said is None:
        headless = head is None and "LM" in (checkpoint.architecture or "")
        family = family_of(checkpoint.config)
        return headless or (family is not None and family.ties_by_default)
    return said is True


def _weights(checkpoint: Checkpoint) -> dict[str, int]:
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    return {tensor.name: weights_in(tensor, shapes, checkpoint.config) for tensor in checkpoint.tensors}


def _runs(
    blocks: Mapping[tuple[str, int], list[tuple[str, StoredTensor]]],
) -> Iterator[tuple[str, int, list[tuple[str, StoredTensor]]]]:
    """Yield label, number and members of the blocks that hold the same names, shapes and dtypes, in order of their first block."""
    alike: dict[tuple[str, frozenset[tuple[Any, ...]]], list[int]] = defaultdict(list)
    order = {prefix: place for place, prefix in enumerate(dict.fromkeys(prefix for prefix, _ in blocks))}
    for prefix, number in sorted(blocks, key=lambda key: (order[key[0]], key[1])):
        inventory = frozenset((rest, tensor.dtype, tensor.shape) for rest, tensor in blocks[prefix, number])
        alike[prefix, inventory].append(number)
    for (prefix, _), numbers in alike.items():
        members = [member for number in numbers for member in blocks[prefix, number]]
        yield f"{prefix}.{_ranges(numbers)}", len(numbers), members


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _parts(block: str, repeats: int, members: list[tuple[str, StoredTensor]], weights: Mapping[str, int]) -> list[SizePart]:
    by_kind: dict[str, list[StoredTensor]] = defaultdict(list)
    for rest, tensor in members:
        by_kind[kind_of(rest)].append(tensor)
    return [_part(block, repeats, kind, tensors, weights) for kind, tensors in by_kind.items()]


def _part(block: str, repeats: int, kind: str, tensors: list[StoredTensor], weights: Mapping[str, int]) -> SizePart:
    dtype_bytes: Counter[str] = Counter()
    for tensor in tensors:
        dtype_bytes[tensor.dtype] += tensor.bytes
    return SizePart(
        block=block,
        repeats=repeats,
        kind=kind,
        tensors=len(tensors),
        parameters=sum(weights[tensor.name] for tensor in tensors),
        bytes=dtype_bytes.total(),
        dtype_bytes=dict(dtype_bytes.most_common()),
    )
