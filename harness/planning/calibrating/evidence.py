"""What results say of the constants of the cost model: a measured figure, and how the estimate of it was made up.

A result counts if it ran to its end and carries an estimate by the same constants. Not those under a limit on RAM, whose files are
read anew from the disk, nor those of several processes, which wait for one another, nor those whose weights lay elsewhere than was
estimated: seconds of a CPU say nothing of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from harness.core import metrics
from harness.core.records import Estimate, Loaded, Machine, Makeup, Outcome, Record, Result
from harness.planning.calibration import device_of


class Measure(NamedTuple):
    """A figure that results measure and plans estimate."""

    metric: str  #: where a result has what was measured; empty of what is timed without a model (`packed_times`)
    disturbed: str  #: the metric whose mark says that others disturbed it
    noise: float  #: by how much it differs between runs of one case, the standard deviation of its logarithm
    chance: float = 0.0  #: what is added to both before they are compared: so much is chance
    phase: str = ""  #: that says nothing where files came from the disk in it, if they were planned to come from the page cache


# The median token rather than the mean speed: another process that took the machine for a moment is no property of it. A load
# differs by some tenths of a second from run to run: one of a tenth must not make that of a large model ten times as long.
FIGURES = {
    "load_s": Measure("load_s", "load_s", 0.2, 0.3, "load"),
    "first_token_s": Measure("first_token_s", "first_token_s", 0.3, 0.05, "cold"),
    "token_s": Measure("token_p50_s", "decode_tok_s", 0.12),
    "product_s": Measure("", "", 0.12),
    "ram_anon_bytes": Measure("ram_anon_peak_bytes", "", 0.1),
    "vram_allocated_bytes": Measure("vram_peak_bytes", "", 0.01),
    "vram_process_bytes": Measure("vram_process_peak_bytes", "", 0.02),
}
# A ratio beyond this is another kind of trouble (a busy machine, swapping), not a property of the machine.
BOUND = 16.0
# Of the weights, what may come from the disk in a phase that is to tell how fast the rest of it is. Where files are mapped, page
# faults read some 100 MB a second and the page cache gives gigabytes: a hundredth is a fifth of the time. Seen: 8 % of the weights
# from the disk made a load of 0.4 s one of 1.0 s.
_MOST_FROM_DISK = 0.01


class Observation(Record, frozen=True, kw_only=True):
    """One figure of one result, beside what the constants of the package make of it."""

    result: str  #: tells results apart
    case: str  #: the same for what differs by chance alone
    figure: str  #: of FIGURES
    measured: float
    makeup: Makeup
    disturbed: bool = False

    @property
    def is_plausible(self) -> bool:
        """Whether what was measured and what was estimated are figures, and near enough to each other to say anything."""
        return self.measured > 0 and self.makeup.whole > 0 and 1 / BOUND < self.measured / self.makeup.whole < BOUND


def observations(results: Iterable[Result], digest: str, machine: Machine | None = None) -> list[Observation]:
    """Return what the results say that carry an estimate by the constants of `digest`: those of `machine` alone, if it is given."""
    found = []
    for result in results:
        if machine is None or is_same(result.machine, machine):
            found += list(_of_result(result, digest))
    return found


def is_same(one: Machine, other: Machine) -> bool:
    """Say whether two machines are one kind: processor, cores and cards; what is free may differ."""
    return machine_kind(one) == machine_kind(other)


def machine_kind(machine: Machine) -> str:
    """Name the kind of a machine by its processor, cores and cards."""
    return ", ".join(map(str, (machine.cpu, machine.cores, *(gpu.model for gpu in machine.gpus))))


def _of_result(result: Result, digest: str) -> Iterator[Observation]:
    expected = result.estimate
    if result.outcome is not Outcome.OK or expected is None or expected.constants != digest or result.case.ram_bytes is not None:
        return
    if result.loaded and (result.loaded.rank_bytes or _lay_elsewhere(result.loaded, expected)):
        return
    workload = result.case.workload
    case = f"{result.case.id} {workload.prompt_tokens}+{workload.new_tokens}x{workload.batch}"
    for name, makeup in expected.makeup.items():
        figure = FIGURES.get(name)
        measured = result.metrics.get(figure.metric) if figure else None
        if figure and measured:
            if figure.phase and _came_from_disk(result, figure.phase):
                continue
            disturbed = figure.disturbed in result.noisy
            who = f"{result.run} {result.case.id} {result.at}"
            one = Observation(result=who, case=case, figure=name, measured=measured, makeup=makeup, disturbed=disturbed)
            if one.is_plausible:
                yield one


def _came_from_disk(result: Result, phase: str) -> bool:
    """Say whether weights came from the disk in a phase: how fast that is says nothing of what is done then."""
    return (metrics.from_disk(result, {phase}) or 0) > _MOST_FROM_DISK * metrics.loaded_bytes(result) > 0


def _lay_elsewhere(loaded: Loaded, estimate: Estimate) -> bool:
    """Say whether other kinds of devices held weights than the estimate has them on."""
    planned = device_of({name: tier for name, tier in estimate.tiers.items() if tier.weights_bytes})
    return device_of({name: size for name, size in loaded.tier_bytes.items() if size}) != planned
