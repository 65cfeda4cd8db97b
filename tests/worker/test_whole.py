"""The events of a whole model put together from some layers, against those of a run of all layers."""

from __future__ import annotations

from typing import Any

import pytest

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import kernels_of
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.ledger import fake_card
from harness.worker.trace.whole import Events, stand_ins, whole
from tests.worker.test_trace import MODELS

CARD = kernels_of("8.0")
PRECISIONS = [("bf16", kind) for kind in MODELS] + [("int4", "llama"), ("int8", "qwen 3, experts"), ("fp16", "codegen, eager")]
WINDOWS = ("mistral with a window", "gemma 3, alternating")  # whose caches hold a number for every layer, made in another order
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def deep(config: dict[str, Any]) -> dict[str, Any]:
    """Give a config six layers, so that some stand for others."""
    return {**config, **{name: 6 for name in LAYERS if name in config}}


def events(config: dict[str, Any], precision: str, *, some: bool) -> Events:
    """Trace a workload with all layers, or put it together from some."""
    model = fake_model.build_fake(config, precision)
    with fake_card({}, CARD.capability) as ledger, kernels.chosen_as_on(CARD, ledger, whole=False):
        fake_model.place_on_card(model)
        layers = fake_model.layers_of(model)
        assert layers is not None
        traced = fake_model.representatives(layers.kinds) if some else range(len(layers.kinds))
        kept = fake_model.keep(model, layers, traced)
        return whole(workload.run(ledger, model, kept, 2, 150, 4), stand_ins(layers.kinds, traced))


def live_bytes(made: Events) -> list[int]:
    """Return what is allocated after every event."""
    total, found = 0, []
    for event in made.events:
        total += made.sizes[event] if event >= 0 else -made.sizes[~event]
        found.append(total)
    return found


@pytest.mark.parametrize(("precision", "kind"), PRECISIONS)
def test_a_few_layers_give_the_events_of_all(precision: str, kind: str) -> None:
    config = deep(MODELS[kind])
    found, wanted = (events(config, precision, some=some) for some in (True, False))
    assert found.sizes == wanted.sizes
    assert live_bytes(found) == live_bytes(wanted)
    if kind not in WINDOWS:
        assert found.events == wanted.events


def test_the_last_of_a_kind_stands_for_the_others() -> None:
    kinds = (0, 0, 0, 1, 0, 0, 0, 1)
    assert stand_ins(kinds, fake_model.representatives(kinds)) == [0, 2, 2, 1, 2, 2, 2, 3]
