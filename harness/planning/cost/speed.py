"""Seconds of a case: to load, to the first token, per token. Every byte is charged with the path it takes to what computes.

A token takes max(operations x host cost, bytes / speed of their path) on a GPU, whose host runs ahead, and their sum on a
processor (`operations`: what the host starts, by module).
Weights beside the GPU need no special case: their path is the link, or the disk.
"""

from __future__ import annotations

from functools import lru_cache

from harness.core.records import Machine, Record, Span, Tier, Workload
from harness.machine.gpus import Gpu, known_gpu
from harness.planning.calibration import FIRST_TOKEN, LOAD, TOKEN, Calibration
from harness.planning.cost.kernel_launches import LINEAR, Operations

PICKS = ("low", "best", "high")
# Slow speeds make the high end of the seconds.
_SPEED_AT = {"low": "high", "best": "best", "high": "low"}


class TokenWork(Record, frozen=True, kw_only=True):
    """What a case does, counted.

    `read` are the bytes by tier that one token reads, of those in the RAM `mapped` pages of files. `like` names the constants of
    what is quantized. `parameters` are those that a token is multiplied with. While loading `copied_bytes` are made anew in the
    RAM, `written` into the offload folder, and `quantized` weights quantized; `checkpoint_bytes` come from the disk. Of a GGUF
    `unpacked` weights are made from its blocks and `vocabulary` strings of its metadata read one by one. `anew` are the weights
    that are unpacked for each token.
    """

    device: str
    precision: str
    like: str | None
    dtype: str
    read: dict[str, float]
    mapped: float
    operations: Operations
    parameters: int
    tensors: int
    checkpoint_bytes: int
    unpacked: int
    vocabulary: int
    copied_bytes: int
    written: int
    quantized: int
    to_gpu_bytes: int
    anew: int


class Seconds(Record, frozen=True, kw_only=True):
    """The fields of an Estimate that say how long."""

    load_s: Span
    first_token_s: Span
    decode_tok_s: Span
    corrections: dict[str, float]
    fixed_token_s: float


def seconds(effort: TokenWork, load: Workload, machine: Machine, calibration: Calibration) -> Seconds:
    """Return load seconds, seconds to the first token, tokens/s, and what of them results of this machine corrected.

    The correction of a token is one of the processor, not of the memory: a small model that calibrates spends its time between
    the Linears, and would make a large one, which waits for its weights, too fast or too slow.
    """
    clock = _Timing(effort, load, machine, calibration)
    fixed = {TOKEN: clock.fixed()}
    spans = {
        LOAD: [clock.load(pick) for pick in PICKS],
        FIRST_TOKEN: [clock.first_token(pick) for pick in PICKS],
        TOKEN: [clock.token(pick) for pick in PICKS],
    }
    corrections = {}
    for figure, values in spans.items():
        ratio = calibration.ratio(figure, effort.device, effort.precision)
        if ratio is not None:
            kept = fixed.get(figure, 0.0)
            best = kept + (values[1] - kept) * ratio.best
            spans[figure] = [best * ratio.low / ratio.best, best, best * ratio.high / ratio.best]
            corrections[figure] = ratio.best
    return Seconds(
        load_s=_span(spans[LOAD]),
        first_token_s=_span(spans[FIRST_TOKEN]),
        decode_tok_s=_span([load.batch / value for value in reversed(spans[TOKEN])]),
        corrections=corrections,
        fixed_token_s=fixed[TOKEN],
    )


def _span(values: list[float]) -> Span:
    return Span(low=values[0], best=values[1], high=values[2])


@lru_cache(maxsize=64)
def _look_up(model: str, total_bytes: int | None) -> Gpu | None:
    return known_gpu(model, total_bytes)


def _card(tier: Tier | None) -> Gpu | None:
    return _look_up(tier.model, tier.total_bytes) if tier is not None and tier.model else None


