"""Seconds of a case: to load, to the first token, per token. Every byte is charged with the path it takes to what computes.

A token takes max(operations x host cost, bytes / speed of their path) on a GPU, whose host runs ahead, and their sum on a
processor (`operations`: what the host starts, by module).
Weights beside the GPU need no special case: their path is the link, or the disk.
"""

from __future__ import annotations

import math
from functools import cached_property, partial

from harness.core.records import Machine, Record, Span, Workload
from harness.core.units import format_gib
from harness.planning.calibrating.evidence import FIGURES
from harness.planning.calibration import NINETY, Calibration
from harness.planning.cost.kernel_launches import LINEAR
from harness.planning.cost.rates import PICKS, Rates, computing, joined, rates_of
from harness.planning.cost.work import TokenWork

ON_DISK, IN_CACHE = "disk", "page_cache"  # where files are when a load begins


class LoadTime(Record, frozen=True, kw_only=True):
    """Seconds of loading: by what is done, and in all with the files in the page cache and not.

    `warm_s` is with the files in the page cache, None if it cannot keep them; `cold_s` is from the disk, and `read_s` its reading.
    """

    by_phase: dict[str, float]
    read_s: Span
    warm_s: Span | None
    cold_s: Span


class Seconds(Record, frozen=True, kw_only=True):
    """The fields of an Estimate that say how long."""

    load_s: Span
    first_token_s: Span
    decode_tok_s: Span
    ready_s: dict[str, Span]
    bound_by: str  #: what a token waits for most, in words


def timings_of(work: TokenWork, workload: Workload, machine: Machine, calibration: Calibration) -> list[Timing]:
    """Return how long what a case does takes, at each end of the intervals (PICKS)."""
    return [Timing(work, workload, rates) for rates in rates_of(computing(work, machine), machine, calibration)]


def seconds(timings: list[Timing]) -> Seconds:
    """Return load seconds, seconds to the first token, and tokens/s."""
    span = partial(_sum_span, is_measured=_is_measured(timings[0]))
    token = span("token_s", [timing.token() for timing in timings])
    files = (ON_DISK, IN_CACHE) if _keeps_files(timings) else (ON_DISK,)
    return Seconds(
        load_s=span("load_s", [timing.load() for timing in timings]),
        first_token_s=span("first_token_s", [timing.first_token() for timing in timings]),
        decode_tok_s=_span([timings[0].workload.batch / spent for spent in (token.high, token.best, token.low)]),
        ready_s={name: span("load_s", [timing.ready(name) for timing in timings]) for name in files},
        bound_by=timings[PICKS.index("best")].bound_by(),
    )


def load_time(timings: list[Timing]) -> LoadTime:
    """Return what the seconds of loading go to."""
    done = [timing.load_phases for timing in timings]
    once = [list(phases.values()) for phases in done]
    reading = [timing.reading() for timing in timings]
    span = partial(_sum_span, "load_s", is_measured=_is_measured(timings[0]))
    return LoadTime(
        by_phase={name: spent for name, spent in done[PICKS.index("best")].items() if spent},
        read_s=_span(reading),
        warm_s=span(once) if _keeps_files(timings) else None,
        cold_s=span([[*spent, read] for spent, read in zip(once, reading, strict=True)]),
    )


def _span(values: list[float]) -> Span:
    return Span(low=values[0], best=values[1], high=values[2])


def _sum_span(figure: str, ends: list[list[float]], *, is_measured: bool) -> Span:
    """Return the interval of a sum of parts, given at the low, best and high end of each.

    Of a machine that nobody has measured all parts may be off to one side, for a fast one is fast in all of them. What a measured
    one leaves open differs from constant to constant: that all are at their ends at once is rarer than that one is, so what they
    are off by adds up in squares, and with it what the figure differs by from run to run.
    """
    low, best, high = ends
    whole = sum(best)
    if not is_measured:
        return Span(low=sum(low), best=whole, high=sum(high))
    chance = math.exp(NINETY * FIGURES[figure].noise)
    down = math.hypot(*(middle - end for middle, end in zip(best, low, strict=True)))
    up = math.hypot(*(end - middle for middle, end in zip(best, high, strict=True)))
    return Span(low=joined(whole, 1 - down / whole, 1 / chance), best=whole, high=joined(whole, 1 + up / whole, chance))


def _keeps_files(timings: list[Timing]) -> bool:
    """Say whether the files of a model are still in the page cache after a load, for the next one."""
    best = timings[PICKS.index("best")]
    return best.work.checkpoint_bytes < best.cache_room


def _wanted(work: TokenWork) -> int:
    """Return the bytes that are read while loading; files that are only mapped are read by the first token."""
    return work.checkpoint_bytes if work.copied_bytes or work.quantized or work.to_gpu_bytes else work.written


def _is_measured(timing: Timing) -> bool:
    """Say whether results of this machine corrected a constant of what computes."""
    kinds = "gpu_" if timing.gpu else ("cpu_", "ram_bandwidth")
    return any(name.startswith(kinds) for name in timing.rates.calibration.fitted)


