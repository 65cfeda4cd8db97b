"""Constants of the cost model with their origin, and how results of this machine correct them.

What physics does not give stands in `data/calibration.toml`. `evidence` reads what results measured, `fit`
weighs them against the intervals of the package. It is one mechanism for results that lie in a directory and for
those that `fitmatrix calibrate` keeps (`kept_calibration`). What was estimated by other constants says nothing of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property, lru_cache
from zlib import crc32

import msgspec

from harness.core.records import Machine, Record
from harness.data import DATA

# Raised when what a case costs is computed in another way: evidence of the old way is void.
ARITHMETIC = 3
# Of 90 of 100 machines: 1.645 standard deviations to each side.
NINETY = 1.645
# Kernels that CUDA loads when they are first called come on top of a context that was measured empty.
_KERNELS_BYTES = 200e6


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


class Fitted(Record, frozen=True, kw_only=True):
    """What results made of a constant: `factor` times that of the package, from `results` results, `cases` of them different."""

    factor: float
    results: int
    cases: int


class Calibration(Record, frozen=True, kw_only=True, dict=True):
    """The constants, and which of them results of this machine corrected.

    `digest` tells the constants of the package, and the arithmetic that they are for, from others (`Estimate.constants`); a
    correction does not change it. `note` says in a sentence what was kept here or why it does not count.
    """

    constants: dict[str, Constant]
    digest: str
    fitted: dict[str, Fitted] = {}
    note: str | None = None

    def __getitem__(self, name: str) -> Constant:
        return self.constants[name]

    def __hash__(self) -> int:
        """Hash what speeds and sizes go by; what is made of these constants is kept by it."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.constants.values()))

    @cached_property
    def speeds(self) -> defaultdict[str, dict[tuple[str, ...], float]]:
        """The products of constants that were asked for, by the end of the seconds and their names: every case has the same."""
        return defaultdict(dict)


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
    """Return the constants with the context of this machine's cards, if it was measured. The digest stays: speeds do not ask it."""
    if not any(gpu.context_bytes for gpu in machine.gpus):
        return base
    return msgspec.structs.replace(base, constants={**base.constants, "gpu_context_bytes": gpu_context(machine)})


def _digest(constants: Mapping[str, Constant]) -> str:
    parts = [ARITHMETIC, *((name, constants[name].best) for name in sorted(constants))]
    return f"{crc32(repr(parts).encode()):08x}"


def device_of(tiers: Mapping[str, object]) -> str:
    """Name the kind of device that computes: "gpu" where any tier is one, and "spill" where weights lie beside it as well."""
    gpu = any(name.startswith("gpu") for name in tiers)
    spills = "disk" in tiers or (gpu and "cpu" in tiers)
    return ("gpu+spill" if spills else "gpu") if gpu else ("cpu+disk" if spills else "cpu")
