"""Skeletons: names, shapes and module tree of an architecture, no weights. Repeated blocks are stored once.

The truth is transformers on the meta device (`harness.worker.build_skeleton`). Skeletons of the catalog are shipped in
`data/skeletons.jsonl`, one line each under the fingerprint of its config; those of other models are built once by a worker
and kept in a cache directory. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from harness.architecture.key_mapping import Naming
from harness.catalog.shipped import catalog, hub_id
from harness.core.errors import UsageError
from harness.core.records import Record
from harness.data import DATA

BUILD_S = 120.0
UNKNOWN_TYPE = 3  # the exit status of the worker
_NUMBER = re.compile(r"\d+")
# What skeletons in the cache are called; another number when they hold more than those of an earlier version did.
_KEPT = "skeleton2"

# fmt: off
# What never changes a name, a shape or the KV cache: most configs of one architecture differ in these alone.
_SHAPELESS = frozenset((
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "dtype", "embd_pdrop",
    "eos_token_id", "gmask_token_id", "groupsize", "hidden_act", "hidden_activation", "hidden_dropout", "initializer_range",
    "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "mask_token_id", "output_router_logits", "pad_token_id",
    "pretraining_tp", "quantization_bit", "quantization_config", "resid_pdrop", "rms_norm_eps", "rope_local_base_freq",
    "rope_theta", "rotary_emb_base", "router_aux_loss_coef", "tokenizer_class", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache", "wbits",
))
# Where positions are computed, the context length has no tensor.
_ROTARY = frozenset((
    "deepseek_v2", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "internlm2", "internlm3", "llama",
    "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
))
# fmt: on
# What transformers reads of a GGUF's metadata beside the keys of its architecture. A name decides between Llama and Mistral.
_SHAPING = frozenset(("general.architecture", "general.name", "general.alignment", "tokenizer.ggml.tokens"))


class UnknownType(UsageError):
    """The transformers that is installed has no architecture of this model type."""


class ParameterSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
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

    `linear` is "linear" (exactly torch's Linear), "conv1d" (GPT-2's, transposed) or None; `exempt` marks one that quantizers leave
    alone, such as the output embedding.
    """

    class_name: str
    tensors: tuple[ParameterSpec, ...] = ()
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


class Weight(NamedTuple):
    """A tensor at its place. `quantizes`: bitsandbytes would hold it in fewer bits. `tied_to` names the weight that it shares."""

    path: str
    elements: int
    tensor: ParameterSpec
    quantizes: bool
    tied_to: str | None