def _read(timing: Timing, *, first: bool) -> dict[str, float]:
    """Return the bytes that a token reads, by tier; before the `first` nothing was read.

    A page cache that is too small for all of it drops first what comes next, and keeps little.
    """
    read = dict(timing.work.read)
    if "disk" in read and not timing.stays_cached:
        mapped = min(timing.work.mapped, read.get("cpu", 0.0))
        anew = max(0.0, read["disk"] + mapped - (0.0 if first else timing.rates.kept_share * timing.cache_room))
        read |= {"disk": anew, "cpu": read.get("cpu", 0.0) + read["disk"] - anew}
    return read


class Timing:
    """The seconds of one case, at the end of the intervals that its rates stand for."""

    def __init__(self, work: TokenWork, workload: Workload, rates: Rates) -> None:
        self.work, self.workload, self.rates = work, workload, rates
        self.machine, self.gpu = rates.machine, rates.gpu
        self.suffix = f"_{work.like}" if work.like else ""
        self._turned_flops = rates.turned_flops if work.turned else math.inf
        self._host, self._moved = self._hosted(), self._brings(first=False)
        self._unpacking = self._unpacked_anew()
        # A GPU attends to what is cached; a processor reads that as fast as anything.
        self._attending = work.attended / rates.attention if self.gpu else 0.0

    @cached_property
    def cache_room(self) -> float:
        """Bytes that pages of files may take beside what is made in the RAM."""
        return max(0.0, self.rates.room - self.work.copied_bytes)

    @cached_property
    def stays_cached(self) -> bool:
        """Whether the pages of files that every token reads stay in RAM, beside what is made there; not at the high end."""
        wanted, pick = self.work.read["disk"] + self.work.mapped, self.rates.pick
        return pick != "high" and wanted < self.cache_room * (1.0 if pick == "low" else 0.9)

    def product(self, rows: int) -> float:
        """Return the seconds of so many rows passing what a token passes, without a look at what comes between."""
        return sum(self.token()) + (2.0 * self.work.parameters * rows / self.rates.flops if rows > 1 else 0.0)

    def _beside_products(self, rows: int) -> float:
        """Return the seconds of norms, activations and sums on so many rows; a GPU does that while the host starts others."""
        return 0.0 if self.gpu else self.work.operations.others * rows * self.work.width / self.rates.rate("cpu_elements_per_s")

    def load(self) -> list[float]:
        """Open every tensor, bring the bytes from the disk where they are wanted now, copy, quantize, send; in parts."""
        return [*self.load_phases.values(), self.rates.from_disk(_wanted(self.work))]

    def reading(self) -> float:
        """Return the seconds that the bytes wanted while loading take from the disk, where the page cache has none of them."""
        return _wanted(self.work) / self.rates.disk

    @cached_property
    def load_phases(self) -> dict[str, float]:
        """What loading takes beside reading files, by what is done."""
        work, on = self.work, "gpu" if self.gpu else f"cpu{self.suffix}"
        return {
            "start": self.rates.cost("load_s"),
            "open tensors": work.tensors * self.rates.cost("load_s_per_tensor"),
            "write to disk": self.rates.from_disk(work.written) / self.rates.rate("disk_write_share"),
            "cast": work.copied_bytes / self.rates.rate("cast_bytes_per_s"),
            "unpack": work.unpacked / self.rates.rate("gguf_elements_per_s"),
            "tokenizer": work.vocabulary * self.rates.cost("gguf_s_per_string"),
            "quantize": work.quantized / self.rates.rate(f"quantize_elements_per_s_{on}") if work.quantized else 0.0,
            "send to GPU": work.to_gpu_bytes / self.rates.link if self.gpu else 0.0,
        }

    def ready(self, files: str) -> list[float]:
        """Return the seconds until the first token is out, with all files on the disk or in the page cache; in parts."""
        unread, parts = self._unread(), [*self.load_phases.values(), *self._first_pass]
        if files == ON_DISK:
            return [*parts, self.reading(), unread / self.rates.disk]
        return [*parts, unread / self.rates.rate("page_cache_bytes_per_s")]

    def first_token(self) -> list[float]:
        """Compute the prompt, and one pass over the weights, whose pages come from the disk or from the page cache; in parts."""
        unread = self._unread()
        return [*self._first_pass, self.rates.from_disk(unread) or unread / self.rates.rate("page_cache_bytes_per_s")]

    @cached_property
    def _first_pass(self) -> list[float]:
        """Compute the prompt, and one pass over weights that are in reach; in parts."""
        tokens = self.workload.batch * self.workload.prompt_tokens
        flops = 2.0 * self.work.parameters * tokens + self.work.scored + self.work.seen
        turned = 2.0 * self.work.turned * (tokens - self.workload.batch)  # one row is that of `token`
        computed = [
            flops / self.rates.flops,
            turned / self._turned_flops,
            self._packed_anew(),
            self._beside_products(tokens),
        ]
        return [self.rates.cost("first_token_s"), *computed, *self.token(first=not self.work.written)]

    def _unread(self) -> int:
        """Return the bytes that are mapped and that no token has read yet, where `token` takes them for cached."""
        if self.gpu or self.work.copied_bytes or self.work.quantized:
            return 0
        return self.work.checkpoint_bytes if "disk" not in self.work.read or self.stays_cached else 0

    def _packed_anew(self) -> float:
        """Return the seconds that the first pass takes to pack weights for the processor, where a library does it then."""
        name = f"first_pass_elements_per_s_cpu{self.suffix}"
        is_measured = not self.gpu and name in self.rates.calibration.constants
        return self.work.quantized / self.rates.rate(name) if is_measured else 0.0

    def token(self, first: bool = False) -> list[float]:
        """Return the seconds of a token, in parts that follow one another; before the `first` nothing was read."""
        turned = 2.0 * self.work.turned * self.workload.batch / self._turned_flops
        spent = self._brings(first) if first and "disk" in self.work.read else self._moved
        moved = [*spent.values(), self._unpacking, self._attending, turned]
        return [max(self._host, sum(moved))] if self.gpu and not self.work.handed_over else [self._host, *moved]

    def bound_by(self) -> str:
        """Say what a token waits for: the host, where it is behind a GPU, else the longest of what is moved and unpacked."""
        host, moved, unpacking, attended = self._host, self._moved, self._unpacking, self._attending
        waits = self.gpu is not None and not self.work.handed_over  # or each takes its turn
        longest = max(*moved.values(), unpacking, attended)
        if host >= (sum(moved.values()) + unpacking + attended if waits else longest):
            started = f"{self._started():,.0f}"
            if waits:
                return f"starting {started} operations a token takes longer than the GPU computes"
            return f"starting {started} operations a token takes longest"
        if attended == longest:
            return f"attends to {self.workload.cached_tokens:,} tokens"
        if unpacking == longest:
            return f"unpacks {self.work.anew / 1e9:.3g} B weights for each token"
        slowest = max(moved, key=moved.__getitem__)
        size = format_gib(int(_read(self, first=False)[slowest]))
        if slowest == "disk":
            cached = self.stays_cached
            return f"reads {size} GiB a token through the page cache" if cached else f"reads {size} GiB a token from disk"
        if slowest == "cpu":
            brought = self.gpu and not self.work.handed_over
            return f"reads {size} GiB a token from RAM over the link" if brought else f"reads {size} GiB a token from RAM"
        return f"reads {size} GiB a token from GPU memory"

    def _unpacked_anew(self) -> float:
        """Return the seconds of unpacking every weight: a processor's cores compute it, the memory of a GPU is passed over."""
        if not self.work.anew:
            return 0.0
        if self.gpu is None:
            cores = self.machine.cores or 4
            return self.work.anew / (cores * self.rates.rate(f"unpacked_elements_per_core_s{self.suffix}"))
        passed = self.work.anew * self.rates.cost(f"gpu_unpacked_bytes_per_element{self.suffix}")
        return passed / self.rates.known(self.gpu, "gpu_bytes_per_s", "gpu_bandwidth_share")

    def _hosted(self) -> float:
        """Start what a token takes; a processor starts the products of all experts in turn, a GPU one kernel for them."""
        in_ram = self.work.operations.experts * self.work.experts_in_ram * self.rates.cost("cpu_s_per_operation")
        count, start = self._started("best"), self.rates.usual_start
        return joined(count * start, self._started() / count, self.rates.start / start) + in_ram

    def _started(self, pick: str = "") -> float:
        counted = self.work.operations
        quantized = counted.quantizable if self.suffix else 0.0
        device, kernel = ("gpu", self.work.stored or self.work.like) if self.gpu else ("cpu", self.work.like)
        each = self.rates.cost(f"{device}_operations_per_linear_{kernel}", pick) if quantized else 0.0
        each += self.work.starts if self.gpu else 0.0
        plain = LINEAR if self.gpu else self.rates.cost(f"cpu_operations_per_linear_{self.work.dtype}", pick)
        started = counted.others + plain * (counted.linears - quantized) + each * quantized
        return started + (0 if self.gpu else counted.experts) + self.work.handed_over

    def _brought(self) -> float:
        """Return the seconds of opening what lies on the disk, tensor by tensor, and of casting what is stored otherwise."""
        opened = self.work.brought * self.rates.cost("offload_s_per_tensor")
        return opened + self.work.cast / self.rates.rate("offload_cast_bytes_per_s")

    def _brings(self, first: bool) -> dict[str, float]:
        """Return the seconds by tier of bringing what a token reads."""
        read = _read(self, first=first)
        moved = {name: size / self.rates.path(name) if size else 0.0 for name, size in read.items()}
        if read.get("disk") and self.stays_cached:
            moved["disk"] = read["disk"] / self.rates.cached_path
        return moved | {"disk": moved["disk"] + self._brought()} if self.work.brought else moved
