"""The tensors of a model in one weight format, counted once for each kind of piece; every placement sums them by tier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
from msgspec.structs import asdict

from harness.architecture import skeleton
from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Block, Module, Weight
from harness.core.dtypes import DTYPE_BYTES
from harness.core.methods.table import settings_of
from harness.core.quantizers import SCHEMES
from harness.planning.cost import kernel_launches, memory, tensor_parallel
from harness.planning.cost.activations import Activations, with_attention
from harness.planning.cost.gpu_activations import GpuActivations
from harness.planning.cost.kernel_launches import Operations
from harness.planning.cost.memory import WeightFormat
from harness.planning.loading.order import LoadStep, PieceRun, conversion_of, copies, load_order, runs_of, unpacked_mxfp4

# Formats whose tensors transformers maps into memory instead of reading them.
MAPPED = ("safetensors", "bin")
# glibc's largest threshold (M_MMAP_THRESHOLD, 32 MiB): what is larger is given back as soon as it is freed.
HEAP_LIMIT = 32 << 20


def is_expert(path: str) -> bool:
    """Say whether a tensor is one of routed experts, by the module that holds them; not of those that every token passes."""
    return ".experts." in f".{path}"


class TensorTotals(msgspec.Struct):
    """Bytes of tensors, summed."""

    held: float = 0  #: in memory
    read: float = 0  #: by one token
    made: float = 0  #: copies made while loading
    viewed: float = 0  #: views of the file, whose pages stay mapped
    viewed_used: float = 0  #: of these, what some token reads in full
    stored: float = 0  #: in the file
    made_from: float = 0  #: in the file, of what is copied
    quantized: float = 0  #: in 16 bits, of what is quantized while loading
    kept_copies: float = 0  #: of these 16-bit copies, what the heap may keep
    stacked: float = 0  #: what the heap may keep of the parts that are stacked
    joined: float = 0  #: of `held`, what is made by stacking
    twice: float = 0  #: tied weights that the files store again, until transformers 5 finds both equal and ties them
    compared: float = 0  #: read from the file for that comparison, if both are views of it
    passed_by: float = 0  #: of `held`, what no token reads of a tensor that it does: experts not chosen, rows not looked up
    tensors: float = 0  #: how many

    def add(self, other: TensorTotals) -> None:
        """Add another sum to this one, field by field; a loop over their names takes three times as long."""
        self.held += other.held
        self.read += other.read
        self.made += other.made
        self.viewed += other.viewed
        self.viewed_used += other.viewed_used
        self.stored += other.stored
        self.made_from += other.made_from
        self.quantized += other.quantized
        self.kept_copies += other.kept_copies
        self.stacked += other.stacked
        self.joined += other.joined
        self.twice += other.twice
        self.compared += other.compared
        self.passed_by += other.passed_by
        self.tensors += other.tensors

    def times(self, factor: float) -> TensorTotals:
        """Return every field multiplied by `factor`."""
        return TensorTotals(**{name: value * factor for name, value in asdict(self).items()})


class Inventory:
    """The tensors of a model in one weight format.

    `sizes` and `per_token` go by the path of each tensor in the first piece of its kind; `rows` are all pieces in order, each with
    the sum of its tensors.
    """

    def __init__(self, spec: ModelSpec, fmt: WeightFormat) -> None:
        self.spec, self.fmt, self.skeleton = spec, fmt, spec.skeleton
        self.sizes = {path: size for kind in self.skeleton.kinds for path, size in memory.module_bytes(kind, fmt).items()}
        self.per_token = memory.read_per_token(self.skeleton, self.sizes)
        self.stored_dtype = spec.stored_dtype
        # Bytes of the file for each weight: what is packed may hold several in a byte.
        packed = spec.checkpoint_bytes / max(1, self.skeleton.parameters)
        self.stored_width = packed if spec.stored_as else DTYPE_BYTES.get(self.stored_dtype, 2)
        of_kind = {kind: self._sum(kind) for kind in self.skeleton.kinds}
        self.rows = _with_adapter([(piece.path, of_kind[piece.like]) for piece in self.skeleton.pieces], spec, fmt)
        holding = {kind for kind in self.skeleton.kinds if any(module.weights for module in kind.inside)}
        self.layers = [piece.path for piece in self.skeleton.pieces if piece.whole and piece.like in holding]
        self.paths = [path for path, _ in self.rows]
        self._by_tiers: dict[tuple[str, ...], dict[str, TensorTotals]] = {}
        self._on_gpu: dict[tuple[str | None, str | None], GpuActivations] = {}
        self._on_cpu: dict[str | None, Activations] = {}
        self.experts_of_kinds: dict[Module, tuple[TensorTotals, TensorTotals]] = {}
        self.tensors = sum(count for weight, count in self.skeleton.tally if weight.tensor.kind != "unsaved")

    def on_gpu(self, capability: str | None, attention: str | None = None) -> GpuActivations:
        """Return what generating allocates on a GPU of this compute capability, in bytes beside weights and KV cache."""
        key = (capability, attention)
        if key not in self._on_gpu:
            self._on_gpu[key] = GpuActivations(self.spec, self.fmt, capability, attention)
        return self._on_gpu[key]

    def on_cpu(self, attention: str | None = None) -> Activations:
        """Return what generating allocates in RAM, in bytes beside weights and KV cache."""
        if attention not in self._on_cpu:
            self._on_cpu[attention] = Activations(with_attention(self.skeleton, attention), self.fmt, "cpu")
        return self._on_cpu[attention]

    @cached_property
    def total(self) -> TensorTotals:
        """All rows together."""
        total = TensorTotals()
        for _, sums in self.rows:
            total.add(sums)
        return total

    @cached_property
    def operations(self) -> Operations:
        """What one token starts."""
        return kernel_launches.count(self.skeleton, len(self.spec.adapter.modules) if self.spec.adapter else 0)

    @cached_property
    def parameters(self) -> int:
        """How many weights a token is multiplied with."""
        found = 0.0
        for weight, count in self.skeleton.tally:
            size = self.sizes[weight.path]
            found += count * weight.elements * self.per_token.get(weight.path, 0.0) / size if size else 0.0
        return int(found)

    @cached_property
    def quantizable(self) -> int:
        """How many weights a quantizer takes: those that are unpacked for every pass where they are unpacked at all."""
        return sum(count * weight.elements for weight, count in self.skeleton.tally if weight.quantizes)

    @cached_property
    def load_runs(self) -> list[PieceRun]:
        """What loading onto a GPU makes, in its order; nothing if it never holds more than what stays."""
        unpacked = _unpacked(self)
        passing = {
            weight.path: max(self._passing(weight, inside.block), unpacked.get(weight.path, _NOT_UNPACKED).passing)
            for kind in self.skeleton.kinds
            for inside in kind.inside
            for weight in inside.weights
        }
        if not any(passing.values()):
            return []
        grows = {path: one.grows for path, one in unpacked.items()}
        steps = {path: LoadStep(self.sizes[path], most, grows.get(path, 0.0)) for path, most in passing.items()}
        return runs_of(load_order(self.skeleton, as_held=self.spec.as_held), steps)

    def _passing(self, weight: Weight, owner: Block) -> float:
        """Return what is on a GPU beside a tensor while it is made: the parts of a stack, what a quantizer takes."""
        if weight.tied_to or weight.tensor.kind == "unsaved":
            return 0.0
        held, plain, most = self.sizes[weight.path], weight.elements * self.fmt.element_bytes, 0.0
        if self.fmt.packed_bits is None and self._stacks(weight):
            most = 2 * plain - held
        if self.fmt.quantizer is not None and memory.narrows(weight, self.fmt.quantizer, owner):
            scheme = SCHEMES[self.fmt.quantizer]
            taken = scheme.in_flight + (scheme.turned if owner.linear == "conv1d" else 0.0)
            inputs = weight.tensor.shape[-1]
            filled = weight.elements / inputs * -(-inputs // scheme.padded) * scheme.padded
            most = max(most, 2 * filled * taken if held < plain else 0.0)  # what is left as it is costs nothing
        method = self.spec.packed.method if self.spec.packed else None
        if method is not None and method.stacks_pass and self.fmt.packed_bits is None and skeleton.is_stacked(weight):
            most = unpacked_mxfp4(weight.elements)
        return most

    @cached_property
    def at_once(self) -> dict[str, int]:
        """By the path of each piece the bytes of its largest module's own tensors; those beside modules count at their first."""
        sizes, kinds = self.sizes, self.skeleton.kinds
        most = {kind: max(sum(sizes[weight.path] for weight in module.weights) for module in kind.inside) for kind in kinds}
        found = {piece.path: most[piece.like] for piece in self.skeleton.pieces}
        for beside in (module.weights for module in self.skeleton.frame if module.weights):
            found[beside[0].path] = sum(found[weight.path] for weight in beside)
        return found

    def by_tier(self, tiers: Mapping[str, str] | str) -> dict[str, TensorTotals]:
        """Add the rows up by the tier of each piece, or take all for one tier."""
        if isinstance(tiers, str):
            return {tiers: self.total}
        key = tuple([tiers[path] for path in self.paths])
        if key not in self._by_tiers:  # several calls end up with the same map, and every KV cache asks for it
            found: dict[str, TensorTotals] = defaultdict(TensorTotals)
            for tier, (_, sums) in zip(key, self.rows, strict=True):
                found[tier].add(sums)
            self._by_tiers[key] = dict(found)
        return dict(self._by_tiers[key])

    def cut(self, count: int) -> TensorTotals:
        """Return the share of the model on each of `count` GPUs under tensor parallelism."""
        total = TensorTotals()
        for weight, times in self.skeleton.tally:
            total.add(self._sums(weight).times(times / count if tensor_parallel.is_cut(weight, self.skeleton) else times))
        return total

    def cut_in_ram(self, count: int) -> TensorTotals:
        """Return what `count` processes keep in RAM together under tensor parallelism; parts cut along rows are copies."""
        total = TensorTotals()
        for weight, times in self.skeleton.tally:
            sums = self._sums(weight, copied=tensor_parallel.is_copied(weight, self.skeleton))
            total.add(sums.times(times if tensor_parallel.is_cut(weight, self.skeleton) else times * count))
        return total

    def _sum(self, kind: Module) -> TensorTotals:
        total = TensorTotals()
        for module in kind.inside:
            for weight in module.weights:
                total.add(self._sums(weight))
        return total

    def _sums(self, weight: Weight, copied: bool = False) -> TensorTotals:
        if weight.tied_to:
            return self._repeated(weight)
        size, read = self.sizes[weight.path], self.per_token.get(weight.path, 0.0)
        makes = copied or self._makes(weight)
        in_file = weight.tensor.kind != "unsaved"
        stored = int(weight.elements * self.stored_width) if in_file and self.fmt.packed_bits is None else size
        copies = weight.elements * 2 if memory.is_taken(weight, self.fmt.quantizer) else 0  # in 16 bits, to be quantized
        view = not makes and weight.tensor.kind != "unsaved"
        return TensorTotals(
            held=size,
            read=read,
            made=size if makes else 0,
            viewed=size if view else 0,
            viewed_used=size if view and weight.path in self.per_token else 0,
            stored=stored if in_file else 0,
            made_from=stored if in_file and makes else 0,
            quantized=copies,
            stacked=self._parts_kept(weight, size),
            joined=size if self._stacks(weight) else 0,
            kept_copies=copies if weight.elements * 4 < HEAP_LIMIT else 0,
            passed_by=size - read if skeleton.is_stacked(weight) or weight.path not in self.per_token else 0,
            tensors=1,
        )

    def _repeated(self, weight: Weight) -> TensorTotals:
        """Count a tied weight: nothing, unless the files store it again. As a head it is never quantized."""
        if weight.path not in self.spec.repeated:
            return TensorTotals()
        stored = int(weight.elements * self.stored_width)
        makes = self._casts(weight) or self.spec.file_format not in MAPPED
        twice = weight.elements * self.fmt.element_bytes
        return TensorTotals(stored=stored, made_from=stored if makes else 0, twice=twice, compared=0 if makes else stored)

    def _makes(self, weight: Weight) -> bool:
        """Say whether loading makes something else of a stored tensor than a view of the file: other bits, or a stack."""
        if memory.is_taken(weight, self.fmt.quantizer):
            return True
        return self._casts(weight) or self._stacks(weight) or self.spec.file_format not in MAPPED

    def _casts(self, weight: Weight) -> bool:
        other = self.fmt.dtype != self.stored_dtype or weight.tensor.fp32 is not None
        return other and self.fmt.packed_bits is None

    def _stacks(self, weight: Weight) -> bool:
        """Say whether transformers makes a tensor of what files hold part by part, which its naming tells where it is known."""
        if self.spec.as_held:
            return False
        naming = self.skeleton.naming
        return copies(conversion_of(weight.path, naming)) if naming is not None else skeleton.is_stacked(weight)

    def _parts_kept(self, weight: Weight, size: int) -> float:
        """Return what the heap may keep of the experts that a stack is made from: their casts, else what joining two takes.

        Several threads cast ahead of what stacks, except when weights are quantized.
        """
        if not self._stacks(weight) or size / weight.tensor.shape[0] >= HEAP_LIMIT:
            return 0.0
        return size if self._casts(weight) and self.fmt.quantizer is None else size / 3


