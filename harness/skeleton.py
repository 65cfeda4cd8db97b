"""Skeletons: names, shapes and module tree of an architecture, no weights. Repeated blocks are stored once.

The truth is transformers on the meta device (`harness.worker.skeleton`). Skeletons of the catalog are shipped in
`data/skeletons.jsonl`, one line each under the fingerprint of its config; those of other models are built once by a worker
and kept in a cache directory. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from harness.case import Record
from harness.errors import UsageError, did_you_mean

DATA = Path(__file__).parent / "data"
BUILD_S = 120.0

# fmt: off
# What never changes a name, a shape or the KV cache: most configs of one architecture differ in these alone.
_SHAPELESS = frozenset((
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "dtype", "embd_pdrop",
    "eos_token_id", "gmask_token_id", "hidden_act", "hidden_activation", "hidden_dropout", "initializer_range",
    "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "mask_token_id", "output_router_logits", "pad_token_id",
    "pretraining_tp", "quantization_config", "resid_pdrop", "rms_norm_eps", "rope_local_base_freq", "rope_theta",
    "rotary_emb_base", "router_aux_loss_coef", "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache",
))
# Where positions are computed, the context length has no tensor.
_ROTARY = frozenset((
    "deepseek_v2", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "internlm2", "internlm3", "llama",
    "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
))
# fmt: on


class Tensor(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of a block.

    `kind` is parameter, buffer (saved) or unsaved (a buffer that no file holds). `dtype` is set where the model fixes it, whatever
    it is loaded as. `fp32` says when the model keeps it in float32 on loading: "fp16", or "half" for bfloat16 as well.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "parameter"
    dtype: str | None = None
    fp32: str | None = None


class Child(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A place for a block in its parent; with `count` the name is the first of as many consecutive numbers."""

    name: str
    block: int
    count: int = 1


