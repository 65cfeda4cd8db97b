"""Plans of one model on one machine: estimate and verdict of every case, and what to try instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial

import msgspec

from harness.architecture.model_spec import ModelSpec
from harness.checkpoint.formats.files import quote
from harness.core.families import GGUF
from harness.core.placements import FILE, PLACEMENTS, Placement
from harness.core.precisions import PRECISIONS, Precision
from harness.core.quantizers import SCHEMES, Scheme
from harness.core.records import Case, Estimate, Machine, Plan, Tier, TierEstimate, Verdict, Workload
from harness.core.units import format_gib, format_size
from harness.machine import headroom
from harness.planning import calibration, feasibility
from harness.planning.calibration import Calibration, Constant
from harness.planning.code import Facts, loading_code
from harness.planning.cost import estimate, memory, tensor_parallel
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import MAPPED, Inventory
from harness.planning.cost.memory import WeightFormat
from harness.planning.device_map import max_memory, recommended
from harness.planning.device_map import tiers as layout
from harness.planning.device_map.infer import Device
from harness.planning.device_map.max_memory import Named, Sizes, Stock
from harness.planning.device_map.recommended import RecommendedMap

_BETWEEN = "{} processes, as by torchrun: {}what they tell each other is not counted in the speed"
_ONE_THREAD = "one thread in each unless OMP_NUM_THREADS says more, and "
# How often our device map is computed again with more room; mostly once; a block may be larger than what is short.
_TRIES = 4


class Planner:
    """Plans cases of one model on one machine; what they share is counted once.

    `trust` lets the model's own code run when it is loaded; planning never runs any. `device_map` is the user's own and checked
    (`harness.planning.device_map.user_map`); without one the placement `file` has no plan.
    """

    def __init__(
        self,
        spec: ModelSpec,
        machine: Machine,
        *,
        here: bool = True,
        constants: Calibration | None = None,
        trust: bool = False,
        device_map: Mapping[str, Device] | None = None,
    ) -> None:
        self.spec, self.machine, self.here, self.trust = spec, machine, here, trust
        self.constants = constants or calibration.default()
        self._placements = {**PLACEMENTS, FILE: PLACEMENTS[FILE].filled(device_map)} if device_map else PLACEMENTS
        self._maps: dict[tuple[object, ...], dict[str, Device]] = {}
        self._inventories: dict[WeightFormat, Inventory] = {}
        self._recommended: dict[tuple[object, ...], RecommendedMap] = {}
        self._by_dtype: dict[str, Sizes] = {}
        self.counts: dict[str, Footprint] = {}

    @cached_property
    def _stock(self) -> Stock:
        pieces = self.spec.skeleton.pieces
        inside = {like: [w for module in like.walk() for w in module.weights if not w.tied_to] for _, _, like in pieces}
        named = ((f"{path}{w.path.removeprefix(like.path)}", w.tensor.shape) for path, _, like in pieces for w in inside[like])
        return Stock([Named(name, shape) for name, shape in named])

    def _sizes(self, dtype: str) -> Sizes:
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = Sizes(self._stock, dtype)
        return self._by_dtype[dtype]

    def plans(self, cases: Sequence[Case]) -> list[Plan]:
        """Plan the cases; what is too big says what to try instead, of these cases."""
        found = [self.plan(case) for case in cases]
        return [_with_hint(one, found) for one in found]

    def plan(self, case: Case) -> Plan:
        """Plan one case."""
        precision, placement = PRECISIONS[case.precision], self._placements[case.placement]
        refused = self._refused(case) or feasibility.gate(case, self.machine, self.here and not self.spec.unpacks_itself, placement)
        if refused:
            return Plan(case=case, verdict=refused[0], why=refused[1])
        code = [str(one) for one in self.spec.remote_code]
        dtype = self._dtype(precision, placement)
        held = estimate.kept(precision, dtype, self.spec)
        limits = max_memory.max_memory(placement, self.machine, lambda: self._sizes(dtype))
        ours = self._recommendation(case, held) if placement.map_is_recommended else None
        ranks = placement.ranks(len(self.machine.gpus))
        whole: dict[str, Device] = {"": 0 if self.machine.gpus else "cpu"}
        placed = ours.device_map if ours else whole if ranks > 1 else self._map(placement, held, limits)
        count = self._count(case, held, placed)
        expected = estimate.estimate(count, case.precision, self.machine)
        verdict, why = self._judge(case, expected, count)
        tiers: dict[str, str | int] = {path: layout.tier(place) for path, place in placed.items()}
        return Plan(
            case=case,
            verdict=verdict,
            why=why or (ours.why if ours else self._between(ranks) if ranks > 1 else None),
            code=loading_code(
                precision,
                placement,
                dtype,
                limits,
                device_map=tiers,
                on_gpu=any(tier.startswith("gpu") for tier in count.weights),
                facts=self._facts,
            ),
            device_map=None if ranks > 1 else tiers,
            max_memory=limits,
            estimate=expected,
            remote_code=code,
            trusted=self.trust and bool(code),
        )

    @cached_property
    def _facts(self) -> Facts:
        spec = self.spec
        trusted = self.trust if spec.remote_code else None
        return Facts(gguf_file=spec.gguf_file, stored=spec.packed is not None, native=spec.native, trusted=trusted)

    def _between(self, ranks: int) -> str:
        return _BETWEEN.format(ranks, "" if self.machine.gpus else _ONE_THREAD)

    def _dtype(self, precision: Precision, placement: Placement) -> str:
        on_gpu = placement.devices[0] == "gpu" and self.machine.gpus
        return precision.dtype_on(self.machine.gpus[0].compute_capability if on_gpu else None)

    def _refused(self, case: Case) -> tuple[Verdict, str] | None:
        """Return why this checkpoint cannot be loaded that way, wherever it is, or at all by the transformers that is here."""
        if self.here and self.spec.unknown is not None:
            return Verdict.UNAVAILABLE, self.spec.unknown
        needed = next((code for code in self.spec.remote_code if code.needed(self.spec.has_class)), None)
        if needed is not None and not self.trust:
            what = f"{needed.file} asks for code of the model's own, {quote(needed.name, 120)}, which nothing loads without"
            return Verdict.INVALID, f"{what}: read it and, if you trust it, add --trust-remote-code"
        if self._placements[case.placement].map_is_missing:
            return Verdict.UNAVAILABLE, "no map of yours was given: --device-map FILE"
        gpus = len(self.machine.gpus)
        ranks = self._placements[case.placement].ranks(gpus)
        alone = ranks > 1 and tensor_parallel.refusal(self.spec.skeleton, ranks, "GPUs" if gpus else "processes")
        if alone:
            return Verdict.INVALID, alone
        precision, packed, gguf = PRECISIONS[case.precision], self.spec.packed, self.spec.gguf
        why = None
        if gguf is not None:
            why = gguf.refusal(precision, self._placements[case.placement])
        elif packed is not None:
            why = packed.refusal(precision)
        elif precision.scheme is not None and not self.machine.gpus:
            why = self._unpackable(SCHEMES[precision.scheme])
        elif precision.requires_checkpoint is not None:
            why = f"needs {_a(precision.requires_checkpoint)} checkpoint, and this one is {self.spec.stored_dtype}"
        return (Verdict.INVALID, why) if why else None

    def _unpackable(self, scheme: Scheme) -> str | None:
        """Say which weight a scheme cannot pack for a processor; transformers would end with an error of torch's."""
        for weight, _ in self.spec.skeleton.tally:
            if weight.quantizes and weight.tensor.shape[0] % scheme.rows:
                outputs = weight.tensor.shape[0]
                return f"{scheme.library} packs 4 bits for processors in {scheme.rows} outputs, and {weight.path} has {outputs}"
        return None

    def _map(self, placement: Placement, held: WeightFormat, limits: Mapping[str, int] | None) -> dict[str, Device]:
        key = (placement.name, held.element_bytes, held.quantizer, held.packed_embeddings)
        if key not in self._maps:
            skeleton = self.spec.skeleton
            packed = self._inventory(held).sizes if held.packed_embeddings else None
            self._maps[key] = layout.device_map(skeleton, placement, held.dtype, held.quantizer, self.machine, limits, packed)
        return self._maps[key]

    def _recommendation(self, case: Case, held: WeightFormat) -> RecommendedMap:
        """Map the model so that every tier keeps what the worst case takes beside weights and KV cache.

        What a GPU is short of after all, because loading takes more than generating, is kept free in another try; four times as
        much in the next, for only whole blocks leave it.
        """
        load, skeleton = case.workload, self.spec.skeleton
        key = (held.element_bytes, held.quantizer, held.packed_bits, load)
        if key in self._recommended:
            return self._recommended[key]
        capacities = {
            tier.name: self._usable(tier, case) or layout.ENDLESS for tier in self.machine.tiers if tier.kind in ("gpu", "cpu")
        }
        draw = partial(
            recommended.recommend_map,
            skeleton,
            {layout.device(name): size for name, size in capacities.items()},
            dtype=held.dtype,
            quantizer=held.quantizer,
            weights=self._inventory(held).sizes,
            kv_bytes=memory.kv_bytes(skeleton, load.cached_tokens, load.batch, held.element_bytes),
        )
        reserve = {layout.device(name): self._reserve(name, held, load, size) for name, size in capacities.items()}
        for attempt in range(_TRIES):
            found = draw(reserve=reserve, explain=False)
            tiers = estimate.memory(self._count(case, held, found.device_map), self.machine)
            gpus = [gpu.name for gpu in self.machine.gpus if gpu.name in tiers]
            short = {name: max(0, tiers[name].needed_high_bytes - capacities[name]) for name in gpus}
            if not any(short.values()):
                break
            reserve |= {layout.device(name): reserve[layout.device(name)] + size * 4**attempt for name, size in short.items()}
        self._recommended[key] = draw(reserve=reserve)
        return self._recommended[key]

    def _reserve(self, name: str, held: WeightFormat, load: Workload, capacity: int) -> int:
        """Return the bytes of a tier that generating needs beside weights and KV cache, at worst."""
        on = name if name.startswith("gpu") else self.machine.gpus[0].name
        inventory = self._inventory(held)
        parts = Footprint(inventory, on, load, self.constants).parts()[name]
        doubt = estimate.ROUGH_SHARE if self.spec.rough else estimate.KNOWN_SHARE
        return int(estimate.beside_weights(parts) + doubt * min(inventory.total.held, capacity))

    def _inventory(self, held: WeightFormat) -> Inventory:
        if held not in self._inventories:
            self._inventories[held] = Inventory(self.spec, held)
        return self._inventories[held]

    def _count(self, case: Case, held: WeightFormat, placed: Mapping[str, Device]) -> Footprint:
        tiers = layout.tiers(self.spec.skeleton, placed)
        gguf, placement = self.spec.gguf, self._placements[case.placement]
        through_ram = placement.moves_after_loading or (gguf is not None and gguf.through_ram)
        rewrites = placement.rewrites_offloaded
        off_gpu = (
            self._inventory(WeightFormat(dtype=held.dtype)) if _leaves_off_gpu(PRECISIONS[case.precision], placement) else None
        )
        ranks = placement.ranks(len(self.machine.gpus))
        count = Footprint(self._inventory(held), tiers, case.workload, self.constants, through_ram, rewrites, off_gpu, ranks)
        self.counts[case.id] = count
        return count

    def _judge(self, case: Case, expected: Estimate, count: Footprint) -> tuple[Verdict, str | None]:
        precision, placement = PRECISIONS[case.precision], self._placements[case.placement]
        spilled = [tier for tier in count.weights if tier == "disk" or (tier == "cpu" and count.gpus)]
        if spilled and "offloads_to_cpu" in precision.incompatible and not _leaves_off_gpu(precision, placement):
            where, reason = " and ".join(spilled), precision.incompatible["offloads_to_cpu"]
            return Verdict.TOO_BIG, f"too big for {placement.name}: weights would lie on {where}; {reason}"
        if "disk" in count.weights and self.spec.gguf is not None:
            return Verdict.TOO_BIG, f"too big for {placement.name}: weights would lie on disk; {GGUF.refusals['offloads']}"
        unknown = [
            name
            for name, tier in expected.tiers.items()
            if tier.capacity_bytes is None and name in count.weights and name != "disk"
        ]
        if unknown:
            option = "--ram SIZE" if unknown[0] == "cpu" else "--gpu SIZE"
            return Verdict.UNAVAILABLE, f"nobody told how much memory {unknown[0]} has: add {option}"
        if not count.rewrites and (unmapped := self._unmapped()):  # accelerate's own dispatch reads files, and maps none
            return Verdict.TOO_BIG, unmapped
        tight = None
        for name, tier in expected.tiers.items():
            if name == "disk":
                if short := short_of_disk(expected, tier.capacity_bytes):
                    return Verdict.TOO_BIG, short
                continue
            if tier.capacity_bytes is None:
                continue
            if self._is_short(name, tier, case):
                return Verdict.TOO_BIG, f"too big for {name}: needs {_needs(tier)}, {self._free(name, tier, case)}."
            if self._is_short(name, tier, case, doubt=tier.needed_high_bytes - tier.needed_bytes):
                most = format_gib(tier.needed_high_bytes)
                tight = f"tight on {name}: needs {_needs(tier)}, up to {most} at worst, {self._free(name, tier, case)}."
        return (Verdict.TIGHT, tight) if tight else (Verdict.FITS, None)

    def _is_short(self, name: str, tier: TierEstimate, case: Case, doubt: int = 0) -> bool:
        """Say whether a tier has not enough for a case, if that needs `doubt` more than is likely."""
        capacity, usable = tier.capacity_bytes, self._usable(self.machine.tier(name), case)
        return (capacity is not None and tier.needed_bytes + doubt > capacity) or (
            usable is not None and tier.anon_bytes + doubt > usable
        )

    def _free(self, name: str, tier: TierEstimate, case: Case) -> str:
        """Write how much of a tier is free, and how much of that a case cannot have."""
        capacity, usable = tier.capacity_bytes or 0, self._usable(self.machine.tier(name), case) or 0
        left = f", of which a run leaves {format_gib(capacity - usable)} to the machine" if usable < capacity else ""
        return f"free {format_gib(capacity)}{left}"

    def _usable(self, tier: Tier | None, case: Case) -> int | None:
        """Return the bytes of a tier that a case can make its own: of the RAM not those that a run's guard keeps free.

        Pages of files do not count against it: they can be dropped (`harness.measure.limits`).
        """
        if tier is None or tier.kind != "cpu" or tier.capacity_bytes is None or tier.total_bytes is None or not self.here:
            return tier.capacity_bytes if tier else None
        if case.ram_bytes is None:
            return tier.capacity_bytes - headroom.floor_of(min(tier.total_bytes, tier.limit_bytes or tier.total_bytes))
        free = tier.total_bytes if tier.free_bytes is None else tier.free_bytes
        return min(tier.capacity_bytes, free - headroom.floor_of(tier.total_bytes))

    def _unmapped(self) -> str | None:
        """Say which file this system does not map for torch and safetensors, however little of it is to be held at once."""
        most, largest = self.machine.mapping_bytes, self.spec.largest_file
        if most is None or largest is None or largest[1] <= most or self.spec.file_format not in MAPPED:
            return None
        what = (
            f"too big for cpu: {largest[0]} has {format_size(largest[1])}, and Linux maps no file larger than {format_size(most)}"
        )
        return f"{what} for torch here: add swap, set vm.overcommit_memory to 1, or take a copy in several files."

    def used(self, one: Plan) -> dict[str, Constant]:
        """Return the constants that a plan rests on: those of its kind of device."""
        gpu = any(name.startswith("gpu") for name in (one.estimate.tiers if one.estimate else ()))
        other = ("cpu_", "ram_bytes", "ram_bandwidth") if gpu else ("gpu_", "host_", "link_", "ram_cuda")
        foreign = other if self.spec.gguf else (*other, "gguf_")
        foreign = foreign if PLACEMENTS[one.case.placement].parallel else (*foreign, "ram_ranks")
        return {name: constant for name, constant in self.constants.constants.items() if not name.startswith(foreign)}

    def max_context(self, one: Plan) -> int | None:
        """Return the most tokens, prompt and answer together, with which a plan still fits; at most what the model knows.

        None where the plan does not fit at all or no limit is known.
        """
        count = self.counts.get(one.case.id)
        if one.estimate is None or count is None or not one.verdict.is_good:
            return None
        most = self.spec.context_length or 1 << 20
        new = one.case.workload.new_tokens
        least = new + 1
        if not self._holds(count, one.case, least):
            return None
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._holds(count, one.case, middle) else (least, middle - 1)
        return least

    def _holds(self, count: Footprint, case: Case, context: int) -> bool:
        """Say whether so many tokens fit, best as the estimate is."""
        prompt = max(1, context - case.workload.new_tokens)
        longer = count.longer(msgspec.structs.replace(case.workload, prompt_tokens=prompt))
        tiers = estimate.memory(longer, self.machine)
        return not any(self._is_short(name, tier, case) for name, tier in tiers.items() if name != "disk")