class _Unpacked(NamedTuple):
    """What a weight takes that is unpacked on loading: the bytes that it grows by, and at most at once beside it."""

    grows: float
    passing: float


_NOT_UNPACKED = _Unpacked(0.0, 0.0)


def _unpacked(inventory: Inventory) -> dict[str, _Unpacked]:
    """Return what unpacking takes by the path of each weight; nothing where it was not traced."""
    packed = inventory.spec.packed
    if packed is None or inventory.fmt.packed_bits is not None or packed.layout is None:
        return {}
    if (passing := packed.layout.unpacking.get(packed.bits)) is None:
        return {}
    return {
        weight.path: _Unpacked(inventory.sizes[weight.path] - weight.elements * packed.bits / 8, weight.elements * passing)
        for weight, _ in inventory.skeleton.tally
        if weight.quantizes and not weight.tied_to
    }


def turned_weights(inventory: Inventory) -> int:
    """Return how many weights lie in Conv1D: inputs by outputs, so that their products are not those of a Linear."""
    kinds = inventory.skeleton.kinds.items()
    turned = ((inside, count) for kind, count in kinds for inside in kind.inside if inside.block.linear == "conv1d")
    return sum(count * weight.elements for inside, count in turned for weight in inside.weights if weight.quantizes)


def experts_apart(inventory: Inventory, blocks: Collection[str]) -> tuple[TensorTotals, TensorTotals]:
    """Return the sums of the routed experts of some blocks, and before them of all else."""
    others, experts, kinds = TensorTotals(), TensorTotals(), inventory.experts_of_kinds
    for (path, sums), piece in zip(inventory.rows, inventory.skeleton.pieces, strict=True):
        if path in blocks:
            if piece.like not in kinds:
                kinds[piece.like] = _of_kind(inventory, piece.like)
            beside, routed = kinds[piece.like]
            others.add(beside)
            experts.add(routed)
        else:
            others.add(sums)
    return others, experts


