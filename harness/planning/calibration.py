"""Constants of the cost model with their origin, and how results of this machine correct them.

What physics does not give stands in `data/calibration.toml`. `correct` compares what earlier results measured with what was
estimated for them before any correction, by figure, kind of device and precision; the cost model multiplies by the median ratio.
What was estimated by other constants says nothing of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from zlib import crc32

import msgspec

from harness.core.records import Estimate, Loaded, Machine, Outcome, Record, Result
from harness.data import DATA

# Raised when the seconds of a case are computed in another way (`planning.cost.speed`): ratios found by the old way are void.
ARITHMETIC = 1
# A ratio beyond this is another kind of trouble (a busy machine, swapping), not a property of the machine.
BOUND = 16.0
# Less than this of what is left of a token beside its bytes says that the bandwidth was underrated, not the processor.
_FASTEST = 0.25
# Where less than this share of a token is left beside its bytes, the result says nothing about the rest.
_TELLING = 0.2
# A load differs by this much from run to run: one of a tenth of it must not make that of a large model ten times as long.
_CHANCE_S = 1.0
# Kernels that CUDA loads when they are first called come on top of a context that was measured empty.
_KERNELS_BYTES = 200e6
# What a corrected figure may still be off by, with one result and with many.
SPREAD_ONE, SPREAD_MANY = 1.35, 1.2

LOAD, FIRST_TOKEN, TOKEN = "load", "first_token", "token"
# The metric that says whether a figure was disturbed.
MEASURES: Mapping[str, str] = {LOAD: "load_s", FIRST_TOKEN: "first_token_s", TOKEN: "decode_tok_s"}


class Bytes(Record, frozen=True, kw_only=True):
    """An amount with its interval."""

    low: float = 0.0
    best: float = 0.0
    high: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(low=self.low + other.low, best=self.best + other.best, high=self.high + other.high)


class Constant(Record, frozen=True, kw_only=True):
    """A figure with its interval and where it comes from."""

    best: float
    low: float
    high: float
    origin: str

    def amount(self, factor: float = 1.0) -> Bytes:
        """Return the constant, times something, with its interval."""
        return Bytes(low=self.low * factor, best=self.best * factor, high=self.high * factor)


class Ratio(Record, frozen=True, kw_only=True):
    """Measured over estimated seconds: the median of `results`, and the interval that a corrected figure keeps.

    Of a load a second is added to both (`_CHANCE_S`).
    """

    best: float
    low: float
    high: float
    results: int


class Calibration(Record, frozen=True, kw_only=True):
    """The constants, and the ratios that this machine's results gave, by "figure/device/precision".

    `digest` tells these constants, and the arithmetic that they are for, from others (`Estimate.constants`).
    """

    constants: dict[str, Constant]
    digest: str
    ratios: dict[str, Ratio] = {}

    def __getitem__(self, name: str) -> Constant:
        return self.constants[name]

    def ratio(self, figure: str, device: str, precision: str) -> Ratio | None:
        """Return the correction of a figure; None if no result gives one."""
        return self.ratios.get(f"{figure}/{device}/{precision}")


@lru_cache(maxsize=1)
def default() -> Calibration:
    """Read the constants that come with the package."""
    text = (DATA / "calibration.toml").read_bytes()
    constants = msgspec.toml.decode(text, type=dict[str, Constant])
    return Calibration(constants=constants, digest=_digest(constants))


def gpu_context(machine: Machine) -> Constant:
    """Return what a CUDA context takes: as it was measured on the cards of this machine, else the constant."""
    measured = [gpu.context_bytes for gpu in machine.gpus if gpu.context_bytes]
    if not measured:
        return default()["gpu_context_bytes"]
    low, high = min(measured), max(measured) + _KERNELS_BYTES
    return Constant(best=max(measured), low=low, high=high, origin="measured: what a card of this machine had less free")


def with_context(base: Calibration, machine: Machine) -> Calibration:
    """Return the constants with the context of this machine's cards. The digest stays: speeds do not depend on it."""
    return msgspec.structs.replace(base, constants={**base.constants, "gpu_context_bytes": gpu_context(machine)})


