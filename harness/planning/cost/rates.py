"""Speeds of a case on a machine, at one end of their intervals: tier to processor, disk, link, arithmetic."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

from harness.core.records import Machine, Tier
from harness.machine.described.processors import known_processor, usual_host
from harness.machine.gpus import card_of
from harness.planning.calibration import Calibration
from harness.planning.cost.work import TokenWork

PICKS = ("low", "best", "high")  # ends of an interval
# Slow speeds make the high end of the seconds.
_SPEED_AT = {"low": "high", "best": "best", "high": "low"}

_card = lru_cache(maxsize=64)(card_of)


class Computing(NamedTuple):
    """What tells the speeds of a case from those of others on the same machine."""

    gpu: str | None  #: the first that computes, None where the processor does
    like: str | None  #: names the constants of what is quantized
    dtype: str
    unpacks: bool  #: whether weights are unpacked for each token
    hands_over: bool  #: whether the processor multiplies with what lies in RAM beside a GPU


def computing(work: TokenWork, machine: Machine) -> Computing:
    """Return what the speeds of a case go by."""
    gpu = next((tier.name for tier in machine.gpus if tier.name in work.read), None)
    return Computing(gpu, work.like, work.dtype, work.anew > 0, work.handed_over > 0)


@lru_cache(maxsize=256)  # most cases of a model compute alike, and models do
def rates_of(alike: Computing, machine: Machine, calibration: Calibration) -> tuple[Rates, ...]:
    """Return the speeds of cases that compute alike, at each end of their intervals (PICKS)."""
    return tuple(Rates(alike, machine, calibration, pick) for pick in PICKS)


class Rates:
    """The speeds of cases that compute alike, at one end of their seconds (`pick`): slow ones make the high end."""

    def __init__(self, alike: Computing, machine: Machine, calibration: Calibration, pick: str) -> None:
        self.alike, self.machine, self.calibration, self.pick = alike, machine, calibration, pick
        self._constants, self._speeds = calibration.constants, calibration.speeds[pick]
        self.gpu = machine.tier(alike.gpu) if alike.gpu else None

    def path(self, tier: str) -> float:
        """Return the bytes per second from a tier to what computes: no faster than the tiers that they pass on the way."""
        if tier == "disk":
            return min(self.known(self.machine.tier("disk"), "disk_bytes_per_s", "disk_fault_share"), self.ram_path)
        return self.ram_path if tier == "cpu" else self._vram(self.machine.tier(tier))

    @cached_property
    def ram_path(self) -> float:
        """Bytes per second from the RAM to what computes."""
        return min(self.link, self._vram(self.gpu)) if self.gpu and not self.alike.hands_over else self._ram()

    @cached_property
    def cached_path(self) -> float:
        """Bytes per second from files in the page cache to what computes."""
        return min(self.rate("page_cache_bytes_per_s"), self.ram_path)

    def _vram(self, gpu: Tier | None) -> float:
        return self.known(gpu, "gpu_bytes_per_s", "gpu_bandwidth_share" + ("_quantized" if self.alike.like else ""))

    def known(self, tier: Tier | None, constant: str, *shares: str) -> float:
        """Return the bandwidth of a tier, the constant if it was not measured, times the shares of it that are reached."""
        if tier is not None and tier.bytes_per_s:
            return tier.bytes_per_s * self.rate(*shares)
        return self.rate(constant, *shares)

    def _ram(self) -> float:
        # What is unpacked for each token takes the time that it takes to unpack, and the rest of the model is read as its dtype is.
        kind = self.alike.dtype if self.alike.unpacks else self.alike.like or self.alike.dtype
        return self.known(self.machine.tier("cpu"), "ram_bytes_per_s", f"ram_bandwidth_share_{kind}")

    @cached_property
    def disk(self) -> float:
        """Bytes per second that files are read with from the disk."""
        return self.known(self.machine.tier("disk"), "disk_bytes_per_s")

    def from_disk(self, size: int) -> float:
        """Return the seconds of reading files: none if they fit the page cache; at the high end they always come from the disk."""
        is_cached = self.pick == "low" or (self.pick == "best" and size * 2 < self.room)
        return 0.0 if is_cached else size / self.disk

    @cached_property
    def room(self) -> int:
        """Bytes of RAM that a case may use."""
        cpu = self.machine.tier("cpu")
        return (cpu.capacity_bytes if cpu else None) or 0

    @cached_property
    def kept_share(self) -> float:
        """The share of a page cache that is too small which it keeps from token to token: nothing if a limit makes it too small."""
        cpu = self.machine.tier("cpu")
        limited = cpu is not None and cpu.limit_bytes is not None and cpu.capacity_bytes == cpu.limit_bytes
        return 0.0 if limited else self.rate("page_cache_kept_share")

    @cached_property
    def link(self) -> float:
        """Bytes per second from the RAM to the GPU."""
        sheet = self.gpu.link_bytes_per_s if self.gpu else None
        return sheet * self.rate("link_share") if sheet else self.rate("link_bytes_per_s", "link_share")

    @cached_property
    def attention(self) -> float:
        """Bytes per second that a GPU attends to one token's keys and values with.

        One query keeps few of its cores busy, so the kernel is as fast on a card of twice the bandwidth; a slow card bounds it.
        """
        return min(self.rate("gpu_attention_bytes_per_s"), self.known(self.gpu, "gpu_bytes_per_s", "gpu_bandwidth_share"))

    @cached_property
    def start(self) -> float:
        """Seconds in which the host starts an operation."""
        return _start(self, self.pick)

    @cached_property
    def usual_start(self) -> float:
        """The same at the best end."""
        return _start(self, "best")

    @cached_property
    def flops(self) -> float:
        """Floating-point operations per second of what computes; a processor's kernels differ by what they multiply."""
        if self.gpu is None:
            return (self.machine.cores or 4) * self.rate("cpu_flops_per_core", f"cpu_flops_share_{self._multiplied()}")
        card = _card(self.gpu)
        sheet = card.fp16_flops if card else None
        if sheet is None:
            return self.known(self.gpu, "gpu_bytes_per_s", "gpu_flops_per_byte", "gpu_flops_share")
        return sheet * self.rate("gpu_flops_share")

    def _multiplied(self) -> str:
        """Name what is multiplied: a quantized form if its products were measured, else the dtype that it is unpacked to.

        Of bfloat16 whether the processor has instructions for it makes a factor of several.
        """
        like, dtype = self.alike.like, self.alike.dtype
        native = f"{dtype}_native" if dtype == "bfloat16" and self.machine.avx512_bf16 else dtype
        return like if like and f"cpu_flops_share_{like}" in self.calibration.constants else native

    @cached_property
    def turned_flops(self) -> float:
        """Floating-point operations per second of products with weights that lie inputs by outputs, on a processor."""
        name = f"cpu_turned_flops_share_{self.alike.dtype}"
        own = (name,) if name in self.calibration.constants else ()
        return (self.machine.cores or 4) * self.rate("cpu_flops_per_core", *own) if own else math.inf

    def cost(self, name: str, pick: str = "") -> float:
        """Return a constant of which more takes longer, at this end of the seconds or at another."""
        found: float = getattr(self._constants[name], pick or self.pick)
        return found

    def rate(self, *names: str) -> float:
        """Return a speed, the product of constants: the high end of the seconds is at its low end.

        They are independent of each other: that all are at their ends at once is rarer than that one is, so the logarithms of
        what they are off by add up in squares.
        """
        found = self._speeds.get(names)
        if found is None:
            constants, end = [self._constants[name] for name in names], _SPEED_AT[self.pick]
            if len(constants) == 1:
                found = float(getattr(constants[0], end))
            else:
                found = joined(math.prod(one.best for one in constants), *(getattr(one, end) / one.best for one in constants))
            self._speeds[names] = found
        return found


def _start(rates: Rates, pick: str) -> float:
    """Return the seconds of starting an operation: by what a core of the host does in a second, where that is known."""
    kind = "gpu" if rates.gpu else "cpu"
    host = known_processor(rates.machine.cpu)
    if host:
        return rates.cost(f"{kind}_clocks_per_operation", pick) / host.clocks_per_s
    usual = usual_host(rates.gpu.model) if rates.gpu and not rates.machine.cpu else None
    if usual:
        return rates.cost("gpu_clocks_per_operation_assumed", pick) / usual.clocks_per_s
    return rates.cost(f"{kind}_s_per_operation", pick)


def joined(best: float, *factors: float) -> float:
    """Return what independent factors that lie on one side of 1 make of `best`."""
    off = math.hypot(*map(math.log, factors))
    return best * math.exp(math.copysign(off, math.prod(factors) - 1))
