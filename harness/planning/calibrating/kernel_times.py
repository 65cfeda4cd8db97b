"""What timed products (`machine.products`) say of the constants: each is a figure of a model that has nothing but these weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec

import msgspec
from msgspec.structs import replace

from harness.architecture.ask_worker import ask_worker
from harness.core.precisions import PRECISIONS
from harness.core.records import Machine, Workload
from harness.machine.products import ProductTime
from harness.planning import calibration
from harness.planning.calibrating.evidence import Observation
from harness.planning.calibration import Calibration
from harness.planning.cost.kernel_launches import RMS_NORM, Operations
from harness.planning.cost.makeup import slopes
from harness.planning.cost.memory import WeightFormat
from harness.planning.cost.rates import Rates
from harness.planning.cost.speed import Timing
from harness.planning.cost.work import TokenWork, constants_like, multiplies_4bit_in_ram

MOST_S = 60.0  # torch's import with them
TIMED = ("bf16", "fp16", "fp32", "int8", "int4")  # precisions: first those whose weights need no quantizing, which takes longest
_WORKLOAD = Workload(prompt_tokens=1, new_tokens=1)


def time_products(machine: Machine) -> list[Observation]:
    """Time products of one row and of many in every precision that is installed; no model is needed.

    Raises:
        UsageError: they took longer than a minute, or torch is not there.
    """
    asked = [name for name in TIMED if all(find_spec(package) for package in PRECISIONS[name].needs)]
    answer = ask_worker("products", {"precisions": asked}, "products were not timed", MOST_S)
    return told_by_products(msgspec.json.decode(answer, type=list[ProductTime]), machine)


def told_by_products(times: Iterable[ProductTime], machine: Machine) -> list[Observation]:
    """Return what the times say, beside what the constants of the package make of them."""
    base = calibration.default()
    found = []
    for one in times:
        work, figure = _work(one, machine), f"{one.done}_s"
        told = slopes(_seconds(one, work, machine, figure), base, base.constants)[figure]
        case = f"{one.precision} {one.done} {one.width}x{one.layers}, {one.rows} rows"
        found.append(
            Observation(
                result=f"timed {case}", case=case, figure=figure, measured=one.seconds, makeup=told, disturbed=one.disturbed
            )
        )
    return [one for one in found if one.is_plausible]


def _seconds(one: ProductTime, work: TokenWork, machine: Machine, figure: str) -> Callable[[Calibration], dict[str, float]]:
    """Return what says how long it takes by given constants."""

    def told(constants: Calibration) -> dict[str, float]:
        timing = Timing(work, _WORKLOAD, Rates(work, machine, constants, "best"))
        phases = timing.load_phases()
        seconds: dict[str, Callable[[], float]] = {
            "product": lambda: timing.product(one.rows),
            "turned": lambda: timing.product(one.rows),
            "pack": timing.packed_anew,
            "quantize": lambda: phases["quantize"],
            "cast": lambda: phases["cast"],
        }
        return {figure: seconds[one.done]()}

    return told


def _work(one: ProductTime, machine: Machine) -> TokenWork:
    """Return what a token does that passes a norm and a Linear in turn, in RAM."""
    precision = PRECISIONS[one.precision]
    fmt = WeightFormat(dtype=precision.dtype, quantizer=precision.scheme)
    like, elements = constants_like(fmt), one.elements
    unpacks = multiplies_4bit_in_ram(fmt) and machine.fuses_4bit is False
    plain = one.done in ("turned", "cast")
    work = TokenWork(
        device="cpu",
        precision=one.precision,
        like=None if plain else f"{like}_unpacked" if unpacks else like,
        dtype=fmt.dtype,
        read={"cpu": float(one.held_bytes)},
        mapped=0.0,
        operations=Operations(linears=one.layers, quantizable=one.layers if like else 0, experts=0, others=RMS_NORM * one.layers),
        parameters=elements,
        width=one.width,
        tensors=0,
        checkpoint_bytes=0,
        unpacked=0,
        vocabulary=0,
        copied_bytes=one.held_bytes if one.done == "cast" else 0,
        written=0,
        quantized=elements if like and not plain else 0,
        to_gpu_bytes=0,
        anew=elements if unpacks and not plain else 0,
        turned=elements if one.done == "turned" else 0,
    )
    bare = replace(work.operations, others=0.0)
    return replace(work, operations=bare) if one.done == "turned" else work
