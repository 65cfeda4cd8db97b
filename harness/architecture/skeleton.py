"""Skeletons: names, shapes and module tree of an architecture, no weights. Repeated blocks are stored once."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from harness.architecture.key_mapping import Naming
from harness.core.records import Record

if TYPE_CHECKING:
    from harness.checkpoint.quantization import Packed

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)(\.weight)?$")
_NUMBER = re.compile(r"\d+")
# How transformers calls what sees or hears, and what brings that to the text; held against its classes by a test.
_OTHER_SENSES = re.compile(r"vision|visual|image|vqmodel|audio|multi_modal_projector|mm_projector|connector")


class ParameterSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of a block."""

    name: str
    shape: tuple[int, ...]
    kind: str = "parameter"  #: parameter, buffer (saved) or unsaved (a buffer that is in no file)
    dtype: str | None = None  #: if the model fixes it, whatever it is loaded as
    fp32: str | None = None  #: when loading keeps it in float32: "fp16", or "half" for bfloat16 as well


class Child(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A place for a block in its parent; with `count` the name is the first of as many consecutive numbers."""

    name: str
    block: int
    count: int = 1


class Block(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A module with its own tensors and children, in order."""

    class_name: str
    tensors: tuple[ParameterSpec, ...] = ()
    children: tuple[Child, ...] = ()
    linear: str | None = None  #: "linear" (exactly torch's Linear), "conv1d" (GPT-2's, transposed) or None
    exempt: bool = False  #: whether quantizers leave it alone, as the output embedding


class Attention(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What a layer keeps of a sequence: `heads` x (`key_dim` + `value_dim`) elements per token."""

    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None  #: the most tokens that it keeps
    state: int = 0  #: elements kept once (linear attention), as wide as the model's
    float32_state: int = 0  #: the same in float32, whatever the model's dtype
    #: Multi-head latent attention caches its latent: the width per token of the keys and values computed from it.
    expanded: int | None = None

    @property
    def per_token(self) -> int:
        """Elements of the KV cache per token."""
        return self.heads * (self.key_dim + self.value_dim)

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps something once, however long the sequence is."""
        return bool(self.state or self.float32_state)


class Weight(NamedTuple):
    """A tensor at its place. `quantizes`: bitsandbytes would quantize it. `tied_to` names the weight that it shares."""

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

    @cached_property
    def inside(self) -> tuple[Module, ...]:
        """This module and all inside it as `walk` visits them: of a piece, which many sums go through."""
        return tuple(self.walk())

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
    What is counted of that one is true of all.
    """

    path: str
    whole: bool
    like: Module


class Skeleton(Record, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """An architecture at one size. `blocks` end with the root. `layers` gives each layer's place in `attention`.

    `source` says where it comes from: "transformers 5.23.0", or "description" where transformers lacks the class. `naming` brings
    the names in files to these; None if that is not known.
    """

    model_class: str
    model_type: str
    auto_class: str = "AutoModelForCausalLM"  #: the class of transformers that loads it
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
    eager: bool = False  #: its class has no SDPA: attention is computed step by step, with all scores in memory
    naming: Naming | None = None

    def __hash__(self) -> int:
        """Hash what differs from model to model; all else is compared."""
        return hash((self.model_class, self.layers, self.hidden_size, self.intermediate_size, self.vocab_size))

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
        return tuple((weight, count) for kind, count in self.kinds.items() for module in kind.inside for weight in module.weights)

    @cached_property
    def frame(self) -> tuple[Module, ...]:
        """The modules around the pieces, parents first."""
        return tuple(_frame(self.root))

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(w.elements * count for w, count in self.tally if w.tensor.kind == "parameter" and w.tied_to is None)

    def looks_up_positions(self, context: int) -> bool:
        """Say whether positions are rows of a table that ends with its context, which some begin with two rows for padding."""
        tables = (weight for weight, _ in self.tally if _POSITIONS.search(weight.path) and len(weight.tensor.shape) == 2)
        return any(context <= weight.tensor.shape[0] <= context + 2 for weight in tables)


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


def reads_text(name: str) -> bool:
    """Say whether a module or tensor of this name is on the way of every token, and not of images or sounds alone."""
    return _OTHER_SENSES.search(name) is None


def is_stacked(weight: Weight) -> bool:
    """Say whether a tensor holds the weights of all experts of a layer, as transformers 5 stacks them."""
    return len(weight.tensor.shape) == 3 and "experts" in weight.path


def packed_model_bytes(shape: Skeleton, packed: Packed) -> int:
    """Count a checkpoint that is quantized already: what is packed with all that stands beside it, the rest in 16 bits."""
    saved = [(weight, count) for weight, count in shape.tally if not weight.tied_to and weight.tensor.kind != "unsaved"]
    return sum(count * packed_weight_bytes(weight, packed) for weight, count in saved)


def packed_weight_bytes(weight: Weight, packed: Packed) -> int:
    """Count one weight; what is packed into a layout that is not known takes its bits, and 8 for the scale of each 32."""
    sides, method = weight.tensor.shape, packed.method
    if is_stacked(weight) and method is not None and method.packs_experts:
        return weight.elements * packed.bits // 8 + (weight.elements // 32 if packed.bits < 8 else 0)
    if not weight.quantizes or len(sides) != 2 or (method is not None and not method.packs_linears):
        return weight.elements * 2
    if packed.layout is None or not packed.layout.parts:
        return weight.elements * packed.bits // 8
    return packed.layout.stored_bytes(sides, packed.bits, packed.group)
