"""Plans of one model on one machine: estimate and verdict of every case, and what to try instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Skeleton
from harness.core.attention import KV_FORMS, modules_for
from harness.core.methods.packages import asked_of_pip
from harness.core.placements import FILE, PLACEMENTS, Placement
from harness.core.precisions import PRECISIONS
from harness.core.progress import Report
from harness.core.records import Case, Estimate, Machine, Plan, Verdict
from harness.planning import calibration, feasibility, other_form
from harness.planning.adapted_row import AdaptedRow
from harness.planning.calibration import Calibration, Constant
from harness.planning.code import Destination, Facts, loading_code
from harness.planning.cost import estimate, memory
from harness.planning.cost.footprint import Footprint, Loading, Tiers
from harness.planning.cost.gpu_activations import GpuActivations
from harness.planning.cost.makeup import makeup
from harness.planning.cost.memory import WeightFormat
from harness.planning.cost.speed import Timing
from harness.planning.cost.work import multiplies_4bit_in_ram
from harness.planning.counted import count_model
from harness.planning.device_map import max_memory, tiers
from harness.planning.device_map.experts import blocks_of_experts, experts_map
from harness.planning.device_map.infer import STRATEGIES, Device, Widths
from harness.planning.device_map.recommended import Recommender
from harness.planning.outlook import with_hint
from harness.planning.quality import known_quality
from harness.planning.verdict import Judge, is_windows, leaves_off_gpu, needs_of_gpus, with_article

_BETWEEN = "{} processes, as by torchrun: {}communication between processes is not counted in the speed"
_ONE_THREAD = "one thread in each unless OMP_NUM_THREADS says more, and "
_BFLOAT16_FROM = 8.0  # the compute capability
_EMULATED = "bfloat16 is emulated on the {}, compute capability {}, and slow: fp16 is not"
_FUSED = "4-bit weights in RAM are multiplied as they are: the processor has AVX512_BF16, and bitsandbytes loads its library for it"
_UNFUSED = "4-bit weights in RAM are unpacked for every token: {} the product for AVX512_BF16"
_MAYBE_FUSED = "4-bit weights in RAM are taken to be multiplied as they are: without AVX512_BF16 it is tens of times slower"
# How often our device map is computed again with more room; mostly once; a block may be larger than what is short.
_TRIES = 4


class _Placed(NamedTuple):
    """Where a call puts a model: its device map, and by it the tier of each piece or of all."""

    device_map: Mapping[str, Device]
    tiers: Tiers


class _Room(NamedTuple):
    """What our own maps are made by, what they must leave free, and whether they take torch's expandable segments."""

    recommender: Recommender
    reserve: dict[Device, int]
    expandable: bool


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
        self.counted = count_model(spec)
        self.spec, self.machine, self.here, self.trust = self.counted.spec, machine, here, trust
        self.constants = calibration.with_context(constants or calibration.default(), machine)
        self.judge = Judge(spec=self.spec, machine=machine, here=here, trust=trust)
        rows = {**PLACEMENTS, FILE: PLACEMENTS[FILE].filled(device_map)} if device_map else PLACEMENTS
        self._placements = dict(rows)
        self._rows: dict[tuple[str, str], AdaptedRow] = {}
        self._estimates: dict[tuple[Footprint, str], tuple[list[Timing], Estimate]] = {}
        self._contexts: dict[tuple[Footprint, int | None], int | None] = {}
        known = [gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability]
        self._capability = min(known, key=float, default=None)
        self._maps: dict[tuple[object, ...], _Placed] = {}
        self._rooms: dict[tuple[object, ...], _Room] = {}
        self._other_forms: dict[str, Planner] = {}
        self._plans: dict[tuple[Case, bool], Plan] = {}
        self.known_quality = known_quality(self.spec)
        self._expert_blocks = tuple(blocks_of_experts(self.spec.skeleton))
        self.footprints: dict[str, Footprint] = {}
        self.timings: dict[str, list[Timing]] = {}

    def plans(self, cases: Sequence[Case]) -> list[Plan]:
        """Plan the cases; what is too big says what to try instead, of these cases."""
        found = [self.plan(case) for case in cases]
        return [with_hint(one, found) for one in found]

    def untraced(self, cases: Sequence[Case]) -> list[GpuActivations]:
        """Return what these cases would allocate on a GPU where it is by formulas, and a trace could say it."""
        for case in cases:
            self.plan(case)
        footprints = [self.footprints[case.id] for case in cases if case.id in self.footprints]
        return list(dict.fromkeys(one.on_gpu for one in footprints if one.gpus and one.on_gpu.lacks_trace))

    def trace(self, untraced: Iterable[GpuActivations], report: Report) -> list[str]:
        """Have a worker trace them, seconds each, so that plans rest on it; return why some cannot be traced, each once."""
        said = []
        for one in untraced:
            report(f"tracing {self.spec.name} in {one.precision}, once")
            one.build()
            said += [one.why_formulas] * one.lacks_trace
        self.counted.footprint.cache_clear()
        for counted in (self._rooms, self._estimates, self._contexts, self._plans):
            counted.clear()
        return list(dict.fromkeys(said))

    def plan(self, case: Case, *, in_words: bool = True) -> Plan:
        """Plan one case, for another form of checkpoint as if there were one; not `in_words` without code and what its map does."""
        found = self._plans.get((case, True)) or self._plans.get((case, in_words))
        if found is None:
            known = self.known_quality.of(case)
            found = msgspec.structs.replace(self._planned(case, in_words), kept_share=known[0] if known else None)
            self._plans[case, in_words] = found
        return found

    def _planned(self, case: Case, in_words: bool) -> Plan:
        row = PRECISIONS[case.precision]
        other = other_form.stored_for(self.spec, row)
        if other is not None:
            return self._in_another_form(case, other, in_words)
        refused = self.judge.refusal(case, self._placements[case.placement])
        if refused:
            return Plan(case=case, verdict=refused[0], why=refused[1])
        loaded = self._row(case)
        precision, placement = loaded.precision, loaded.placement
        refused = feasibility.gate(case, self.machine, self.here, placement, precision)
        if refused:
            return Plan(case=case, verdict=refused[0], why=refused[1])
        dtype, fmt = loaded.dtype, loaded.fmt
        limits = max_memory.max_memory(placement, self.machine, lambda: self.counted.sizes(fmt))
        ours = self._room(case, fmt) if placement.map_is_recommended else None
        ranks = placement.ranks(len(self.machine.gpus))
        if ours:
            placed = _placed(self.spec.skeleton, ours.recommender.places(ours.reserve))
        elif ranks > 1 or placement.experts_in_ram:
            placed = _placed(self.spec.skeleton, {"": placement.gpu if self.machine.gpus else "cpu"})
        else:
            placed = self._map(placement, fmt, limits)
        apart = self._apart(case, fmt, placement.gpu) if placement.experts_in_ram else ()
        footprint = self._footprint(case, fmt, placed.tiers, apart)
        footprint = footprint.with_expandable_segments if ours and ours.expandable else footprint
        key = (footprint, case.precision)
        if key not in self._estimates:
            timed = estimate.timings(footprint, case.precision, self.machine)
            self._estimates[key] = timed, estimate.estimate_timed(footprint, timed, self.machine)
        self.timings[case.id], usual = self._estimates[key]
        expected, verdict, why, footprint = self.judge.judge(case, placement, footprint, usual)
        self.footprints[case.id] = footprint
        if not in_words:
            return Plan(case=case, verdict=verdict, why=why, estimate=expected)
        code = [str(one) for one in self.spec.remote_code]
        told = ours.recommender.recommend(ours.reserve, explain=not why) if ours else None
        mapped = told.device_map if told else experts_map(self.spec.skeleton, placement.gpu, apart) if apart else placed.device_map
        by_module: dict[str, str | int] = {path: tiers.tier(place) for path, place in mapped.items()}
        on_gpu = any(tier.startswith("gpu") for tier in footprint.weights)
        limits = None if placement.writes_inferred_map else limits
        destination = Destination(max_memory=limits, device_map=by_module, on_gpu=on_gpu)
        return Plan(
            case=case,
            verdict=verdict,
            why=why or (told.why if told else _spread(ranks, apart, len(self._expert_blocks), bool(self.machine.gpus))),
            code=loading_code(precision, placement, dtype, destination, _facts(self.spec, case, self.trust)),
            device_map=None if ranks > 1 else by_module,
            max_memory=limits,
            estimate=expected,
            remote_code=code,
            trusted=self.trust and bool(code),
            needs=asked_of_pip((*precision.needs, *modules_for(case.kv, case.attention))),
            partly=self.spec.packed is not None and self.spec.packed.in_part(row),
            linear_dtype=None if precision.linear_dtype == PRECISIONS[case.precision].linear_dtype else precision.linear_dtype,
            expandable_segments=footprint.loading.expandable,
        )

    def can_hold(self, case: Case) -> bool:
        """Say whether the memory of known size that a placement fills is as large as the weights: if not, no plan of it fits."""
        loaded = self._row(case)
        filled = [tier for tier in tiers.fillable(self.machine) if tier.kind in loaded.placement.devices]
        if "disk" in loaded.placement.devices and all(tier.capacity_bytes is not None for tier in filled):
            return True
        return self.counted.inventory(loaded.fmt).total.held <= sum(tier.capacity_bytes or 0 for tier in filled)

    def _in_another_form(self, case: Case, other: ModelSpec, in_words: bool) -> Plan:
        """Plan a case for a checkpoint that is not there: with figures, and the published ones that the catalog knows."""
        row = PRECISIONS[case.precision]
        if case.precision not in self._other_forms:
            constants, trust = self.constants, self.trust
            self._other_forms[case.precision] = Planner(other, self.machine, here=self.here, constants=constants, trust=trust)
        there = self._other_forms[case.precision]
        one = there.plan(case, in_words=in_words)
        if case.id in there.footprints:
            self.footprints[case.id], self.timings[case.id] = there.footprints[case.id], there.timings[case.id]
        needed = f"{with_article(str(row.requires_checkpoint))} checkpoint"
        what = f"needs {needed}, and this one is {self.spec.stored_dtype}"
        published = other_form.published_in(self.spec, row)
        known = f": published as {' and '.join(published[:2])}" if published else ": quantize it, or look for one on the hub"
        then = f"; {one.why}" if one.why and one.verdict is not Verdict.FITS else ""  # of what fits that is what its map does
        verdict = one.verdict if one.verdict in (Verdict.TOO_BIG, Verdict.INVALID) else Verdict.UNAVAILABLE
        return msgspec.structs.replace(one, verdict=verdict, why=f"{what}{known}{then}", code=None, needs_checkpoint=needed)

    def _row(self, case: Case) -> AdaptedRow:
        """Return the rows of a case as they load this checkpoint on this machine."""
        key = (case.precision, case.placement)
        if key not in self._rows:
            self._rows[key] = AdaptedRow(self.counted, self.machine, PRECISIONS[case.precision], self._placements[case.placement])
        return self._rows[key]

    def _map(self, placement: Placement, fmt: WeightFormat, limits: Mapping[str, int] | None) -> _Placed:
        # A dtype is told from another by its bytes alone.
        key = (placement.name, fmt if fmt.packed_bits is not None else (fmt.element_bytes, fmt.quantizer))
        if key not in self._maps:
            skeleton = self.spec.skeleton
            mapped = tiers.device_map(skeleton, placement, tiers.widths_of(skeleton, fmt), self.machine, limits)
            self._maps[key] = _placed(skeleton, mapped)
        return self._maps[key]

    def _room(self, case: Case, fmt: WeightFormat) -> _Room:
        """Return how to map the model so that every tier keeps what the worst case takes beside weights and KV cache.

        What a GPU is short of after all, because loading takes more than generating, is kept free in another try; four times as
        much in the next, for only whole blocks leave it.
        """
        workload, skeleton = case.workload, self.spec.skeleton
        key = (fmt.element_bytes, fmt.quantizer, fmt.packed_bits, workload, case.kv, case.attention)
        if key not in self._rooms:
            homes = {tier.name: self.machine.tier("cpu") if tier.shared else tier for tier in tiers.fillable(self.machine)}
            capacities = {name: self.judge.usable_bytes(home, case) or tiers.ENDLESS for name, home in homes.items()}
            recommender = Recommender(
                skeleton,
                {tiers.device(name): size for name, size in capacities.items()},
                Widths(fmt.dtype, fmt.quantizer, self.counted.inventory(fmt).sizes),
                kv_bytes=memory.kept_kv_bytes(skeleton, workload, fmt.element_bytes, KV_FORMS[case.kv]),
            )
            reserve = self._kept_free(recommender, case, fmt, capacities, expandable=False)
            expandable = recommender.bytes_off(reserve) > 0 and not is_windows(self.machine)
            if expandable:  # what they save is room for more blocks, or for a longer context
                reserve = self._kept_free(recommender, case, fmt, capacities, expandable=True)
            self._rooms[key] = _Room(recommender, reserve, expandable)
        return self._rooms[key]

    def _kept_free(
        self, recommender: Recommender, case: Case, fmt: WeightFormat, capacities: Mapping[str, int], *, expandable: bool
    ) -> dict[Device, int]:
        """Return the bytes of each device that its map must leave, with torch's usual segments or with expandable ones."""
        reserve = self._reserve(fmt, case, capacities, expandable=expandable)
        for attempt in range(_TRIES):
            footprint = self._footprint(case, fmt, tiers.tiers(self.spec.skeleton, recommender.places(reserve)))
            footprint = footprint.with_expandable_segments if expandable else footprint
            on = needs_of_gpus(footprint, self.machine)
            short = {name: max(0, need.needed_high_bytes - capacities[name]) for name, need in on.items()}
            if not any(short.values()):
                break
            reserve |= {tiers.device(name): reserve[tiers.device(name)] + size * 4**attempt for name, size in short.items()}
        return reserve

    def _reserve(self, fmt: WeightFormat, case: Case, capacities: Mapping[str, int], *, expandable: bool) -> dict[Device, int]:
        """Return the bytes of each device that generating needs beside weights and KV cache, at worst."""
        inventory, loading = self.counted.inventory(fmt), Loading(attention=case.attention, capability=self._capability)
        asked = case.workload, self.constants, loading, case.kv
        footprints = [self.counted.footprint(fmt, gpu.name, *asked) for gpu in self.machine.gpus]
        footprints = [one.with_expandable_segments if expandable else one for one in footprints]
        terms = {name: found for footprint in reversed(footprints) for name, found in footprint.terms().items()}
        doubt = estimate.ROUGH_SHARE if self.spec.rough else estimate.KNOWN_SHARE
        reserve = {
            tiers.device(name): int(estimate.beside_weights(terms[name]) + doubt * min(inventory.total.held, size))
            for name, size in capacities.items()
        }
        if self.machine.shares_ram:
            reserve[0] += int(estimate.beside_weights(terms["cpu"]))
        return reserve

    def _apart(self, case: Case, fmt: WeightFormat, gpu: int) -> tuple[str, ...]:
        """Return the last blocks whose experts stay in RAM: as few as the GPU surely leaves no room for, one at least."""
        blocks, name = self._expert_blocks, self.machine.gpus[gpu].name
        capacity = self.judge.usable_bytes(self.machine.gpus[gpu], case) or tiers.ENDLESS

        def holds(count: int) -> bool:
            footprint = self._footprint(case, fmt, name, blocks[-count:])
            ways = [footprint] if is_windows(self.machine) else [footprint, footprint.with_expandable_segments]
            return any(estimate.memory_of(name, one, self.machine).needed_high_bytes <= capacity for one in ways)

        least, most = 1, len(blocks)
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if holds(middle) else (middle + 1, most)
        return blocks[-least:]

    def _footprint(self, case: Case, fmt: WeightFormat, on_tiers: Tiers, apart: tuple[str, ...] = ()) -> Footprint:
        """Count a case; placements that come to the same are counted once, whatever machine they are on."""
        gguf, row = self.spec.gguf, self._row(case)
        placement, there = row.placement, {on_tiers} if isinstance(on_tiers, str) else {*on_tiers}
        begins = [gpu.name for gpu in self.machine.gpus if gpu.name != on_tiers]
        loading = Loading(
            through_ram=placement.moves_after_loading or (gguf is not None and gguf.through_ram),
            experts_in_ram=apart,
            rewrites=placement.rewrites_offloaded,
            off_gpu=self.counted.inventory(WeightFormat(dtype=fmt.dtype)) if leaves_off_gpu(row.precision, placement) else None,
            processes=placement.ranks(len(self.machine.gpus)),
            begins_on=tuple(begins) if _looks_for_itself(placement, self.machine) else (),
            attention=case.attention,
            capability=self._capability if any(tier.startswith("gpu") for tier in there) else None,
        )
        self.footprints[case.id] = self.counted.footprint(fmt, on_tiers, case.workload, self.constants, loading, case.kv)
        return self.footprints[case.id]

    def used(self, one: Plan) -> dict[str, Constant]:
        """Return the constants that a plan rests on: those of its kind of device."""
        gpu = any(name.startswith("gpu") for name in (one.estimate.tiers if one.estimate else ()))
        other = ("cpu_", "ram_bytes", "ram_bandwidth") if gpu else ("gpu_", "host_", "link_", "ram_cuda")
        foreign = other if self.spec.gguf else (*other, "gguf_")
        foreign = foreign if PLACEMENTS[one.case.placement].parallel else (*foreign, "ram_ranks")
        return {name: constant for name, constant in self.constants.constants.items() if not name.startswith(foreign)}

    def made_up(self, one: Plan) -> Plan:
        """Return a plan whose estimate says what each constant has a part in, so that its result can correct them."""
        footprint = self.footprints.get(one.case.id)
        if one.estimate is None or footprint is None:
            return one
        base = calibration.with_context(calibration.default(), self.machine)
        measured = {"gpu_context_bytes"} if base["gpu_context_bytes"] != calibration.default()["gpu_context_bytes"] else set()
        names = self.used(one).keys() - measured
        parts = makeup(footprint, one.case.precision, self.machine, base, sorted(names))
        return msgspec.structs.replace(one, estimate=msgspec.structs.replace(one.estimate, makeup=parts))

    def notes(self, one: Plan) -> list[str]:
        """Return what else decides how fast a plan is on this machine, in sentences."""
        footprint = self.footprints.get(one.case.id)
        if footprint is None:
            return []
        used = [gpu for gpu in self.machine.gpus if gpu.name in footprint.gpus and footprint.fmt.dtype == "bfloat16"]
        old = [gpu for gpu in used if gpu.compute_capability and float(gpu.compute_capability) < _BFLOAT16_FROM]
        said = [_EMULATED.format(gpu.model or gpu.name, gpu.compute_capability) for gpu in old[:1]]
        said += [footprint.on_gpu.kernel] * bool(footprint.gpus and footprint.on_gpu.kernel)
        if footprint.gpus or not multiplies_4bit_in_ram(footprint.fmt):
            return said
        beside = "beside a GPU bitsandbytes loads its CUDA library, which lacks" if self.machine.gpus else "this processor lacks"
        return [*said, {True: _FUSED, False: _UNFUSED.format(beside), None: _MAYBE_FUSED}[self.machine.fuses_4bit]]

    def holds(self, one: Plan, tokens: int | None) -> bool:
        """Say whether a plan still fits with `tokens` tokens, prompt and answer together, within the context of its model."""
        footprint, most = self.footprints.get(one.case.id), self.spec.context_length
        if footprint is None or tokens is None or (most is not None and tokens > most):
            return False
        return self.judge.holds(footprint, one.case, tokens)

    def max_context(self, one: Plan) -> int | None:
        """Return the most tokens, prompt and answer together, with which a plan still fits; None if it does not fit at all."""
        footprint = self.footprints.get(one.case.id)
        if one.estimate is None or footprint is None or not one.verdict.is_good:
            return None
        key = (footprint, one.case.ram_bytes)
        if key not in self._contexts:
            self._contexts[key] = self.judge.max_context(footprint, one.case)
        return self._contexts[key]


