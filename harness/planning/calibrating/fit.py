"""Fit the constants of the cost model to what was measured, starting from what the package says of 90 of 100 machines.

Each constant has a factor, whose logarithm is normal beforehand, as wide as the interval of the constant. A figure is what no
constant accounts for and a part for each constant, which grows with it, or shrinks where it is a speed. The factors that explain
the figures best, given their noise and the intervals (maximum a posteriori), are found by Gauss and Newton's method; what the
figures leave open stays as the package has it. Figures far from what all others agree on lose their weight (Cauchy's).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from harness.core.records import Machine, Makeup, Record, Result
from harness.planning.calibrating.evidence import FIGURES, Observation, observations
from harness.planning.calibration import NINETY, Calibration, Constant, Fitted, default

# Intervals are what somebody thought likely. Half again as wide they still give way to what was measured.
_DOUBT = 1.5
# What a corrected constant may still be off by for another model, learned from one case and from many. Memory, which decides what
# fits, is corrected by many alone.
SPREAD_ONE, SPREAD_MANY, _MANY = 1.35, 1.2, 3
# A constant with a smaller part in a figure is not corrected by it: what the figure is off by may be anything, and a large model
# may wait for nothing else, as for the RAM where a small one waits for the processor.
_TELLING = 0.3
# A constant of whose uncertainty the figures leave more than this is not settled by them.
_UNSETTLED = 0.8
_ROUNDS, _STEP, _STILL = 40, 0.7, 1e-4
# Beyond this many standard deviations a figure begins to lose weight, and beyond this factor it contradicts the others.
_OUTLYING, CONTRADICTS = 2.5, 1.5
_DISTURBED = 4.0  # times the noise of a figure that nothing disturbed
# Settled anew in each process, or by the activations of one model: fitted, so that nothing else answers for them, and left.
_NOT_OF_THE_MACHINE = (
    "heap_",
    "page_cache_",
    "ram_resident_",
    "gpu_activation_",
    "cpu_activation_",
    "gpu_fragmentation_",
    "gpu_cached_",
)


class CaseFigure(Record, frozen=True, kw_only=True):
    """The median of what was measured of one figure of one case."""

    case: str
    figure: str
    measured: float
    makeup: Makeup
    results: int
    noise: float


class Fit(Record, frozen=True, kw_only=True):
    """The corrected constants, the figures that they were fitted to, and those that contradict the others."""

    calibration: Calibration
    groups: tuple[CaseFigure, ...]
    contradicting: tuple[CaseFigure, ...]
    before: tuple[float, ...]  #: measured over estimated, by group, with the constants of the package
    after: tuple[float, ...]  #: with the corrected ones


def fit_constants(base: Calibration, found: Iterable[Observation]) -> Fit:
    """Return the constants as the observations show them; those of `base` without any."""
    groups = _grouped(found)
    spreads = _spreads(base.constants, groups)
    factors, variances = _solve(groups, spreads)
    fitted, constants = {}, dict(base.constants)
    for name, spread in spreads.items():
        told = [group for group in groups if name in _telling(group)]
        results, cases = sum(group.results for group in told), len({group.case for group in told})
        is_settled = variances[name] < _UNSETTLED * spread**2 and cases >= (_MANY if name.endswith("_bytes") else 1)
        if is_settled and not name.startswith(_NOT_OF_THE_MACHINE):
            fitted[name] = Fitted(factor=math.exp(factors[name]), results=results, cases=cases)
            constants[name] = _corrected(base[name], fitted[name], variances[name])
    kept = {name: factors[name] for name in fitted}
    return Fit(
        calibration=msgspec.structs.replace(base, constants=constants, fitted=fitted),
        groups=groups,
        contradicting=tuple(group for group in groups if _contradicts(group, factors)),
        before=tuple(group.measured / group.makeup.whole for group in groups),
        after=tuple(group.measured / predicted(group.makeup, kept) for group in groups),
    )


def correct(results: Iterable[Result], machine: Machine | None = None) -> Calibration:
    """Return the constants of the package as `results` show them: those of `machine` alone, if it is given."""
    base = default()
    return fit_constants(base, observations(results, base.digest, machine)).calibration


def _contradicts(group: CaseFigure, factors: Mapping[str, float]) -> bool:
    return abs(_left(group, predicted(group.makeup, factors))) > max(math.log(CONTRADICTS), 3 * group.noise)


def _left(group: CaseFigure, whole: float) -> float:
    """Return the logarithm of what was measured over what is predicted, with what chance may add to either."""
    chance = FIGURES[group.figure].chance
    return math.log((group.measured + chance) / (whole + chance))


def predicted(makeup: Makeup, factors: Mapping[str, float]) -> float:
    """Return a figure with the constants times the exponentials of `factors`; never less than a twentieth of what it was."""
    more = sum(_grown(part, factors[name]) for name, part in makeup.parts.items() if name in factors)
    return max(makeup.whole + more, makeup.whole / 20)


def _grown(part: float, factor: float) -> float:
    """Return by how much a part grows; a negative one is that of a speed."""
    return abs(part) * math.expm1(factor if part > 0 else -factor)


def _grouped(found: Iterable[Observation]) -> tuple[CaseFigure, ...]:
    by_case: dict[tuple[str, str], dict[str, Observation]] = defaultdict(dict)
    for one in found:
        by_case[one.case, one.figure][one.result] = one
    return tuple(_median(list(each.values())) for each in by_case.values())


def _median(of_case: Sequence[Observation]) -> CaseFigure:
    """Put the runs of a case together; those that something disturbed count only where there are no others."""
    quiet = [one for one in of_case if not one.disturbed] or of_case
    quiet = sorted(quiet, key=lambda one: one.measured / one.makeup.whole)
    middle, figure = quiet[len(quiet) // 2], FIGURES[quiet[0].figure]
    noise = figure.noise * (_DISTURBED if quiet[0].disturbed else 1.0)
    return CaseFigure(
        case=middle.case,
        figure=middle.figure,
        measured=middle.measured,
        makeup=middle.makeup,
        results=len(quiet),
        noise=noise,
    )


def _spreads(constants: Mapping[str, Constant], groups: Iterable[CaseFigure]) -> dict[str, float]:
    """Return the standard deviations of the logarithms of the constants that have a part in a figure, as the package has them."""
    names = dict.fromkeys(name for group in groups for name in group.makeup.parts if name in constants)
    spreads = {}
    for name in names:
        one = constants[name]
        ends = [math.log(one.high / one.best), *([math.log(one.best / one.low)] if one.low > 0 else [])]
        spreads[name] = max(_DOUBT * sum(ends) / len(ends) / NINETY, 0.05)
    return spreads


def _solve(groups: Sequence[CaseFigure], spreads: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the logarithms of the factors, and their variances."""
    factors = dict.fromkeys(spreads, 0.0)
    order = list(spreads)
    inverse = [[spreads[one] ** 2 if one == other else 0.0 for other in order] for one in order]
    for _ in range(_ROUNDS if groups else 0):
        matrix, wanted = _normal_equations(groups, spreads, factors)
        inverse = _inverted(matrix)
        steps = [sum(row[at] * wanted[at] for at in range(len(order))) for row in inverse]
        for name, step in zip(order, steps, strict=True):
            factors[name] += min(max(step, -_STEP), _STEP)
        if max(map(abs, steps)) < _STILL:
            break
    return factors, {name: inverse[at][at] for at, name in enumerate(order)}


