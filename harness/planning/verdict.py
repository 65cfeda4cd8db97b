"""The verdict on one case: refused for its checkpoint, too big, tight or fitting, with the reason in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from harness.architecture.model_spec import ModelSpec
from harness.checkpoint.adapter import MOVED
from harness.checkpoint.formats.files import quote
from harness.checkpoint.quantization import Packed
from harness.core.methods.config import settings_of
from harness.core.methods.cpu_kernels import LinearSides, cpu_refusal
from harness.core.methods.scheme import PackedScheme
from harness.core.placements import Placement
from harness.core.precisions import PRECISIONS, Precision
from harness.core.quantizers import SCHEMES, Scheme
from harness.core.records import Case, Estimate, Machine, Record, Tier, TierEstimate, Verdict, Workload
from harness.core.units import format_gib, format_size
from harness.machine import headroom
from harness.planning.cost import estimate, memory, tensor_parallel
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import MAPPED
from harness.planning.feasibility import has_avx512_bf16
from harness.planning.generating import generating_refusal

# Classes that take the weight of this Linear and multiply by it themselves, whatever bitsandbytes has made of it.
_TAKES_WEIGHTS = {"MambaForCausalLM": "dt_proj"}
_MOST_TOKENS = 1 << 20  # where a config does not say how many its model knows
_NOT_ON_WINDOWS = "It would fit with expandable segments, which torch does not have on Windows."


class Judgment(NamedTuple):
    """What a case is expected to need, the verdict with its reason, and the case as it was counted for both."""

    estimate: Estimate
    verdict: Verdict
    why: str | None
    footprint: Footprint


class Judge(Record, frozen=True, kw_only=True):
    """Judges cases of one model on one machine."""

    spec: ModelSpec
    machine: Machine
    here: bool  #: whether it is this machine; what is installed here says nothing about others
    trust: bool  #: whether the model's own code may run

    def refusal(self, case: Case, placement: Placement) -> tuple[Verdict, str] | None:
        """Say why this checkpoint cannot be loaded that way, anywhere or by the transformers that is here; None if it can."""
        if self.spec.unknown is not None and not self.spec.config.get("model_type"):  # which no other release knows either
            return Verdict.INVALID, self.spec.unknown
        if self.here and self.spec.unknown is not None:
            return Verdict.UNAVAILABLE, self.spec.unknown
        needed = next((code for code in self.spec.remote_code if code.needed(self.spec.has_class)), None)
        if needed is not None and not self.trust:
            what = f"{needed.file} asks for code of the model's own, {quote(needed.name, 120)}, which nothing loads without"
            return Verdict.INVALID, f"{what}: read it and, if you trust it, add --trust-remote-code"
        if placement.map_is_missing:
            return Verdict.UNAVAILABLE, "no map of yours was given: --device-map FILE"
        gpus = len(self.machine.gpus)
        ranks = placement.ranks(gpus)
        alone = ranks > 1 and tensor_parallel.refusal(self.spec.skeleton, ranks, "GPUs" if gpus else "processes")
        if alone:
            return Verdict.INVALID, alone
        if self.spec.adapter is not None and placement.experts_in_ram:
            return Verdict.INVALID, MOVED
        why = self._precision_refusal(PRECISIONS[case.precision], placement)
        return (Verdict.INVALID, why) if why else generating_refusal(self.spec, self.machine, case, placement)

    def _precision_refusal(self, precision: Precision, placement: Placement) -> str | None:
        packed, gguf = self.spec.packed, self.spec.gguf
        if gguf is not None:
            return gguf.refusal(precision, placement)
        in_ram = not self.machine.gpus or "gpu" not in placement.devices
        if packed is not None and (
            why := packed.refusal(precision, in_ram=in_ram) or (self._unmultiplied(packed) if in_ram else None)
        ):
            return why
        if precision.scheme is not None and (packed is None or packed.holds_all(precision)):
            why = self._passed_by(precision.scheme) or (self._unpackable(SCHEMES[precision.scheme]) if in_ram else None)
            if why is not None:
                return why
        if precision.requires_checkpoint is not None and packed is None:
            return f"needs {with_article(precision.requires_checkpoint)} checkpoint, and this one is {self.spec.stored_dtype}"
        return None

    def _passed_by(self, quantizer: str) -> str | None:
        """Say that a library replaces no Linear of a model, as it goes by the class of a module, or that the model passes it by."""
        found, scheme = self.spec.skeleton, SCHEMES[quantizer]
        taken = _TAKES_WEIGHTS.get(found.model_class)
        if taken is not None and scheme.packs_weight:
            return f"{found.model_class} multiplies by the weight of {taken} itself, which {scheme.library} packs"
        if memory.narrows_any(found, quantizer):
            return None
        return (
            f"{scheme.library} packs torch's own Linear, and {found.model_class} has none beside its head: all would stay as it is"
        )

    def _unpackable(self, scheme: Scheme) -> str | None:
        """Say what a scheme cannot pack or multiply on a processor; the libraries would end with an error of torch's."""
        found = self.spec.skeleton
        if scheme.flat and any(one.expanded for one in found.attention):
            what = f"{scheme.library} multiplies its int8 on processors with rows of tokens alone"
            return f"{what}, and the latent attention of {found.model_class} has rows for each head: take another precision"
        for weight, _ in found.tally:
            if weight.quantizes and weight.tensor.shape[0] % scheme.rows:
                outputs = weight.tensor.shape[0]
                return f"{scheme.library} packs 4 bits for processors in {scheme.rows} outputs, and {weight.path} has {outputs}"
        return self._unfusable(scheme) if self.machine.fuses_4bit else None

    def _unfusable(self, scheme: Scheme) -> str | None:
        """Say which weight a processor with AVX512_BF16 cannot multiply as it is, whatever one without it would do."""
        for path, outputs, inputs in self._linear_sides():
            if outputs % scheme.fused[0] or inputs % scheme.fused[1]:
                rows, columns = scheme.fused
                what = f"{scheme.library} multiplies 4 bits on this processor by {rows} outputs and {columns} inputs"
                return f"{what}, and {path} has {outputs} and {inputs}: take another precision"
        return None

    def _unmultiplied(self, packed: Packed) -> str | None:
        """Say why this processor does not multiply by weights that are stored as GPTQ or AWQ; None of other methods."""
        if not packed.has_kernels or packed.stored_by is None:
            return None
        scheme = PackedScheme(method=packed.name, bits=packed.bits, group=packed.group)
        fast, some = has_avx512_bf16(self.machine), packed.selects or packed.varies
        return cpu_refusal(scheme, tuple(self._linear_sides()), avx512_bf16=fast, some=some)

    def _linear_sides(self) -> Iterator[LinearSides]:
        """Yield path, outputs and inputs of every kind of Linear that quantizers take."""
        turned = any(block.linear == "conv1d" for block in self.spec.skeleton.blocks)
        for weight, _ in self.spec.skeleton.tally:
            if weight.quantizes and len(weight.tensor.shape) == 2:
                outputs, inputs = reversed(weight.tensor.shape) if turned else weight.tensor.shape
                yield weight.path, outputs, inputs

    def verdict(self, case: Case, placement: Placement, expected: Estimate, footprint: Footprint) -> tuple[Verdict, str | None]:
        """Say whether a case fits, and why not or how narrowly."""
        where, reason = misplaced(self.spec.adapted(PRECISIONS[case.precision]), placement, footprint)
        if where:
            return Verdict.TOO_BIG, f"too big for {placement.name}: weights would lie on {' and '.join(where)}; {reason}"
        if undivided := self._undivided(placement, footprint):
            return Verdict.INVALID, undivided
        unknown = [
            name
            for name, tier in expected.tiers.items()
            if tier.capacity_bytes is None and name in footprint.weights and name != "disk"
        ]
        if unknown:
            option = "--ram SIZE" if unknown[0] == "cpu" else "--gpu SIZE"
            return Verdict.UNAVAILABLE, f"memory size of {unknown[0]} is unknown; pass {option}"
        if not footprint.loading.rewrites and (
            unmapped := self._unmapped()
        ):  # accelerate's own dispatch reads files, and maps none
            return Verdict.TOO_BIG, unmapped
        return self.context_refusal(case.workload) or self._fit(case, expected)

    def _undivided(self, placement: Placement, footprint: Footprint) -> str | None:
        """Say why a map that transformers infers cannot divide weights as they are stored, where it would."""
        method = self.spec.packed.method if self.spec.packed is not None else None
        if method is None or method.undivided is None or placement.prints_map or len(footprint.weights) < 2:
            return None
        return method.undivided(settings_of(self.spec.config) or {})

    def context_refusal(self, load: Workload) -> tuple[Verdict, str] | None:
        """Say that a model was not made for so many tokens: positions beyond its context end in an error or in nonsense."""
        most = self.spec.context_length
        if most is None or load.prompt_tokens + load.new_tokens <= most:
            return None
        asked = (
            f"{load.prompt_tokens + load.new_tokens:,} tokens are asked for ({load.prompt_tokens:,} in, {load.new_tokens:,} out)"
        )
        tokens = "tokens and no positions beyond" if self.spec.skeleton.looks_up_positions(most) else "tokens"
        return Verdict.INVALID, f"{self.spec.name} has a context of {most:,} {tokens}, and {asked}: ask for {most:,} at most."

    def _fit(self, case: Case, expected: Estimate) -> tuple[Verdict, str | None]:
        """Compare what each tier needs, at best and at worst, with what it has."""
        tight = None
        for name, tier in pooled(expected.tiers, self.machine).items():
            if name == "disk":
                if short := short_of_disk(expected, tier.capacity_bytes):
                    return Verdict.TOO_BIG, short
                continue
            if tier.capacity_bytes is None:
                continue
            if self.is_short(name, tier, case):
                where = self._memory(name)
                return Verdict.TOO_BIG, f"too big for {where}: needs {_format_need(tier)}, {self._format_free(name, tier, case)}."
            if self.is_short(name, tier, case, doubt=tier.needed_high_bytes - tier.needed_bytes):
                most, free = format_gib(tier.needed_high_bytes), self._format_free(name, tier, case)
                tight = f"tight on {self._memory(name)}: needs {_format_need(tier)}, up to {most} at worst, {free}."
        return (Verdict.TIGHT, tight) if tight else (Verdict.FITS, None)

    def judge(self, case: Case, placement: Placement, footprint: Footprint, expected: Estimate) -> Judgment:
        """Judge a case: by torch's expandable segments if it surely fits by them alone, and its system has them."""
        verdict, why = self.verdict(case, placement, expected, footprint)
        usual = Judgment(expected, verdict, why, footprint)
        if verdict not in (Verdict.TIGHT, Verdict.TOO_BIG) or not footprint.gpus:
            return usual
        other = footprint.with_expandable_segments
        better = replace(expected, tiers=estimate.memory(other, self.machine))
        if self.verdict(case, placement, better, other)[0] is not Verdict.FITS:
            return usual
        if is_windows(self.machine):
            return usual._replace(why=f"{why} {_NOT_ON_WINDOWS}")
        return Judgment(better, Verdict.FITS, self.needs_expandable(case, expected), other)

    def needs_expandable(self, case: Case, usual: Estimate) -> str:
        """Say which tier is too small, or nearly, for torch's usual segments, of a case that fits with expandable ones."""
        name, tier = next(
            (name, tier)
            for name, tier in pooled(usual.tiers, self.machine).items()
            if name != "disk" and self.is_short(name, tier, case, doubt=tier.needed_high_bytes - tier.needed_bytes)
        )
        needs = f"{format_gib(tier.needed_bytes)} GiB, up to {format_gib(tier.needed_high_bytes)} at worst"
        what = f"fits {self._memory(name)} with expandable segments, which the code turns on"
        return f"{what}: torch's usual ones need {needs}, {self._format_free(name, tier, case)}."

    def max_context(self, footprint: Footprint, case: Case) -> int | None:
        """Return the most tokens, prompt and answer together, with which a case still fits; at most what the model knows.

        None if it does not even fit with one token of prompt.
        """
        least, most = case.workload.new_tokens + 1, self.spec.context_length or _MOST_TOKENS
        if not self.holds(footprint, case, least):
            return None
        if self.holds(footprint, case, most):  # as it mostly does: no search
            return most
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.holds(footprint, case, middle) else (least, middle - 1)
        return least

    def holds(self, footprint: Footprint, case: Case, context: int) -> bool:
        """Say whether a case fits with `context` tokens, by the best estimate."""
        prompt = max(1, context - case.workload.new_tokens)
        longer = footprint.with_workload(replace(case.workload, prompt_tokens=prompt))
        if self.machine.shares_ram:
            tiers = pooled(estimate.memory(longer, self.machine), self.machine)
            return not any(self.is_short(name, tier, case) for name, tier in tiers.items() if name != "disk")
        names = [name for name in longer.taking_part if name != "disk"]
        return not any(self.is_short(name, estimate.memory_of(name, longer, self.machine), case) for name in names)

    def _memory(self, name: str) -> str:
        """Name a tier, and the GPUs that share it."""
        sharing = [gpu.name for gpu in self.machine.gpus if gpu.shared] if name == "cpu" else []
        return f"the memory that {' and '.join([*sharing, name])} share" if sharing else name

    def is_short(self, name: str, tier: TierEstimate, case: Case, doubt: int = 0) -> bool:
        """Say whether a tier has too little for a case that needs `doubt` bytes more than is likely."""
        capacity, usable = tier.capacity_bytes, self.usable_bytes(self.machine.tier(name), case)
        return (capacity is not None and tier.needed_bytes + doubt > capacity) or (
            usable is not None and tier.anon_bytes + doubt > usable
        )

    def usable_bytes(self, tier: Tier | None, case: Case) -> int | None:
        """Return the bytes of a tier that a case can make its own: of the RAM not those that a run's guard keeps free.

        Pages of files do not count against it: they can be dropped (`harness.measure.limits`).
        """
        if tier is None or tier.kind != "cpu" or tier.capacity_bytes is None or tier.total_bytes is None or not self.here:
            return tier.capacity_bytes if tier else None
        if case.ram_bytes is None:
            return tier.capacity_bytes - headroom.floor_of(min(tier.total_bytes, tier.limit_bytes or tier.total_bytes))
        free = tier.total_bytes if tier.free_bytes is None else tier.free_bytes
        return min(tier.capacity_bytes, free - headroom.floor_of(tier.total_bytes))

    def _format_free(self, name: str, tier: TierEstimate, case: Case) -> str:
        """Write how much of a tier is free, and how much of that a case cannot have."""
        capacity, usable = tier.capacity_bytes or 0, self.usable_bytes(self.machine.tier(name), case) or 0
        left = f", of which a run leaves {format_gib(capacity - usable)} to the machine" if usable < capacity else ""
        return f"free {format_gib(capacity)}{left}"

    def _unmapped(self) -> str | None:
        """Say which file is too large for this system to map, however little of it is needed at once."""
        most, largest = self.machine.mapping_bytes, self.spec.largest_file
        if most is None or largest is None or largest[1] <= most or self.spec.file_format not in MAPPED:
            return None
        what = (
            f"too big for cpu: {largest[0]} has {format_size(largest[1])}, and Linux maps no file larger than {format_size(most)}"
        )
        return f"{what} for torch here: add swap, set vm.overcommit_memory to 1, or take a copy in several files."


