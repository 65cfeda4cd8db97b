"""What timed products by packed layers teach: the constants of such layers, and no others."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from harness.core.quantizers import UNPACKINGS, ProductTime
from harness.planning.calibrating.fit import Fit, fit_constants
from harness.planning.calibrating.packed_times import told_by_products
from harness.planning.calibration import default
from tests.support import builders

MACHINE = replace(builders.machine(), cores=2)
ELEMENTS = 2048 * 5632


def timed(precision: str, rows: int, seconds: float) -> ProductTime:
    return ProductTime(precision=precision, rows=rows, elements=ELEMENTS, held_bytes=ELEMENTS, seconds=seconds)


def planned(precision: str, rows: int) -> float:
    (one,) = told_by_products([timed(precision, rows, 0.02)], MACHINE)
    return one.makeup.whole


def fitted(precision: str, times: float) -> Fit:
    rows = [timed(precision, rows, times * planned(precision, rows)) for rows in (1, 64)]
    return fit_constants(default(), told_by_products(rows, MACHINE))


@pytest.mark.parametrize("precision", UNPACKINGS)
@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_a_slow_processor_unpacks_so_much_slower(precision: str, times: float) -> None:
    one, like = fitted(precision, times), UNPACKINGS[precision].like
    found, name = one.calibration, f"unpacked_elements_per_core_s_{like}"
    assert one.before == pytest.approx((times, times))
    assert one.after == pytest.approx((1.0, 1.0), abs=0.15)
    assert name in found.fitted
    assert found.fitted.keys() <= {name, f"cpu_flops_share_{like}", f"cpu_operations_per_linear_{like}"}
    assert found[name].high / found[name].low < default()[name].high / default()[name].low


@pytest.mark.parametrize("precision", UNPACKINGS)
def test_a_prompt_takes_longer_than_a_token(precision: str) -> None:
    assert (
        planned(precision, 64)
        > 1.5 * planned(precision, 1)
        > 1.4 * ELEMENTS / default()[f"unpacked_elements_per_core_s_{UNPACKINGS[precision].like}"].best / 2
    )


def test_what_cannot_be_a_time_of_it_says_nothing() -> None:
    assert not told_by_products([timed("gptq-int4", 1, 1e3)], MACHINE)