def _digest(constants: Mapping[str, Constant]) -> str:
    parts = [ARITHMETIC, *((name, constants[name].best) for name in sorted(constants))]
    return f"{crc32(repr(parts).encode()):08x}"


def correct(results: Iterable[Result], machine: Machine | None = None, base: Calibration | None = None) -> Calibration:
    """Return the constants with the ratios that `results` show: those of `machine` alone, if it is given.

    Only cases that ran to their end and carry an estimate by the same constants count; not those under a limit on RAM, whose files
    are read anew from the disk, nor those of several processes, which wait for one another, nor those whose weights lay elsewhere
    than was estimated: seconds of a CPU say nothing of a GPU. Figures that something disturbed count
    only where there are no others. A correction that was already in an estimate is taken out again, so that it does not matter in
    which order results came.
    """
    base = base or default()
    found: dict[str, list[float]] = defaultdict(list)
    disturbed: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if (
            result.outcome is Outcome.OK
            and result.estimate
            and result.estimate.constants == base.digest
            and result.case.ram_bytes is None
            and not (result.loaded and (result.loaded.rank_bytes or _lay_elsewhere(result.loaded, result.estimate)))
            and (machine is None or _same(result.machine, machine))
        ):
            for key, ratio, noisy in _ratios(result, result.estimate):
                (disturbed if noisy else found)[key].append(ratio)
    return msgspec.structs.replace(base, ratios={key: _summary(values) for key, values in (disturbed | found).items()})


def device_of(tiers: Mapping[str, object]) -> str:
    """Name the kind of device that computes: "gpu" where any tier is one, and "spill" where weights lie beside it as well."""
    gpu = any(name.startswith("gpu") for name in tiers)
    spills = "disk" in tiers or (gpu and "cpu" in tiers)
    return ("gpu+spill" if spills else "gpu") if gpu else ("cpu+disk" if spills else "cpu")


def _same(one: Machine, other: Machine) -> bool:
    """Say whether two machines are one kind: processor, cores and cards; what is free may differ."""
    return (one.cpu, one.cores, [gpu.model for gpu in one.gpus]) == (other.cpu, other.cores, [gpu.model for gpu in other.gpus])


def _estimated_on(estimate: Estimate) -> str:
    return device_of({name: tier for name, tier in estimate.tiers.items() if tier.weights_bytes})


def _lay_elsewhere(loaded: Loaded, estimate: Estimate) -> bool:
    """Say whether other kinds of devices held weights than the estimate has them on."""
    return device_of({name: size for name, size in loaded.tier_bytes.items() if size}) != _estimated_on(estimate)


def _ratios(result: Result, estimate: Estimate) -> Iterable[tuple[str, float, bool]]:
    """Yield what a result shows: the key of a correction, its ratio, and whether what was measured was disturbed."""
    # The median token rather than the mean speed: another process that took the machine for a moment is no property of it.
    measured = {
        LOAD: result.metrics.get("load_s"),
        FIRST_TOKEN: result.metrics.get("first_token_s"),
        TOKEN: result.metrics.get("token_p50_s"),
    }
    estimated = {
        LOAD: estimate.load_s.best,
        FIRST_TOKEN: estimate.first_token_s.best,
        TOKEN: result.case.workload.batch / estimate.decode_tok_s.best if estimate.decode_tok_s.best else 0.0,
    }
    device = _estimated_on(estimate)
    for figure, seconds in measured.items():
        if seconds and estimated[figure]:
            fixed = estimate.fixed_token_s if figure == TOKEN else 0.0
            plain = (estimated[figure] - fixed) / estimate.corrections.get(figure, 1.0)
            if plain < _TELLING * (plain + fixed):
                continue
            least, chance = _FASTEST if fixed else 1 / BOUND, _CHANCE_S if figure == LOAD else 0.0
            ratio = min(max((seconds - fixed + chance) / (plain + chance), least), BOUND)
            yield f"{figure}/{device}/{result.case.precision}", ratio, MEASURES[figure] in result.noisy


def _summary(ratios: list[float]) -> Ratio:
    from statistics import median

    middle = median(ratios)
    spread = SPREAD_MANY if len(ratios) > 2 else SPREAD_ONE
    return Ratio(best=middle, low=min(*ratios, middle / spread), high=max(*ratios, middle * spread), results=len(ratios))
