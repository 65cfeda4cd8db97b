"""What timed products by packed layers say of the constants: each is a figure of a model that has nothing but one such layer.

Only of those that are for such layers alone. Of what they share with others a layer says little: it lies in the cache, and there is
nothing beside it, so that forecasts of models were worse by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import msgspec

from harness.architecture.ask_worker import ask_worker
from harness.core.quantizers import UNPACKINGS, ProductTime
from harness.core.records import Machine, Workload
from harness.planning import calibration
from harness.planning.calibrating.evidence import Observation
from harness.planning.calibration import Calibration
from harness.planning.cost.kernel_launches import Operations
from harness.planning.cost.makeup import slopes
from harness.planning.cost.rates import Rates, computing
from harness.planning.cost.speed import Timing
from harness.planning.cost.work import TokenWork

_LIMIT_S = 60.0  # torch's import with them
LAYER_SHAPES = ((2048, 5632), (2048, 2048))  # inputs and outputs
FIGURE = "product_s"
_DTYPE = "float16"


def time_packed(machine: Machine) -> list[Observation]:
    """Time one token and a prompt by every kind of packed layer that comes with this package, in a process of its own.

    Raises:
        UsageError: they took longer than a minute, or torch is not there.
    """
    asked = {"precisions": list(UNPACKINGS), "shapes": LAYER_SHAPES}
    answer = ask_worker("products", asked, "packed layers were not timed", _LIMIT_S)
    return told_by_products(msgspec.json.decode(answer, type=list[ProductTime]), machine)


def told_by_products(times: Iterable[ProductTime], machine: Machine) -> list[Observation]:
    """Return what the times say, beside what the constants of the package make of them."""
    base, found = calibration.default(), []
    for one in times:
        own = [name for name in base.constants if name.endswith(f"_{UNPACKINGS[one.precision].like}")]
        makeup = slopes(partial(_figures, one, machine), base, own)[FIGURE]
        case = f"{one.precision} layer of {one.elements:,}, {one.rows} tokens"
        found.append(
            Observation(
                result=f"timed {case}", case=case, figure=FIGURE, measured=one.seconds, makeup=makeup, disturbed=one.disturbed
            )
        )
    return [one for one in found if one.is_plausible]


def _figures(one: ProductTime, machine: Machine, constants: Calibration) -> dict[str, float]:
    work = _work(one)
    timing = Timing(work, Workload(prompt_tokens=1, new_tokens=1), Rates(computing(work, machine), machine, constants, "best"))
    return {FIGURE: timing.product(one.rows)}


def _work(one: ProductTime) -> TokenWork:
    """Return what a token does that passes one layer in RAM and nothing else."""
    return TokenWork(
        device="cpu",
        precision=one.precision,
        like=UNPACKINGS[one.precision].like,
        dtype=_DTYPE,
        read={"cpu": float(one.held_bytes)},
        mapped=0.0,
        operations=Operations(linears=1, quantizable=1, experts=0, others=0),
        parameters=one.elements,
        tensors=0,
        checkpoint_bytes=0,
        unpacked=0,
        vocabulary=0,
        copied_bytes=0,
        written=0,
        quantized=0,
        to_gpu_bytes=0,
        anew=one.elements,
    )