def misplaced(precision: Precision, placement: Placement, footprint: Footprint) -> tuple[list[str], str]:
    """Return the tiers on which weights would lie that must not be there in this precision, and why they must not."""
    spilled = [tier for tier in footprint.weights if tier == "disk" or (tier == "cpu" and footprint.gpus)]
    if "offloads_to_cpu" in precision.incompatible and not leaves_off_gpu(precision, placement):
        return spilled, precision.incompatible["offloads_to_cpu"]
    if "offloads" in precision.incompatible:
        return [tier for tier in spilled if tier == "disk"], precision.incompatible["offloads"]
    return [], ""


def pooled(tiers: Mapping[str, TierEstimate], machine: Machine) -> dict[str, TierEstimate]:
    """Add to the RAM what lies on GPUs that share it: one budget, and nothing on a GPU can be dropped from it."""
    sharing = [gpu.name for gpu in machine.gpus if gpu.shared and gpu.name in tiers]
    if not sharing or "cpu" not in tiers:
        return dict(tiers)
    total = tiers["cpu"]
    for name in sharing:
        one = tiers[name]
        total = replace(
            total,
            weights_bytes=total.weights_bytes + one.weights_bytes,
            kv_bytes=total.kv_bytes + one.kv_bytes,
            activation_bytes=total.activation_bytes + one.activation_bytes,
            overhead_bytes=total.overhead_bytes + one.overhead_bytes,
            anon_bytes=total.anon_bytes + one.needed_bytes,
            needed_bytes=total.needed_bytes + one.needed_bytes,
            needed_high_bytes=total.needed_high_bytes + one.needed_high_bytes,
        )
    return {**tiers, "cpu": total}


