"""How the figures of an estimate are made up of the constants: their slopes, found by making each constant a little larger.

So nothing has to say a second time what the cost model computes, and a constant that decides nothing has no part: of the two that a
token on a GPU waits for, only the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from harness.core.records import Machine, Makeup
from harness.planning.calibration import Calibration
from harness.planning.cost.estimate import estimate
from harness.planning.cost.footprint import Footprint

_STEP = 0.01
# Less than this share of a figure is the rounding of bytes, and nothing to learn from.
_LEAST = 1e-3


def makeup(footprint: Footprint, precision: str, machine: Machine, base: Calibration, names: Iterable[str]) -> dict[str, Makeup]:
    """Return by figure what each of the constants `names` has a part in, with the constants of `base`."""
    return slopes(lambda constants: _figures(footprint, precision, machine, constants), base, names)


def slopes(figures: Callable[[Calibration], dict[str, float]], base: Calibration, names: Iterable[str]) -> dict[str, Makeup]:
    """Return by figure what each of the constants `names` has a part in; `figures` makes them of constants."""
    whole = figures(base)
    parts: dict[str, dict[str, float]] = {figure: {} for figure in whole}
    for name in names:
        larger = msgspec.structs.replace(base[name], best=base[name].best * (1 + _STEP))
        changed = msgspec.structs.replace(base, constants={**base.constants, name: larger})
        for figure, value in figures(changed).items():
            part = (value - whole[figure]) / _STEP
            if abs(part) > _LEAST * whole[figure]:
                parts[figure][name] = part if part > 0 else part * (1 + _STEP)  # a speed divides
    return {figure: Makeup(whole=value, parts=parts[figure]) for figure, value in whole.items()}


def _figures(footprint: Footprint, precision: str, machine: Machine, base: Calibration) -> dict[str, float]:
    """Return the figures that results measure; VRAM only where one GPU has all of it."""
    found = estimate(footprint.with_calibration(base), precision, machine)
    speed, ram = found.decode_tok_s.best, found.tiers.get("cpu")
    gpus = [tier for name, tier in found.tiers.items() if name.startswith("gpu")]
    figures = {
        "load_s": found.load_s.best,
        "first_token_s": found.first_token_s.best,
        "token_s": footprint.workload.batch / speed if speed else 0.0,
        "ram_anon_bytes": float(ram.anon_bytes) if ram else 0.0,
        "vram_allocated_bytes": float(gpus[0].allocated_bytes) if len(gpus) == 1 else 0.0,
        "vram_process_bytes": float(gpus[0].peak_bytes) if len(gpus) == 1 else 0.0,
    }
    return {name: value for name, value in figures.items() if value > 0}