def _of_kind(inventory: Inventory, kind: Module) -> tuple[TensorTotals, TensorTotals]:
    """Return the same sums of one piece of a kind."""
    others, experts = TensorTotals(), TensorTotals()
    for weight in (weight for module in kind.inside for weight in module.weights):
        (experts if is_expert(weight.path) else others).add(inventory._sums(weight))
    return others, experts


def _with_adapter(rows: Sequence[tuple[str, TensorTotals]], spec: ModelSpec, fmt: WeightFormat) -> list[tuple[str, TensorTotals]]:
    """Add the matrices of an adapter to the pieces that they lie in; a device map is inferred before they are there."""
    adapter = spec.adapter
    if adapter is None:
        return list(rows)
    dtype = _adapter_dtype(spec, fmt)
    places, found = {path: number for number, (path, _) in enumerate(rows)}, list(rows)
    for name, module in adapter.modules.items():
        path = name
        while path not in places:
            path = path.rpartition(".")[0]
        held, made = module.elements * DTYPE_BYTES[dtype], adapter.dtype != dtype
        stored = module.elements * DTYPE_BYTES.get(adapter.dtype, 2)
        sums = TensorTotals(held=held, read=held, stored=stored, viewed=0 if made else held, viewed_used=0 if made else held)
        sums.made, sums.made_from = (held, stored) if made else (0, 0)
        sums.add(found[places[path]][1])
        found[places[path]] = (found[places[path]][0], sums)
    return found


def _adapter_dtype(spec: ModelSpec, fmt: WeightFormat) -> str:
    """Return the dtype that peft gives the matrices of an adapter (0.21, `_get_base_layer_device_and_dtype`).

    That of the weights; of bitsandbytes' 4 bits that of their products, which the loading code says and a checkpoint may say;
    beside 8 bits they stay in float32.
    """
    if fmt.quantizer is not None:
        return fmt.dtype if SCHEMES[fmt.quantizer].counted < 1 else "float32"
    if fmt.packed_bits is None:
        return fmt.dtype
    settings = settings_of(spec.config) or {}
    return str(settings.get("bnb_4bit_compute_dtype") or "float32") if settings.get("load_in_4bit") else "float32"