def _normal_equations(
    groups: Iterable[CaseFigure], spreads: Mapping[str, float], factors: Mapping[str, float]
) -> tuple[list[list[float]], list[float]]:
    at = {name: index for index, name in enumerate(spreads)}
    matrix = [[1 / spreads[one] ** 2 if one == other else 0.0 for other in spreads] for one in spreads]
    wanted = [-factors[name] / spreads[name] ** 2 for name in spreads]
    for group in groups:
        whole = predicted(group.makeup, factors)
        left = _left(group, whole)
        weight = 1 / group.noise**2 / (1 + (left / group.noise / _OUTLYING) ** 2)
        told = whole + FIGURES[group.figure].chance
        slopes = {name: _slope(part, factors[name]) / told for name, part in _telling(group).items() if name in at}
        for name, slope in slopes.items():
            wanted[at[name]] += weight * slope * left
            for other, its in slopes.items():
                matrix[at[name]][at[other]] += weight * slope * its
    return matrix, wanted


def _telling(group: CaseFigure) -> dict[str, float]:
    """Return the parts that are large enough for a figure to say anything of their constants, beside what chance adds to it."""
    share = 0.0 if group.figure.endswith("_bytes") else _TELLING  # weights are known to the byte, so that what is left is told
    least = share * (group.makeup.whole + FIGURES[group.figure].chance)
    return {name: part for name, part in group.makeup.parts.items() if abs(part) > least or name.startswith(_NOT_OF_THE_MACHINE)}


def _slope(part: float, factor: float) -> float:
    return part * math.exp(factor if part > 0 else -factor)


def _inverted(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Invert a symmetric positive matrix: elimination needs no exchange of rows."""
    size = len(matrix)
    rows = [[*row, *(1.0 if column == at else 0.0 for column in range(size))] for at, row in enumerate(matrix)]
    for at, row in enumerate(rows):
        pivot = row[at]
        rows[at] = row = [value / pivot for value in row]
        for other in range(size):
            times = rows[other][at]
            if other != at and times:
                rows[other] = [value - times * mine for value, mine in zip(rows[other], row, strict=True)]
    return [row[size:] for row in rows]


def _corrected(one: Constant, found: Fitted, variance: float) -> Constant:
    """Return a constant with its interval as the results leave it, no wider than it was."""
    best = one.best * found.factor
    spread = math.log(SPREAD_MANY if found.cases >= _MANY else SPREAD_ONE)
    open_still = math.exp(math.hypot(spread, NINETY * math.sqrt(variance)))
    low, high = max(best / open_still, one.low * found.factor), min(best * open_still, one.high * found.factor)
    plural = "" if found.results == 1 else "s"
    origin = f"measured: {found.results} result{plural} of this machine, {found.factor:.3g} times the {one.best:g} of the package"
    return Constant(best=best, low=min(low, best), high=max(high, best), origin=origin)
