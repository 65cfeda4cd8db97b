"""Products that a worker times, for real, on small stacks."""

from __future__ import annotations

import pytest
import torch

from harness.core.precisions import PRECISIONS
from harness.machine.products import ROWS
from harness.worker.products import timing as products


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "STACKS", ((64, 2), (128, 2)))
    monkeypatch.setattr(products, "_TURNED", (64, 1))
    monkeypatch.setattr(products, "_PASSES", 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("precision", "done", "bytes_per_weight"),
    [
        ("fp32", {"cast", "product"}, 4.0),
        ("bf16", {"cast", "product"}, 2.0),
        ("fp16", {"cast", "turned", "product"}, 2.0),
        ("int8", {"quantize", "pack", "product"}, 1.0),
        ("int4", {"quantize", "pack", "product"}, 0.5),
    ],
)
def test_each_precision_is_timed(precision: str, done: set[str], bytes_per_weight: float) -> None:
    with torch.inference_mode():
        found = list(products.time_products_of([PRECISIONS[precision]]))
    assert {one.done for one in found} == done
    ways = [(one.width, one.rows) for one in found if one.done == "product"]
    assert ways == [(64, 1), (128, 1), (128, ROWS)]
    assert all(one.seconds > 0 for one in found if one.done != "pack")
    widest = next(one for one in found if one.done == "product" and one.width == 128)
    assert widest.held_bytes == pytest.approx(bytes_per_weight * widest.elements, rel=0.2)


@pytest.mark.usefixtures("small")
def test_once_the_time_is_over_what_is_left_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "STACKS_S", -1.0)
    with torch.inference_mode():
        assert not list(products.time_products_of([PRECISIONS["bf16"], PRECISIONS["fp32"]]))