class Module:
    """A block at its place, unfolded as far as it is looked into; `whole` means that a device map must not split it."""

    def __init__(self, path: str, block: Block, skeleton: Skeleton) -> None:
        self.path, self.block, self._skeleton = path, block, skeleton
        self.whole = block.class_name in skeleton.no_split

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Its own tensors."""
        quantizes = self.block.linear is not None and not self.block.exempt
        return tuple(self._weight(tensor, quantizes) for tensor in self.block.tensors)

    @cached_property
    def children(self) -> tuple[Module, ...]:
        """The modules inside it, numbered ones one by one."""
        blocks, prefix = self._skeleton.blocks, self._prefix
        return tuple(
            Module(f"{prefix}{name}", blocks[child.block], self._skeleton)
            for child in self.block.children
            for name in _numbered(child)
        )

    @cached_property
    def splits(self) -> bool:
        """Whether a device map may put its parts on different devices; it always looks into the root."""
        return bool(self.block.children) and not (self.whole and self.path)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The paths of the modules in it that are not split, or its own."""
        return tuple(end for child in self.children for end in child.ends) if self.splits else (self.path,)

    def walk(self) -> Iterator[Module]:
        """Visit this module and all inside it, parents first, in order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def alone(self, weight: Weight) -> Module:
        """Return the module as if it had one of its own tensors and nothing else, under the name of that tensor."""
        module = Module(weight.path, self.block, self._skeleton)
        module.weights, module.children, module.splits, module.whole = (weight,), (), False, False
        return module

    @property
    def _prefix(self) -> str:
        return f"{self.path}." if self.path else ""

    def _weight(self, tensor: ParameterSpec, quantizes: bool) -> Weight:
        path = f"{self._prefix}{tensor.name}"
        tied_to = self._skeleton.tied.get(path)
        return Weight(path, math.prod(tensor.shape), tensor, quantizes and tensor.name != "bias", tied_to)


class Piece(NamedTuple):
    """What no device map splits: a whole block, a module without children, a tensor beside children.

    `like` is the first piece of its kind: the same block in the same place but for the numbers in its path, and no weights tied.
    What is counted of that one holds for all.
    """

    path: str
    whole: bool
    like: Module


class Skeleton(Record, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """An architecture at one size. `blocks` end with the root. `layers` gives each layer's place in `attention`.

    `source` says where it comes from: "transformers 5.23.0", or "description" where transformers lacks the class. `naming` brings
    the names in files to these; None where that is not known.
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
    naming: Naming | None = None

    @cached_property
    def root(self) -> Module:
        """The module tree, every block in its place."""
        return Module("", self.blocks[-1], self)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All tensors by their names, parameters and buffers, in the order of the modules: slow, see `tally`."""
        return tuple(weight for module in self.root.walk() for weight in module.weights)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All that a device map places, in order. Blocks and tensors are compared by identity: repeated ones are one object."""
        first: dict[tuple[object, ...], Module] = {}
        ends = [f"{name}." for names in self.tied.items() for name in names]
        found = []
        for module in _pieces(self.root):
            tied = any(end.startswith(f"{module.path}.") for end in ends)
            alike = (_NUMBER.sub("", module.path), id(module.block), *(id(weight.tensor) for weight in module.weights))
            key = (module.path,) if tied else alike
            found.append(Piece(module.path, module.whole, first.setdefault(key, module)))
        return tuple(found)

    @cached_property
    def kinds(self) -> Mapping[Module, int]:
        """The first piece of each kind, and how many there are of it."""
        return Counter(piece.like for piece in self.pieces)

    @cached_property
    def tally(self) -> tuple[tuple[Weight, int], ...]:
        """Every tensor of the first piece of each kind, and how many there are like it."""
        return tuple((weight, count) for kind, count in self.kinds.items() for module in kind.walk() for weight in module.weights)

    @cached_property
    def frame(self) -> tuple[Module, ...]:
        """The modules around the pieces, parents first."""
        return tuple(_frame(self.root))

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(w.elements * count for w, count in self.tally if w.tensor.kind == "parameter" and w.tied_to is None)


def _pieces(module: Module) -> Iterator[Module]:
    if not module.splits:
        yield module
        return
    for weight in module.weights:
        yield module.alone(weight)
    for child in module.children:
        yield from _pieces(child)