def _leaves_off_gpu(precision: Precision, placement: Placement) -> bool:
    """Say whether what lies off the GPUs is not quantized."""
    return precision.off_gpu is not None and placement.splits_devices


def short_of_disk(expected: Estimate | None, free_bytes: int | None) -> str | None:
    """Say why the weights that loading writes into the offload folder do not go there; None if they do."""
    tier = expected.tiers.get("disk") if expected else None
    if tier is None or free_bytes is None or tier.needed_bytes <= free_bytes:
        return None
    needed, free = format_gib(tier.needed_bytes), format_gib(free_bytes)
    return f"too big for disk: the offload folder needs {needed} GiB, free {free}; set TMPDIR to a directory on a larger disk."


def _needs(tier: TierEstimate) -> str:
    """Write what a tier needs and of what: "16.1 GiB (weights 14.9, KV 0.7, overhead 0.5)", and what loading alone adds."""
    terms = {
        "weights": tier.weights_bytes,
        "KV": tier.kv_bytes,
        "activations": tier.activation_bytes,
        "overhead": tier.overhead_bytes,
    }
    terms["more while loading"] = tier.needed_bytes - sum(terms.values())
    said = ", ".join(f"{name} {format_gib(size)}" for name, size in terms.items() if size * 100 > tier.needed_bytes)
    return f"{format_gib(tier.needed_bytes)} GiB ({said})"


def _with_hint(one: Plan, others: Iterable[Plan]) -> Plan:
    """Add to a plan that is too big which other precision or placement would do."""
    if one.verdict is not Verdict.TOO_BIG or one.why is None:
        return one
    order = sorted(others, key=lambda other: other.verdict is not Verdict.FITS)
    good = [other.case for other in order if other.verdict.is_good and other.case.model == one.case.model]
    precision = next((case.precision for case in good if case.placement == one.case.placement), None)
    placement = next((case.placement for case in good if case.precision == one.case.precision), None)
    words = [f"--precision {precision}"] * bool(precision) + [f"--placement {placement}"] * bool(placement)
    return msgspec.structs.replace(one, why=f"{one.why} Try {' or '.join(words)}.") if words else one


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIO' else 'a'} {noun}"
