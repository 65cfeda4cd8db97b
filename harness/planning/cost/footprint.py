"""The terms of a case, tier by tier: what lies on a GPU, what in the RAM, what the process itself takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from harness.core.attention import KV_FORMS, KvForm
from harness.core.records import USUAL_KV, Record, Workload
from harness.planning.calibration import Bytes, Calibration
from harness.planning.cost import memory, tensor_parallel
from harness.planning.cost.activations import Activations
from harness.planning.cost.fragmentation import fragmentation
from harness.planning.cost.gpu_activations import GpuActivations
from harness.planning.cost.inventory import Inventory, TensorTotals, experts_apart
from harness.planning.cost.overhead import overhead_of
from harness.planning.loading import order

# The kernel maps a file by folios of up to 2 MiB, so a row that is read brings its neighbors.
PAGE_BYTES = 1 << 20


class TierTerms(Record, frozen=True, kw_only=True):
    """The terms of one tier, in bytes."""

    weights: int = 0
    written: int = 0  #: of weights on the disk, what loading writes there
    copied: int = 0  #: of weights in RAM, what is anonymous
    mapped: Bytes = Bytes()  #: of weights in RAM, pages of the file that stay resident
    read: int = 0  #: of these, what every token reads
    brought: int = 0  #: pages of weights on the disk, one module at a time
    kv: int = 0
    activation: Bytes = Bytes()
    overhead: Bytes = Bytes()  #: the process, anonymous; on a GPU its context
    fragments: Bytes = Bytes()  #: on a GPU what torch's allocator needs beyond what it has handed out while generating
    cached: Bytes = Bytes()  #: the same where there is room for what it would give back
    heap: Bytes = Bytes()  #: what the heap keeps of freed copies, anonymous
    libraries: Bytes = Bytes()  #: mapped pages of libraries
    loading: Bytes = Bytes()  #: needed only while loading
    loading_mapped: int = 0  #: pages of the file that are read only while loading
    rewritten: int = 0  #: of these, what is read last, to be written to the disk


class Loading(NamedTuple):
    """How a case is loaded, beside where its weights go."""

    through_ram: bool = False  #: everything is loaded into RAM first
    rewrites: bool = False  #: what goes to the disk is written there even if a file has it already
    off_gpu: Inventory | None = None  #: what lies off the GPUs, if its weight format is another
    begins_on: tuple[str, ...] = ()  #: GPUs that a library begins on to see what is free, weights or not
    processes: int = 1  #: how many share every layer (tensor parallelism), each on a GPU of its own or all in RAM
    experts_in_ram: tuple[str, ...] = ()  #: the blocks whose routed experts stay in RAM and are multiplied there
    expandable: bool = False  #: whether torch's allocator uses expandable segments
    attention: str | None = None  #: the implementation that is asked for
    capability: str | None = None  #: that of the oldest GPU, which decides on kernels; None if no GPU takes part


PLAIN_LOADING = Loading()
Tiers = tuple[str, ...] | str  # the tier of each piece in order, or the one tier of all
GROWING = KV_FORMS[USUAL_KV]


class Footprint:
    """One case, counted: a model in one weight format, laid out over tiers, and asked for one workload.

    `tiers` is the tier of each piece, or the one tier of all; `kv_form` is how the KV cache is kept.
    """

    def __init__(
        self,
        inventory: Inventory,
        tiers: Mapping[str, str] | str,
        workload: Workload,
        calibration: Calibration,
        loading: Loading = PLAIN_LOADING,
        kv_form: KvForm = GROWING,
    ) -> None:
        self.inventory, self.tiers, self.workload, self.calibration, self.loading = inventory, tiers, workload, calibration, loading
        self.kv_form = kv_form
        self.on_gpu: GpuActivations = inventory.on_gpu(loading.capability, loading.attention)
        self.fmt, self.skeleton, self.spec = inventory.fmt, inventory.skeleton, inventory.spec
        self.processes = loading.processes
        self.sums = self._sums_by_tier()
        self.weights = {tier: int(sums.held) for tier, sums in self.sums.items() if sums.held}
        # GPUs that share a layer read at the same time, so one of them stands for all.
        self.gpus = sorted(tier for tier in self.weights if tier.startswith("gpu"))
        sums = [*self.sums.items()][: 1 if self.processes > 1 else None]
        # To a GPU accelerate copies whole tensors: stacked experts, whichever of them a token chooses, and an embedding.
        whole = bool(self.gpus) and not loading.experts_in_ram
        read = {tier: one.read + (one.passed_by if whole and not tier.startswith("gpu") else 0.0) for tier, one in sums}
        self.read = {tier: size for tier, size in read.items() if size}
        # The device that computes what lies on no GPU.
        self.main = self.gpus[0] if self.gpus else "cpu"
        self.overhead = overhead_of(inventory, calibration, on_gpu=bool(self.gpus), processes=self.processes)
        self._copied_at_once: dict[tuple[str, ...], int] = {}
        self._passing: dict[str, Bytes] = {}
        self._terms: dict[str, TierTerms] = {}
        away = self.sums.get("disk") or TensorTotals()
        #: bytes that are made for each token of what transformers left in the checkpoint, which holds another dtype
        self.cast_each_token = 0.0 if self._writes_all or self.gpus else away.made - away.joined

    def _sums_by_tier(self) -> dict[str, TensorTotals]:
        inventory, tiers, count = self.inventory, self.tiers, self.processes
        if count > 1:
            return {"cpu": inventory.cut_in_ram(count)} if tiers == "cpu" else dict.fromkeys(_gpus(count), inventory.cut(count))
        if self.loading.experts_in_ram:
            assert isinstance(tiers, str)
            return dict(zip((tiers, "cpu"), experts_apart(inventory, self.loading.experts_in_ram), strict=True))
        sums = inventory.by_tier(tiers)
        if self.loading.off_gpu is not None:
            others = self.loading.off_gpu.by_tier(tiers)
            sums |= {tier: totals for tier, totals in others.items() if not tier.startswith("gpu")}
        return sums

    def with_workload(self, workload: Workload) -> Footprint:
        """Return the same case with another workload; what does not depend on it is not counted again."""
        other = _copy_without_terms(self, "kv")
        other.workload = workload
        return other

    @cached_property
    def with_expandable_segments(self) -> Footprint:
        """The same case with torch's expandable segments."""
        other = _copy_without_terms(self)
        other.loading = self.loading._replace(expandable=True)
        other._terms |= {name: terms for name, terms in self._terms.items() if name not in self.gpus}
        return other

    def with_calibration(self, calibration: Calibration) -> Footprint:
        """Return the same case by other constants; what does not depend on them is not counted again."""
        other = _copy_without_terms(self)
        other.calibration = calibration
        other.overhead = overhead_of(self.inventory, calibration, on_gpu=bool(self.gpus), processes=self.processes)
        return other

    @cached_property
    def kv(self) -> dict[str, int]:
        """KV cache at the end of the workload, by the device that its layer runs on.

        What is kept in RAM has on the GPU the layer that runs and the next one, which is brought meanwhile.
        """
        layers = memory.kept_kv_bytes(self.skeleton, self.workload, self.fmt.element_bytes, self.kv_form)
        if self.kv_form.in_ram and self.gpus:
            return {"cpu": sum(layers), **dict.fromkeys(self.gpus, 2 * max(layers, default=0))}
        if self.processes > 1:
            each = sum(layers) // (self.processes if tensor_parallel.cuts_cache(self.skeleton) else 1)
            return dict.fromkeys(self.gpus, each) if self.gpus else {"cpu": each * self.processes}
        if isinstance(self.tiers, str):
            return {self.main: sum(layers)}
        total: dict[str, int] = defaultdict(int)
        for size, tier in zip(layers, self._homes, strict=True):
            total[tier] += size
        return dict(total)

    @cached_property
    def _homes(self) -> list[str]:
        """Where each layer runs: on the tier of its block, or on the first GPU if that is none."""
        assert not isinstance(self.tiers, str)
        blocks, count = [self.tiers[path] for path in self.inventory.layers], len(self.skeleton.layers)
        homes = [blocks[index * len(blocks) // count] if blocks else self.main for index in range(count)]
        return [tier if tier.startswith("gpu") else self.main for tier in homes]

    def terms(self) -> dict[str, TierTerms]:
        """Return the terms of every tier that takes part; the RAM always does."""
        return {name: self.terms_of(name) for name in self.taking_part}

    @property
    def taking_part(self) -> list[str]:
        """The tiers that take part."""
        return [*dict.fromkeys((*self.gpus, *self.loading.begins_on)), "cpu", *(["disk"] if "disk" in self.weights else [])]

    def terms_of(self, name: str) -> TierTerms:
        """Return the terms of one of the tiers that take part."""
        if name in self._terms:
            return self._terms[name]
        if name == "cpu":
            found = self._in_ram()
        elif name == "disk":
            found = TierTerms(weights=self.weights["disk"], written=self.written)
        elif name in self.weights:
            found = self._on_gpu(name)
        else:
            found = TierTerms(overhead=self.calibration["gpu_context_bytes"].amount())
        self._terms[name] = found
        return found

    @property
    def written(self) -> int:
        """The bytes that loading writes into the offload folder.

        transformers 5 (`accelerate_disk_offload`) leaves in a safetensors file what it holds as it is needed, and writes the rest:
        all of other formats, and experts that are stacked while loading. accelerate's own dispatch writes everything.
        """
        if "disk" not in self.weights:
            return 0
        return self.weights["disk"] if self._writes_all else int(self.sums["disk"].joined)

    @property
    def _writes_all(self) -> bool:
        return self.loading.rewrites or self.spec.file_format != "safetensors"

    def _on_gpu(self, name: str) -> TierTerms:
        constant, kv = self.calibration, self.kv.get(name, 0)
        runs = _activations(self, self.on_gpu, name)
        brought = self._brought(("cpu", "disk")) if name == self.main else 0
        expandable = self.loading.expandable
        gaps = self.on_gpu.gaps(expandable=expandable)
        fragments, cached = fragmentation(gaps, constant, kv + runs, expandable=expandable)
        return TierTerms(
            weights=self.weights[name],
            kv=kv,
            activation=constant["gpu_activation_share"].amount(runs) + _exact(brought),
            overhead=self.overhead.context,
            fragments=fragments,
            cached=cached,
            loading=self._in_flight(name) + _exact(self.sums[name].twice),
        )

    def _brought(self, homes: tuple[str, ...]) -> int:
        """Return what accelerate copies at once of what lies in these tiers: one module's tensors."""
        if self.weights.keys().isdisjoint(homes):
            return 0
        if homes not in self._copied_at_once:
            tiers, at_once = self.tiers, (self.loading.off_gpu or self.inventory).at_once
            sizes = (size for path, size in at_once.items() if (tiers if isinstance(tiers, str) else tiers[path]) in homes)
            self._copied_at_once[homes] = max(sizes, default=0)
        return self._copied_at_once[homes]

    def _in_flight(self, name: str) -> Bytes:
        """Return what lies on the GPU only while loading; nothing of what is whole in the RAM before it comes."""
        if self.loading.through_ram:
            return Bytes()
        if name in self._passing:  # for another workload
            return self._passing[name]
        inventory, tiers = self.inventory, self.tiers
        pieces = None if isinstance(tiers, str) else [path for path, tier in tiers.items() if tier == name]
        if self.loading.experts_in_ram:  # beside them a block has nothing that is made of parts
            pieces = [piece.path for piece in self.skeleton.pieces if piece.path not in self.loading.experts_in_ram]
        one_by_one = self.fmt.quantizer is not None or "disk" in self.weights
        found = order.on_card(inventory.load_runs, pieces, one_by_one)
        share, compared = 1 / self.processes, self.sums[name].twice / self.fmt.element_bytes  # at the end, a bool each
        self._passing[name] = Bytes(**{end: max(getattr(found, end) * share, compared) for end in ("low", "best", "high")})
        return self._passing[name]

    def _in_ram(self) -> TierTerms:
        here, away = self.sums.get("cpu") or TensorTotals(), self.sums.get("disk") or TensorTotals()
        touched = here.viewed_used + min(here.viewed - here.viewed_used, _rows_touched(self.workload))
        again, dropped = here.compared, 0 if here.compared else here.twice
        # Weights on a GPU are read from the file as well, and those that are cast or written anew for the disk.
        rewritten = away.stored if self._writes_all else 0.0
        elsewhere = sum(self.sums[gpu].stored for gpu in self.gpus) + (rewritten or away.made_from)
        # A head that is stored again lies at the end of the files, among what went elsewhere if anything did.
        file, beyond = (here.made_from, elsewhere + again) if elsewhere else (here.made_from + again, 0.0)
        on_cpu = self.inventory.on_cpu(self.loading.attention)
        runs = on_cpu.prefill_moments(self.workload)["experts"] if self.loading.experts_in_ram else 0
        runs += 0 if self.gpus else _activations(self, on_cpu, "cpu") * self.processes
        brought = self._brought(("disk",)) if self._copies_brought or not self.gpus else 0
        passing = self.inventory.total.made - here.made if self.loading.through_ram else 0
        if self._reads_files:
            return self._read_whole(here, elsewhere, runs, brought)
        return TierTerms(
            weights=self.weights.get("cpu", 0) + _kept_by_views(self, here),
            copied=int(here.made),
            # Tensors that stay views keep their file mapped, and with it the pages that were read to make the others.
            mapped=_exact(touched + file) + _kept_mapped(self, beyond) if here.viewed else Bytes(),
            read=int(here.viewed_used) + _kept_by_views(self, here),
            brought=0 if self._copies_brought else brought,
            kv=self.kv.get("cpu", 0),
            activation=self.calibration["cpu_activation_share"].amount(runs) + _exact(brought if self._copies_brought else 0),
            overhead=self.overhead.anonymous,
            heap=self.overhead.heap(here) + self._heap_of_brought,
            libraries=self.overhead.libraries,
            loading=_exact(passing + dropped) + self.overhead.unpacking,
            loading_mapped=int(here.made_from + elsewhere + 2 * again),  # both of what is compared
            rewritten=int(rewritten),
        )

    @cached_property
    def _copies_brought(self) -> bool:
        """Whether the RAM keeps copies of what comes from the disk for each token.

        accelerate's own dispatch copies what it wrote, for a GPU as well. transformers maps a safetensors file as it is held, or
        casts what it left in the checkpoint: on the GPU if there is one.
        """
        away = self.sums.get("disk") or TensorTotals()
        return bool(away.held) and (self.loading.rewrites or self.cast_each_token > away.held / 2)

    @property
    def _heap_of_brought(self) -> Bytes:
        """What the heap keeps of the copies that are made for each token."""
        return self.calibration["heap_share_disk"].amount(self.sums["disk"].held if self._copies_brought else 0)

    @property
    def _reads_files(self) -> bool:
        """Whether files are read into the RAM instead of mapped: by accelerate's own dispatch any .bin, by torch older ones."""
        return (self.loading.rewrites and self.spec.file_format == "bin") or not self.spec.storages.mapped

    def _read_whole(self, here: TensorTotals, elsewhere: float, runs: float, brought: int) -> TierTerms:
        """Return the terms of the RAM while a file is there whole, until what went elsewhere and what was cast is freed.

        accelerate's own dispatch has one file there at a time, transformers all; views keep their storages.
        """
        largest = self.spec.largest_file if self.loading.rewrites else None
        kept = _kept_by_views(self, here)
        gone = elsewhere + here.made_from + here.twice + sum(self.spec.storages.beyond.values()) - kept
        return TierTerms(
            weights=self.weights.get("cpu", 0) + kept,
            copied=int(here.held) + kept,
            kv=self.kv.get("cpu", 0),
            activation=self.calibration["cpu_activation_share"].amount(runs) + _exact(brought),
            overhead=self.overhead.anonymous,
            heap=self._heap_of_brought,
            libraries=self.overhead.libraries,
            loading=_exact(min(gone, largest[1]) if largest else gone),
        )


def _copy_without_terms(of: Footprint, *counted: str) -> Footprint:
    """Return a copy that is about to be changed, without its terms and what else was `counted`."""
    other = object.__new__(Footprint)  # a search makes many: `copy` takes several times as long
    other.__dict__ |= of.__dict__
    other._terms = {}
    for name in ("with_expandable_segments", *counted):
        other.__dict__.pop(name, None)
    return other


def _rows_touched(workload: Workload) -> int:
    """Return how many bytes of an embedding the tokens of a workload may bring in: a page, in large files of megabytes."""
    return (workload.prompt_tokens + workload.new_tokens) * PAGE_BYTES


def _activations(of: Footprint, computed: GpuActivations | Activations, tier: str) -> int:
    """Return the most that computing on a tier holds beside weights and the KV cache as it is kept at the end.

    Images are looked at before the first token is cached, on the device that begins; pixels stay until the end, and what the
    tower made of them while the prompt is read.
    """
    images, element = of.workload.images * of.workload.batch if tier == of.main else 0, of.fmt.element_bytes
    if not of.kv_form.is_quantized and not images:
        return computed.bytes(of.workload)
    beside = memory.kv_beside(of.skeleton, of.workload, element, of.kv_form)
    prefill, decode = (held + more for held, more in zip(computed.phases(of.workload), beside, strict=True))
    image = of.spec.image
    if image is None or not images:
        return max(prefill, decode, 0)
    looking = image.peak_bytes(images, element) - of.kv.get(tier, 0)
    return max(looking, prefill + image.kept_bytes(images, element), decode + images * image.pixels_bytes * element // 2, 0)


def _kept_by_views(of: Footprint, here: TensorTotals) -> int:
    """Return the bytes of storages that weights in the RAM keep beyond their own."""
    return of.spec.storages.kept_in(of.fmt.dtype) if here.viewed and of.tiers == "cpu" and not of.fmt.quantizer else 0


def _kept_mapped(of: Footprint, beyond: float) -> Bytes:
    """Return how much of the files, read for other tiers or to compare, stays mapped beside the weights in the RAM.

    All of it if there is one file. Of several those go that hold nothing else, and the one that is shared keeps at most all
    of its pages, which no token reads: the kernel drops them first.
    """
    largest = of.spec.largest_file
    if largest is None:
        return Bytes(best=beyond, high=beyond)
    if largest[1] >= of.spec.checkpoint_bytes:
        return _exact(beyond)
    borders = sum(tier in of.weights for tier in ("disk", *of.gpus[:1]))
    return Bytes(high=min(beyond, borders * largest[1]))


def _gpus(count: int) -> list[str]:
    return [f"gpu:{number}" for number in range(count)]


def _exact(size: float) -> Bytes:
    return Bytes(low=size, best=size, high=size)
