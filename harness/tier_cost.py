"""The terms of a case, tier by tier: what lies on a GPU, what in the RAM, what the process itself takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from functools import cached_property

from harness import memory_cost
from harness.blueprint import Blueprint
from harness.calibration import Bytes, Calibration
from harness.case import Record, Workload
from harness.devicemap import DTYPE_BYTES
from harness.memory_cost import Kept
from harness.skeleton import Module, Skeleton, Weight

# Formats whose tensors transformers maps into memory instead of reading them.
MAPPED = ("safetensors", "bin")


class Parts(Record, frozen=True, kw_only=True):
    """The terms of one tier.

    Of the weights in the RAM `copied` are anonymous; `mapped` are pages of the file that stay resident and `read` those that every
    token reads. `overhead` and `heap` are anonymous, `libraries` pages of files. `loading` is needed only while loading, as is the
    part of the file that is read then, `loading_mapped`.
    """

    weights: int = 0
    copied: int = 0
    mapped: int = 0
    read: int = 0
    kv: int = 0
    activation: Bytes = Bytes()
    overhead: Bytes = Bytes()
    heap: Bytes = Bytes()
    libraries: Bytes = Bytes()
    loading: Bytes = Bytes()
    loading_mapped: int = 0


class Count:
    """One case, counted: a model held in one way, laid out over tiers, and asked for one workload."""

    def __init__(
        self,
        blueprint: Blueprint,
        held: Kept,
        tiers: dict[str, str],
        load: Workload,
        calibration: Calibration,
        through_ram: bool = False,
    ) -> None:
        self.through_ram = through_ram
        self.blueprint, self.held, self.tiers, self.work, self.calibration = blueprint, held, tiers, load, calibration
        self.skeleton: Skeleton = blueprint.skeleton
        self.sizes = memory_cost.weight_bytes(self.skeleton, held)
        self.per_token = memory_cost.read_per_token(self.skeleton, self.sizes)
        self.gpus = sorted({tier for tier in tiers.values() if tier.startswith("gpu")})

    def longer(self, load: Workload) -> Count:
        """Return the same case with another workload; what does not depend on it is not counted again."""
        other = copy(self)
        other.work = load
        other.__dict__.pop("kv", None)
        return other

    @property
    def main(self) -> str:
        """The device that computes what lies on no GPU."""
        return self.gpus[0] if self.gpus else "cpu"

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights by tier."""
        total: dict[str, int] = defaultdict(int)
        for path, size in self.sizes.items():
            total[self.tiers[path]] += size
        return {tier: size for tier, size in total.items() if size}

    @cached_property
    def read(self) -> dict[str, float]:
        """Bytes that one token reads, by tier."""
        total: dict[str, float] = defaultdict(float)
        for path, size in self.per_token.items():
            total[self.tiers[path]] += size
        return {tier: size for tier, size in total.items() if size}

    @cached_property
    def kv(self) -> dict[str, int]:
        """KV cache at the end of the workload, by the device that its layer runs on."""
        tokens = self.work.prompt_tokens + self.work.new_tokens - 1  # the last token is never fed back
        layers = memory_cost.kv_bytes(self.skeleton, tokens, self.work.batch, self.held.element_bytes)
        total: dict[str, int] = defaultdict(int)
        for size, tier in zip(layers, self._layer_tiers(len(layers)), strict=True):
            total[tier if tier.startswith("gpu") else self.main] += size
        return dict(total)

    def _layer_tiers(self, count: int) -> list[str]:
        """Return the tier of each layer: of the first tensor of each block that is not split."""
        blocks = [self.tiers[path] for path in _first_tensors(self.skeleton.root)]
        return [blocks[index * len(blocks) // count] if blocks else self.main for index in range(count)]

    def parts(self) -> dict[str, Parts]:
        """Return the terms of every tier that takes part; the RAM always does."""
        found = {name: self._on_gpu(name) for name in self.gpus}
        found["cpu"] = self._in_ram()
        if "disk" in self.weights:
            found["disk"] = Parts(weights=self.weights["disk"])
        return found

    def _on_gpu(self, name: str) -> Parts:
        constant, kv = self.calibration, self.kv.get(name, 0)
        runs = memory_cost.activation_bytes(self.skeleton, self.work, self.held, "gpu")
        fixed = memory_cost.logits_bytes(self.skeleton, self.work, self.held.element_bytes)
        brought = self._brought() if name == self.main else 0
        activation = constant["gpu_activation_share"].amount(runs) + _exact(brought)
        process = constant["gpu_context_bytes"].amount() + constant["gpu_workspace_bytes"].amount()
        return Parts(
            weights=self.weights.get(name, 0),
            kv=kv,
            activation=activation,
            overhead=process + constant["gpu_fragmentation_share"].amount(kv + runs + fixed),
            loading=self._in_flight(),
        )

    def _brought(self) -> int:
        """Return what accelerate copies to the GPU at once of what lies elsewhere: one module's tensors."""
        away = {path: 0 if self.tiers[path].startswith("gpu") else size for path, size in self.sizes.items()}
        return memory_cost.largest_module(self.skeleton, away)

    def _in_flight(self) -> Bytes:
        """Return what lies on the GPU only while loading: 16-bit copies of what is quantised there. Casts are made in the RAM."""
        copies = max((w.elements * 2 for w in self.skeleton.weights if w.quantises), default=0) if self.held.quantizer else 0
        largest = max(self.sizes.values(), default=0)
        return Bytes(best=2.0 * copies, high=max(4.0 * copies, largest))

    def _changes(self, weight: Weight) -> bool:
        """Say whether loading makes something else of a stored tensor than a view of the file."""
        quantised = self.held.quantizer is not None and weight.quantises
        other = self.held.dtype != self.blueprint.stored_dtype or weight.tensor.fp32 is not None
        return quantised or other or self.blueprint.file_format not in MAPPED

    def _in_ram(self) -> Parts:
        here = [weight for weight in self.skeleton.weights if self.tiers[weight.path] == "cpu"]
        copied = sum(self.sizes[weight.path] for weight in here if self._changes(weight))
        views = [weight for weight in here if not self._changes(weight) and weight.tensor.kind != "unsaved"]
        read = int(sum(self.per_token.get(weight.path, 0) for weight in views))
        runs = 0 if self.gpus else memory_cost.activation_bytes(self.skeleton, self.work, self.held, "cpu")
        return Parts(
            weights=self.weights.get("cpu", 0),
            copied=copied,
            # Tensors that stay views keep the whole file mapped, and with it the pages that were read to make the others.
            mapped=read + self._copied_from() if views else 0,
            read=read,
            kv=self.kv.get("cpu", 0),
            activation=self.calibration["cpu_activation_share"].amount(runs),
            overhead=self._process(),
            heap=self._heap(here),
            libraries=self._libraries(),
            loading=_exact(sum(self.sizes[w.path] for w in self.skeleton.weights if self._changes(w)) if self.through_ram else 0),
            loading_mapped=self._copied_from(),
        )

    def _copied_from(self) -> int:
        """Return the bytes of the file that are read to make something else of them, in the RAM or on a GPU."""
        if self.held.packed_bits is not None:
            return self.blueprint.checkpoint_bytes if self.gpus else 0
        width = DTYPE_BYTES.get(self.blueprint.stored_dtype, 2)
        made = (w for w in self.skeleton.weights if self._changes(w) or self.tiers[w.path].startswith("gpu"))
        return sum(weight.elements * width for weight in made if not weight.tied_to and weight.tensor.kind != "unsaved")

    def _process(self) -> Bytes:
        constant = self.calibration
        total = constant["ram_import_anon_bytes"].amount()
        if self.held.quantizer:
            total += constant["ram_bitsandbytes_bytes"].amount()
        if self.blueprint.tokenizer:
            total += constant["ram_tokenizer_bytes_per_token"].amount(self.skeleton.vocab_size)
        return total + constant["ram_cuda_bytes"].amount() if self.gpus else total

    def _libraries(self) -> Bytes:
        total = self.calibration["ram_import_file_bytes"].amount()
        return total + self.calibration["ram_cuda_file_bytes"].amount() if self.gpus else total

    def _heap(self, here: Iterable[Weight]) -> Bytes:
        """Return what the heap keeps of the 16-bit copies that quantising on the processor makes and frees again."""
        if not self.held.quantizer or self.gpus:
            return Bytes()
        copies = sum(weight.elements * 2 for weight in here if weight.quantises)
        share, most = (self.calibration[f"heap_{what}_{self.held.quantizer}"] for what in ("share", "most_bytes"))
        return Bytes(
            low=min(share.low * copies, most.low),
            best=min(share.best * copies, most.best),
            high=min(share.high * copies, most.high),
        )


def _exact(size: float) -> Bytes:
    return Bytes(low=size, best=size, high=size)


def _first_tensors(module: Module) -> list[str]:
    """Return the path of one tensor of each block that a device map keeps whole, in order."""
    if module.whole:
        return next(([weight.path] for part in module.walk() for weight in part.weights), [])
    return [path for child in module.children for path in _first_tensors(child)]