def needs_of_gpus(footprint: Footprint, machine: Machine) -> dict[str, TierEstimate]:
    """Return what a case needs of each GPU that takes part: of one that shares the RAM, what both have as one budget."""
    if machine.shares_ram:
        needs = pooled(estimate.memory(footprint, machine), machine)
        return {gpu.name: needs["cpu" if gpu.shared else gpu.name] for gpu in machine.gpus if gpu.name in needs}
    there = footprint.taking_part
    return {gpu.name: estimate.memory_of(gpu.name, footprint, machine) for gpu in machine.gpus if gpu.name in there}


def is_windows(machine: Machine) -> bool:
    """Say whether torch there lacks expandable segments."""
    return (machine.system or "").startswith("Windows")


def leaves_off_gpu(precision: Precision, placement: Placement) -> bool:
    """Say whether what lies off the GPUs is not quantized."""
    return precision.off_gpu is not None and placement.splits_devices


def short_of_disk(expected: Estimate | None, free_bytes: int | None) -> str | None:
    """Say why the weights that loading writes into the offload folder do not fit there; None if they do."""
    tier = expected.tiers.get("disk") if expected else None
    if tier is None or free_bytes is None or tier.needed_bytes <= free_bytes:
        return None
    needed, free = format_gib(tier.needed_bytes), format_gib(free_bytes)
    return f"too big for disk: the offload folder needs {needed} GiB, free {free}; set TMPDIR to a directory on a larger disk."


def _format_need(tier: TierEstimate) -> str:
    """Write what a tier needs and of what: "16.1 GiB (weights 14.9, KV 0.7, overhead 0.5)", and what loading alone adds."""
    terms = {
        "weights": tier.weights_bytes,
        "KV": tier.kv_bytes,
        "activations": tier.activation_bytes,
        "overhead": tier.overhead_bytes,
    }
    terms["more while loading"] = tier.needed_bytes - sum(terms.values())
    listed = ", ".join(f"{name} {format_gib(size)}" for name, size in terms.items() if size * 100 > tier.needed_bytes)
    return f"{format_gib(tier.needed_bytes)} GiB ({listed})"


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun as it is spoken: an MXFP4 checkpoint."""
    return f"{'an' if noun[0] in 'AEIOM' else 'a'} {noun}"