def _placed(skeleton: Skeleton, device_map: Mapping[str, Device]) -> _Placed:
    return _Placed(device_map, tiers.tiers(skeleton, device_map))


def _looks_for_itself(placement: Placement, machine: Machine) -> bool:
    """Say whether a library asks every GPU what is free, which begins on it (`max_memory.max_memory` gives no limits)."""
    is_limited = any(tier.limit_bytes is not None for tier in machine.tiers if tier.kind in ("gpu", "cpu"))
    return placement.device_map in STRATEGIES and placement.limits is None and not is_limited


def _facts(spec: ModelSpec, case: Case, trust: bool) -> Facts:
    return Facts(
        gguf_file=spec.gguf_file,
        native=spec.native,
        auto_class=spec.skeleton.auto_class,
        trusted=trust if spec.remote_code else None,
        attention=case.attention,
        tuples=not spec.config.get("return_dict", True),
        adapter=spec.adapter is not None,
    )


def _spread(ranks: int, apart: Sequence[str], blocks: int, has_gpu: bool) -> str | None:
    """Say what a case does that is no plain map: processes that share layers, experts that stay in RAM."""
    if ranks > 1:
        return _BETWEEN.format(ranks, "" if has_gpu else _ONE_THREAD)
    return f"The experts of {len(apart)} of {blocks} blocks are in RAM." if apart else None