class Block(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A module with its own tensors and children, in order.

    `linear` is "linear" (exactly torch's Linear), "conv1d" (GPT-2's, transposed) or None; `exempt` marks one that quantisers leave
    alone, such as the output embedding.
    """

    class_name: str
    tensors: tuple[Tensor, ...] = ()
    children: tuple[Child, ...] = ()
    linear: str | None = None
    exempt: bool = False


class Attention(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What a layer keeps of a sequence.

    `heads` x (`key_dim` + `value_dim`) elements per token, of at most `window` tokens, and `state` elements once (linear
    attention). Multi-head latent attention caches its latent; `expanded` is the width per token of the keys and values it
    computes from that, which other implementations cache instead.
    """

    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    state: int = 0
    expanded: int | None = None

    @property
    def per_token(self) -> int:
        """Elements of the KV cache per token."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor at its place. `quantises`: bitsandbytes would hold it in fewer bits. `tied_to` names the weight that it shares."""

    path: str
    elements: int
    tensor: Tensor
    quantises: bool
    tied_to: str | None


@dataclass(frozen=True, slots=True)
class Module:
    """A block at its place; `whole` means that a device map must not split it."""

    path: str
    block: Block
    whole: bool
    weights: tuple[Weight, ...]
    children: tuple[Module, ...]

    def walk(self) -> Iterator[Module]:
        """Visit this module and all inside it, parents first, in order."""
        yield self
        for child in self.children:
            yield from child.walk()


class Skeleton(Record, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """An architecture at one size. `blocks` end with the root. `layers` gives each layer's place in `attention`.

    `source` says where it comes from: "transformers 5.23.0", or "description" where transformers lacks the class.
    """

    model_class: str
    model_type: str
    source: str
    blocks: tuple[Block, ...]
    no_split: tuple[str, ...]
    tied: dict[str, str]
    not_converted: tuple[str, ...]
    attention: tuple[Attention, ...]
    layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    experts: int = 0
    experts_per_token: int = 0

    @cached_property
    def root(self) -> Module:
        """The module tree, every block in its place."""
        return self._expand("", self.blocks[-1])

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """All modules, parents first; walking the tree takes longer than most of what is done with it."""
        return tuple(self.root.walk())

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All tensors, parameters and buffers, in the order of the modules."""
        return tuple(weight for module in self.modules for weight in module.weights)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(w.elements for w in self.weights if w.tensor.kind == "parameter" and w.tied_to is None)

    def _expand(self, path: str, block: Block) -> Module:
        prefix = f"{path}." if path else ""
        children = [
            self._expand(f"{prefix}{name}", self.blocks[child.block]) for child in block.children for name in _numbered(child)
        ]
        weights = [self._weight(f"{prefix}{tensor.name}", tensor, block) for tensor in block.tensors]
        return Module(path, block, block.class_name in self.no_split, tuple(weights), tuple(children))

    def _weight(self, path: str, tensor: Tensor, block: Block) -> Weight:
        quantises = block.linear is not None and not block.exempt and tensor.name != "bias"
        return Weight(path, math.prod(tensor.shape), tensor, quantises, self.tied.get(path))


def _numbered(child: Child) -> list[str]:
    if child.count == 1:
        return [child.name]
    return [str(int(child.name) + i) for i in range(child.count)]


def fingerprint(config: Mapping[str, Any]) -> str:
    """Hash what a config says about names, shapes and the KV cache; 16 hex digits."""
    ignored = set(_SHAPELESS)
    if str(config.get("model_type")) in _ROTARY:
        ignored.add("max_position_embeddings")
    if config.get("use_sliding_window") is False:
        ignored |= {"sliding_window", "max_window_layers"}
    if "partial_rotary_factor" not in (config.get("rope_parameters") or {}):
        ignored.add("rope_parameters")
    if _has_default_heads(config):
        ignored.add("head_dim")
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _has_default_heads(config: Mapping[str, Any]) -> bool:
    """Tell whether a written head_dim says no more than its absence: transformers writes it into the configs that it saves."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("model_type") not in ("llama", "mistral") or not isinstance(hidden, int) or not isinstance(heads, int):
        return False
    return heads > 0 and config.get("head_dim") == hidden // heads


class Entry(Record, frozen=True, kw_only=True):
    """A model of the catalog: its config and its number of parameters, as published (`source` says by whom)."""

    parameters: int
    source: str
    config: dict[str, Any]


@lru_cache(maxsize=1)
def catalog() -> Mapping[str, Entry]:
    """Read the catalog: hub id -> entry."""
    return msgspec.json.decode((DATA / "configs.json").read_bytes(), type=dict[str, Entry])


def hub_id(name: str) -> str:
    """Turn a short name ("qwen2.5-7b-instruct") or a hub id, in any case, into the hub id.

    Raises:
        UsageError: the catalog has no such model.
    """
    known = {}
    for full in catalog():
        known[full.casefold()] = known[full.casefold().rpartition("/")[2]] = full
    if name.casefold() in known:
        return known[name.casefold()]
    raise UsageError(f"no model {name!r} in the catalog: {did_you_mean(name, known)}")


def named(name: str) -> Skeleton:
    """Return the skeleton of a model of the catalog, by short name or hub id.

    Raises:
        UsageError: the catalog has no such model.
    """
    full = hub_id(name)
    found = shipped(catalog()[full].config)
    if found is None:
        raise UsageError(f"the skeleton of {full} is not shipped: run python -m harness.worker.skeleton --catalog")
    return found


def shipped(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton that is shipped for this config, if any. Reads one line, decodes nothing else."""
    lines = (DATA / "skeletons.jsonl").read_bytes()
    start = lines.find(b'["%s",' % fingerprint(config).encode())
    if start < 0:
        return None
    line = lines[start : lines.index(b"\n", start)]
    return msgspec.json.decode(line, type=tuple[str, Skeleton])[1]


def build(config: Mapping[str, Any], cache: Path) -> Skeleton:
    """Return the skeleton of any config: shipped, from `cache`, or built by a worker (seconds) and put there.

    Raises:
        UsageError: transformers knows no such architecture, or cannot build it from this config.
    """
    found = shipped(config)
    if found is not None:
        return found
    kept = cache / f"skeleton-{version('transformers')}-{fingerprint(config)}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Skeleton)
    except (FileNotFoundError, msgspec.DecodeError):  # not built yet, or by a fitmatrix that wrote other fields
        text = _run_worker(config)
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(text)
    partial.replace(kept)
    return msgspec.json.decode(text, type=Skeleton)


def _run_worker(config: Mapping[str, Any]) -> bytes:
    command = [sys.executable, "-m", "harness.worker.skeleton"]
    what = f"no skeleton for model_type {config.get('model_type')!r}"
    text = json.dumps(config).encode()
    # `-m` looks in the current directory first: not the user's, which may hold anything, but the one this package lies in.
    home = DATA.parent.parent
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=BUILD_S, check=False, cwd=home)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{what}: transformers did not build it in {BUILD_S:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"{what}: {last.strip().removeprefix('ValueError: ')}")
    return done.stdout
