"""What products that are timed without a model say: which precision is faster here, and how much of a token starting takes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from harness.architecture.model_spec import read_spec
from harness.catalog.resolve import resolve
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Machine, Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.machine.products import ROWS, STACKS, ProductTime
from harness.planning.calibrating import fit
from harness.planning.calibrating.kernel_times import TIMED, told_by_products
from harness.planning.calibration import Calibration, default
from harness.planning.planner import Planner

_BARE = profile([], ram=64 * GIB)
HERE = replace(_BARE, avx512_bf16=True, tiers=tuple(replace(tier, bytes_per_s=30e9) for tier in _BARE.tiers))
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5625}


def products(start_s: float, bytes_per_s: Mapping[str, float], flops: float = 100e9) -> list[ProductTime]:
    """Times of a processor that starts a Linear in so many seconds, and reads each precision as fast as is said."""
    found = []
    for precision, speed in bytes_per_s.items():
        for width, layers in STACKS:
            held = int(BYTES[precision] * width * width * layers)
            token = layers * start_s + held / speed
            one = ProductTime(precision=precision, done="product", width=width, layers=layers, held_bytes=held, seconds=token)
            found.append(one)
        more = 2 * found[-1].elements * ROWS / flops
        found.append(replace(found[-1], rows=ROWS, seconds=found[-1].seconds + more))
    return found


def calibrated(times: list[ProductTime], machine: Machine = HERE) -> Calibration:
    return fit.fit_constants(default(), told_by_products(times, machine)).calibration


def tokens(precision: str, constants: Calibration, model: str = "qwen2.5-1.5b-instruct") -> tuple[float, float]:
    """Return the tokens/s that are planned, and how wide their interval is."""
    spec = read_spec(resolve(model))
    case = Case(model=spec.name, precision=precision, placement="cpu", workload=Workload())
    estimate = Planner(spec, HERE, here=False, constants=constants).plan(case).estimate
    assert estimate is not None
    return estimate.decode_tok_s.best, estimate.decode_tok_s.high / estimate.decode_tok_s.low


@pytest.mark.parametrize("faster", ["bf16", "fp16"])
def test_the_precision_that_is_faster_here_is_planned_to_be(faster: str) -> None:
    """Seen on a Zen 4: oneDNN turns the weights of each product in bfloat16, and float16 is read twice as fast."""
    speeds = {"bf16": 12e9, "fp16": 12e9} | {faster: 25e9}
    constants = calibrated(products(120e-6, speeds))
    (slower,) = speeds.keys() - {faster}
    assert tokens(faster, constants)[0] > 1.4 * tokens(slower, constants)[0]


def test_a_calibrated_processor_earns_a_narrow_interval() -> None:
    constants = calibrated(products(120e-6, {"bf16": 13e9}))
    assert tokens("bf16", constants)[1] < 0.7 * tokens("bf16", default())[1]


@pytest.mark.parametrize("start_s", [60e-6, 300e-6])
@pytest.mark.parametrize("speed", [8e9, 20e9])
def test_starting_and_reading_are_told_apart(start_s: float, speed: float) -> None:
    """What no constant was fitted to, a stack of another width, is predicted as it would be timed."""
    found = fit.fit_constants(default(), told_by_products(products(start_s, {"bf16": speed}), HERE))
    assert [group.figure for group in found.groups] == ["product_s"] * (len(STACKS) + 1)
    assert all(0.75 < ratio < 1.33 for ratio in found.after)


def test_what_was_timed_beside_others_counts_less() -> None:
    quiet = products(120e-6, {"bf16": 13e9})
    busy = [replace(one, seconds=3 * one.seconds, disturbed=True) for one in quiet]
    moved = [calibrated(times)["ram_bandwidth_share_bfloat16"].best for times in (quiet, busy)]
    sure = calibrated([replace(one, disturbed=False) for one in busy])["ram_bandwidth_share_bfloat16"].best
    assert sure < moved[1] < moved[0]


@pytest.mark.parametrize("done", ["quantize", "pack", "cast", "turned"])
def test_what_else_was_timed_is_a_figure_of_its_own(done: str) -> None:
    precision = {"quantize": "int4", "pack": "int4", "cast": "bf16", "turned": "fp16"}[done]
    (width, layers), held = STACKS[0], 32 << 20
    one = ProductTime(precision=precision, done=done, width=width, layers=layers, held_bytes=held, seconds=1.0)
    whole = next(iter(told_by_products([replace(one, seconds=s) for s in (0.01, 0.1, 1.0)], HERE))).makeup.whole
    (told,) = told_by_products([replace(one, seconds=whole)], HERE)
    assert told.figure == f"{done}_s"
    names = {
        "quantize": "quantise_elements_per_s_cpu_int4",
        "pack": "first_pass_elements_per_s_cpu_int4",
        "cast": "cast_bytes_per_s",
        "turned": "cpu_turned_flops_share_float16",
    }
    assert names[done] in told.makeup.parts


def test_every_precision_that_is_timed_is_one_that_works_in_ram() -> None:
    assert set(TIMED) <= PRECISIONS.keys()
    assert BYTES.keys() == set(TIMED)
