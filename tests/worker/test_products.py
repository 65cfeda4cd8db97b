"""The worker that times products by packed layers: for real, on small ones."""

from __future__ import annotations

import msgspec
import pytest
import torch
from msgspec.structs import replace

from harness.architecture.ask_worker import ask_worker
from harness.core.quantizers import UNPACKINGS, ProductTime
from harness.worker.products import timing


def test_every_row_has_a_layer_to_time() -> None:
    assert timing.LAYERS.keys() == UNPACKINGS.keys()


@pytest.mark.parametrize("precision", UNPACKINGS)
def test_a_layer_holds_what_its_bits_take(precision: str) -> None:
    layer = timing.random_layer(precision, 256, 64)
    held = sum(tensor.nbytes for tensor in layer.parameters())
    assert 256 * 64 * int(precision[-1]) / 8 <= held < 256 * 64 * int(precision[-1]) / 8 + 2048
    assert {tensor.dtype for tensor in layer.parameters() if tensor.dtype.is_floating_point} == {torch.float16}
    with torch.inference_mode():
        assert layer(torch.randn(1, 256).half()).isfinite().all()


def test_it_answers_for_a_token_and_for_a_prompt() -> None:
    answer = ask_worker("products", {"precisions": ["gptq-int4"], "shapes": [(256, 64)]}, "not timed", 120.0)
    found = msgspec.json.decode(answer, type=list[ProductTime])
    assert [(one.precision, one.rows, one.elements) for one in found] == [("gptq-int4", 1, 16384), ("gptq-int4", 64, 16384)]
    assert all(one.seconds > 0 for one in found)


def test_a_round_that_was_slow_for_all_counts_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the cores were away during the first round, as a hypervisor may have it."""
    asked = [*timing.products(["chatglm-int8"], [(256, 64)])]
    real, times = timing.Product.time, list[int]()

    def time(one: timing.Product) -> ProductTime:
        times.append(len(one.given))
        found = real(one)
        return replace(found, seconds=found.seconds + 10) if len(times) <= len(asked) else found

    monkeypatch.setattr(timing.Product, "time", time)
    with torch.inference_mode():
        found = timing.fastest(asked)
    assert [one.rows for one in found] == [1, 64]
    assert times == [1, 64] * 3
    assert all(one.seconds < 10 for one in found)