class _Timing:
    """One case's arithmetic at the low, best or high end: slow constants make the high end of seconds."""

    def __init__(self, effort: TokenWork, load: Workload, machine: Machine, calibration: Calibration) -> None:
        self.effort, self.work, self.machine, self.calibration = effort, load, machine, calibration
        self.gpu = next((tier for tier in machine.gpus if tier.name in effort.read), None)
        self.suffix = f"_{effort.like}" if effort.like else ""

    def load(self, pick: str) -> float:
        """Open every tensor, bring the bytes from the disk where they are wanted now, copy, quantize, send."""
        effort, on = self.effort, "gpu" if self.gpu else f"cpu{self.suffix}"
        wanted = effort.checkpoint_bytes if effort.copied_bytes or effort.quantized or effort.to_gpu_bytes else effort.written
        return (
            self._cost("load_s", pick)
            + effort.tensors * self._cost("load_s_per_tensor", pick)
            + self._from_disk(wanted, pick)
            + self._from_disk(effort.written, pick) / self._rate("disk_write_share", pick)
            + effort.copied_bytes / self._rate("cast_bytes_per_s", pick)
            + effort.unpacked / self._rate("gguf_elements_per_s", pick)
            + effort.vocabulary * self._cost("gguf_s_per_string", pick)
            + (effort.quantized / self._rate(f"quantise_elements_per_s_{on}", pick) if effort.quantized else 0.0)
            + (effort.to_gpu_bytes / self._link(pick) if self.gpu else 0.0)
        )

    def first_token(self, pick: str) -> float:
        """Bring what is still on the disk, compute the prompt, and one pass over the weights."""
        tokens = self.work.batch * self.work.prompt_tokens
        flops = 2.0 * self.effort.parameters * tokens
        computed = self._cost("first_token_s", pick) + flops / self._flops(pick) + self._packed_anew(pick)
        return computed + self.token(pick, first=not self.effort.written) + self._from_disk(self._unread(pick), pick)

    def _unread(self, pick: str) -> int:
        """Return the bytes that are mapped and that no token has read yet, where `token` takes them for cached."""
        if self.gpu or self.effort.copied_bytes or self.effort.quantized:
            return 0
        return self.effort.checkpoint_bytes if "disk" not in self.effort.read or self._stays_cached(pick) else 0

    def _packed_anew(self, pick: str) -> float:
        """Return the seconds that the first pass takes to pack weights for the processor, where a library does it then."""
        name = f"first_pass_elements_per_s_cpu{self.suffix}"
        is_measured = not self.gpu and name in self.calibration.constants
        return self.effort.quantized / self._rate(name, pick) if is_measured else 0.0

    def token(self, pick: str, first: bool = False) -> float:
        """Return the seconds of a token; before the `first` nothing was read."""
        host, moved = self._host(pick), self._moved(pick, first) + self._unpacked_anew(pick)
        return max(host, moved) if self.gpu else host + moved

    def _unpacked_anew(self, pick: str) -> float:
        """Return the seconds of unpacking every weight: a processor's cores compute it, the memory of a GPU is passed over."""
        if not self.effort.anew:
            return 0.0
        if self.gpu is None:
            cores = self.machine.cores or 4
            return self.effort.anew / (cores * self._rate(f"unpacked_elements_per_core_s{self.suffix}", pick))
        passed = self.effort.anew * self._cost(f"gpu_unpacked_bytes_per_element{self.suffix}", pick)
        speed = self._known(self.gpu, "gpu_bytes_per_s", pick) * self._rate("gpu_bandwidth_share", pick)
        return passed / speed

    def _host(self, pick: str) -> float:
        """Start what a token takes; a processor starts the products of all experts in turn, a GPU one kernel for them."""
        kind, counted = "gpu" if self.gpu else "cpu", self.effort.operations
        quantized = counted.quantizable if self.suffix else 0.0
        each = self._cost(f"{kind}_operations_per_linear{self.suffix}", pick) if quantized else 0.0
        started = counted.others + LINEAR * (counted.linears - quantized) + each * quantized
        return (started + (0 if self.gpu else counted.experts)) * self._cost(f"{kind}_s_per_operation", pick)

    def fixed(self) -> float:
        """Return what of a token's seconds is settled: reading the RAM at a measured bandwidth."""
        cpu = self.machine.tier("cpu")
        is_measured = cpu is not None and cpu.bytes_per_s and self.effort.read.keys() == {"cpu"}
        return self._moved("best") if is_measured and not self.gpu else 0.0

    def _moved(self, pick: str, first: bool = False) -> float:
        """Bring what a token reads. A page cache that does not hold all of it drops first what comes next, and keeps little."""
        read = dict(self.effort.read)
        if "disk" in read and not self._stays_cached(pick):
            mapped = min(self.effort.mapped, read.get("cpu", 0.0))
            anew = max(0.0, read["disk"] + mapped - (0.0 if first else self._kept(pick)))
            read |= {"disk": anew, "cpu": read.get("cpu", 0.0) + read["disk"] - anew}
        return sum(size / self._path(name, pick) for name, size in read.items() if size)

    def _kept(self, pick: str) -> float:
        """Return the bytes that a page cache which is too small keeps from token to token: where a limit makes it so, none."""
        cpu = self.machine.tier("cpu")
        limited = cpu is not None and cpu.limit_bytes is not None and cpu.capacity_bytes == cpu.limit_bytes
        return 0.0 if limited else self._rate("page_cache_kept_share", pick) * self._cache_room()

    def _cache_room(self) -> float:
        """Return the bytes that pages of files may take beside what is made in the RAM."""
        return max(0.0, self._room() - self.effort.copied_bytes)

    def _path(self, tier: str, pick: str) -> float:
        """Return the bytes per second from a tier to what computes."""
        if tier == "disk":
            faults = self._disk(pick) * self._rate("disk_fault_share", pick)
            return self._rate("page_cache_bytes_per_s", pick) if self._stays_cached(pick) else faults
        if tier == "cpu":
            return self._link(pick) if self.gpu else self._ram(pick)
        found = self.machine.tier(tier)
        share = "gpu_bandwidth_share" + ("_quantised" if self.effort.like else "")
        return self._known(found, "gpu_bytes_per_s", pick) * self._rate(share, pick)

    def _known(self, tier: Tier | None, constant: str, pick: str) -> float:
        return tier.bytes_per_s if tier is not None and tier.bytes_per_s else self._rate(constant, pick)

    def _ram(self, pick: str) -> float:
        # What is unpacked for each token takes the time that it takes to unpack, and the rest of the model is read as its dtype is.
        kind = self.effort.dtype if self.effort.anew else self.effort.like or self.effort.dtype
        known = self._known(self.machine.tier("cpu"), "ram_bytes_per_s", pick)
        return known * self._rate(f"ram_bandwidth_share_{kind}", pick)

    def _disk(self, pick: str) -> float:
        return self._known(self.machine.tier("disk"), "disk_bytes_per_s", pick)

    def _from_disk(self, size: int, pick: str) -> float:
        """Charge reading files: from the page cache where they fit there, from the disk at the high end."""
        return 0.0 if self._is_cached(size, pick) else size / self._disk(pick)

    def _stays_cached(self, pick: str) -> bool:
        """Say whether the pages of files that every token reads stay in the RAM, beside what is made there; not at the high end."""
        wanted = self.effort.read["disk"] + self.effort.mapped
        return pick != "high" and wanted < self._cache_room() * (1.0 if pick == "low" else 0.9)

    def _is_cached(self, size: float, pick: str) -> bool:
        return pick == "low" or (pick == "best" and size * 2 < self._room())

    def _room(self) -> int:
        cpu = self.machine.tier("cpu")
        return (cpu.capacity_bytes if cpu else None) or 0

    def _link(self, pick: str) -> float:
        sheet = self.gpu.link_bytes_per_s if self.gpu else None
        return (sheet or self._rate("link_bytes_per_s", pick)) * self._rate("link_share", pick)

    def _flops(self, pick: str) -> float:
        if self.gpu is None:
            return (self.machine.cores or 4) * self._rate("cpu_flops_per_core", pick)
        card = _card(self.gpu)
        sheet = card.fp16_flops if card else None
        if sheet is None:
            sheet = self._known(self.gpu, "gpu_bytes_per_s", pick) * self._rate("gpu_flops_per_byte", pick)
        return sheet * self._rate("gpu_flops_share", pick)

    def _cost(self, name: str, pick: str) -> float:
        return float(getattr(self.calibration[name], pick))

    def _rate(self, name: str, pick: str) -> float:
        """Return a speed: the high end of the seconds is at its low end."""
        return float(getattr(self.calibration[name], _SPEED_AT[pick]))