def _frame(module: Module) -> Iterator[Module]:
    if module.splits:
        yield module
        for child in module.children:
            yield from _frame(child)


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
    if is_integer_chatglm2(config):
        ignored.remove("quantization_bit")
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def is_integer_chatglm2(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is that of ChatGLM2's or ChatGLM3's own integer files: its class is the one to say that it has none."""
    return bool(config.get("quantization_bit")) and "padded_vocab_size" in config


def _has_default_heads(config: Mapping[str, Any]) -> bool:
    """Tell whether a written head_dim says no more than its absence: transformers writes it into the configs that it saves."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("model_type") not in ("llama", "mistral") or not isinstance(hidden, int) or not isinstance(heads, int):
        return False
    return heads > 0 and config.get("head_dim") == hidden // heads


def named(name: str) -> Skeleton:
    """Return the skeleton of a model of the catalog, by short name or hub id.

    Raises:
        UsageError: the catalog has no such model.
    """
    full = hub_id(name)
    found = shipped(catalog()[full].config)
    if found is None:
        raise UsageError(f"the skeleton of {full} is not shipped: run python -m harness.worker.build_skeleton --catalog")
    return found


def shipped(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton that is shipped for this config, if any. Reads one line, decodes nothing else."""
    lines = (DATA / "skeletons.jsonl").read_bytes()
    start = lines.find(b'["%s",' % fingerprint(config).encode())
    if start < 0:
        return None
    line = lines[start : lines.index(b"\n", start)]
    return msgspec.json.decode(line, type=tuple[str, Skeleton])[1]


def at_hand(config: Mapping[str, Any], cache: Path) -> Skeleton | None:
    """Return the skeleton of a config where it takes no time: shipped, or built before and put into `cache`."""
    from importlib.metadata import PackageNotFoundError

    try:
        return shipped(config) or _kept(cache / f"{_name(config)}.json")
    except PackageNotFoundError:  # without transformers
        return None


def build(config: Mapping[str, Any], cache: Path) -> Skeleton:
    """Return the skeleton of any config: shipped, from `cache`, or built by a worker (seconds) and put there.

    Raises:
        UsageError: transformers knows no such architecture (UnknownType), or cannot build it from this config.
    """
    found = shipped(config)
    if found is not None:
        return found
    return _cached(_name(config), cache, config, f"model_type {config.get('model_type')!r}")


def build_gguf(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]], cache: Path) -> Skeleton:
    """Return the skeleton of a GGUF file from its header: metadata, and tensors as (name, shape, dtype).

    transformers makes a config of the metadata and a model of the config, in a worker; kept in `cache` as `build` does.

    Raises:
        UsageError: transformers does not load GGUF of this architecture or with these block types.
    """
    said = {key: value for key, value in metadata.items() if not key.startswith(("general.", "tokenizer.")) or key in _SHAPING}
    header = {"metadata": said, "tensors": tensors}
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{_KEPT}-{_version()}-gguf-{key}"
    return _cached(name, cache, {"gguf": header}, f"GGUF of {metadata.get('general.architecture')!r}")


def _name(config: Mapping[str, Any]) -> str:
    return f"{_KEPT}-{_version()}-{fingerprint(config)}"


def _version() -> str:
    from importlib.metadata import version  # slow to import

    return version("transformers")


def _cached(name: str, cache: Path, asked: Mapping[str, Any], what: str) -> Skeleton:
    """Return what is kept under `name`, else what a worker answers, which is put there."""
    kept = cache / f"{name}.json"
    found = _kept(kept)
    if found is not None:
        return found
    text = _run_worker(asked, what)
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(text)
    partial.replace(kept)
    return msgspec.json.decode(text, type=Skeleton)


def _kept(path: Path) -> Skeleton | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Skeleton)
    except (FileNotFoundError, msgspec.DecodeError):  # not built yet, or by a fitmatrix that wrote other fields
        return None


def _run_worker(asked: Mapping[str, Any], model: str) -> bytes:
    from harness.machine.scratch import Scratch  # tempfile is slow to import

    command = [sys.executable, "-m", "harness.worker.build_skeleton"]
    what = f"no skeleton for {model}"
    text = json.dumps(asked).encode()
    # `-m` looks in the current directory first: not the user's, which may hold anything, but the one this package lies in.
    home = DATA.parent.parent
    try:
        with Scratch() as scratch:  # importing torch makes a folder for temporary files
            settings = {**os.environ, "TMPDIR": str(scratch)}
            done = subprocess.run(command, input=text, capture_output=True, timeout=BUILD_S, check=False, cwd=home, env=settings)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{what}: transformers did not build it in {BUILD_S:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        kind = UnknownType if done.returncode == UNKNOWN_TYPE else UsageError
        raise kind(f"{what}: {last.strip().removeprefix('ValueError: ')}")
    return done.stdout


def is_stacked(weight: Weight) -> bool:
    """Say whether a tensor holds the weights of all experts of a layer, as transformers 5 stacks them."""
    return len(weight.tensor.shape) == 3 and "experts" in weight.path
