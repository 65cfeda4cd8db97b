"""Trace workloads of a whole model, every layer: what records are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.core.records import Record, Workload
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.ledger import CARD, fake_card


class Traced(Record, frozen=True, kw_only=True):
    """What one workload holds on one card; `guesses` counts values that the model's code asked for and nobody knew."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    weights_bytes: int
    kv_bytes: int
    peak_bytes: int
    guesses: int


def trace(
    config: Mapping[str, Any], precision: str, loads: Iterable[Workload], attention: str | None = None, capability: str = WITH_FLASH
) -> list[Traced]:
    """Trace workloads of a model, from its config alone, as on a card of this compute capability.

    Raises:
        ValueError: transformers has no class for it, or no trace is made in this precision.
    """
    card = kernels_of(capability)
    model = fake_model.build_fake(config, precision, attention, capability)
    with fake_card({}, card.capability) as ledger, kernels.chosen_as_on(card, ledger, whole=False):
        fake_model.place_on_card(model)
        weights, layers = ledger.live[CARD], fake_model.layers_of(model)
        found = []
        for load in loads:
            run = workload.run(ledger, model, layers, load.batch, load.prompt_tokens, load.new_tokens)
            sizes = (run.allocations[number].nbytes for layer in (run.cached or [[]])[-1] for number in layer)
            found.append(
                Traced(
                    batch=load.batch,
                    prompt_tokens=load.prompt_tokens,
                    new_tokens=load.new_tokens,
                    weights_bytes=weights,
                    kv_bytes=sum(sizes),
                    peak_bytes=run.peak_bytes,
                    guesses=run.guesses,
                )
            )
    return found
