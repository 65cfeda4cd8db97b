"""One step of training as transformers' Trainer makes it: forward in autocast, the loss, backward; what is alive at its peak."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from harness.architecture.card_kernels import kernels_of
from harness.core.precisions import PRECISIONS
from harness.core.training.setup import TracedStep, Trainable, TrainingSetup
from harness.worker.trace import fake_model, kernels
from harness.worker.trace.allocator import needs, round_size
from harness.worker.trace.ledger import CARD, TOKEN, Ledger, fake_card, swapped
from harness.worker.trace.record import source
from harness.worker.trace.reserve import Weights
from harness.worker.trace.whole import Events
from harness.worker.trace.workload import followed
from harness.worker.training.backward import Walk
from harness.worker.training.low_rank import add_adapters

_BACK = "backward"  # where the ledger is while no module runs


class Held(NamedTuple):
    """Bytes alive at the peak of a step, beside what was there before."""

    gradients: int
    activations: int
    logits: int
    temporary: int


def trace_step(config: Mapping[str, Any], setup: TrainingSetup, capability: str) -> TracedStep:
    """Trace one step on a fake card of this compute capability, from a config as published.

    Raises:
        ValueError: transformers has no class for it, it computes no loss, or cannot be trained so.
    """
    model, card = fake_model.build_fake(config, setup.precision, capability=capability), kernels_of(capability)
    dtype = getattr(torch, PRECISIONS[setup.precision].dtype_on(capability))
    with fake_card({}, card.capability) as ledger, kernels.chosen_as_on(card, ledger, whole=False), _autocasting_card():
        fake_model.place_on_card(model)
        weights = ledger.live[CARD]
        with torch.enable_grad():
            prepare(model, setup, CARD)
            adapters, at_rest = ledger.live[CARD] - weights, Weights.on(ledger)
            held = run_step(ledger, model, setup, dtype, CARD)
    return TracedStep(
        weights_bytes=weights,
        adapters_bytes=adapters,
        gradients_bytes=held.gradients,
        activations_bytes=held.activations,
        logits_bytes=held.logits,
        temporary_bytes=held.temporary,
        fragmentation_bytes=_fragmentation(ledger, at_rest),
        trained=tuple(trained(model)),
        source=source(),
    )


def prepare(model: Any, setup: TrainingSetup, device: torch.device) -> None:
    """Make a model ready to be trained: adapters or all parameters, checkpoints.

    Raises:
        ValueError: it has no checkpoints, or what is called as a target is no Linear.
    """
    if setup.method == "full":
        model.requires_grad_(True)
    else:
        add_adapters(model, setup.rank, setup.targets, device)
    make_ready(model, checkpointing=setup.checkpointing)


def make_ready(model: Any, *, checkpointing: bool) -> None:
    """Do what Trainer does with a model before the first step."""
    model.train()
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.use_cache = False
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name before 5.24
        enable({"use_reentrant": False, "preserve_rng_state": False})  # a fake card has no generator


def run_step(ledger: Ledger, model: Any, setup: TrainingSetup, dtype: torch.dtype, device: torch.device) -> Held:
    """Run forward and backward once, on real tensors or fake ones, and return what was alive at the peak.

    Raises:
        ValueError: the model computes no loss.
    """
    gradients: set[int | None] = set()
    before = ledger.live[device]
    gc.collect()
    gc.disable()  # else what a circle holds would be freed at a time of its own
    ledger.reset()
    try:
        with followed(ledger, model, None):
            roots = [_loss(model, setup, dtype, device).grad_fn]
            ledger.path = _BACK
            Walk(lambda grad: gradients.add(ledger.number(grad))).run(roots)
    finally:
        gc.enable()
    held = _at_peak(ledger, device, gradients, _vocabulary(model))
    assert sum(held) == ledger.peak[device] - before
    return held


def _loss(model: Any, setup: TrainingSetup, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Compute the loss as Trainer does, in a model that accelerate has prepared."""
    ids = torch.full((setup.batch, setup.sequence_length), TOKEN, device=device)
    forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype=dtype)(model.__call__))
    loss: torch.Tensor | None = forward(input_ids=ids, labels=ids).loss
    if loss is None or loss.grad_fn is None:
        raise ValueError(f"{type(model).__name__} computes no loss that could be trained on")
    return loss


def _at_peak(ledger: Ledger, device: torch.device, gradients: set[int | None], vocabulary: int) -> Held:
    """Follow the events of a device to their peak, and sum up what is alive there by what it is."""
    live: dict[int, int] = {}
    total, most, alive = 0, -1, dict[int, int]()
    for event in ledger.events:
        number = event if event >= 0 else ~event
        if ledger.allocations[number].device != device:
            continue
        if event >= 0:
            live[number] = ledger.allocations[number].handed_out
            total += live[number]
        else:
            total -= live.pop(number)
        if total > most:
            most, alive = total, dict(live)
    sums = Counter[str]()
    for number, size in alive.items():
        made = ledger.allocations[number]
        logits = vocabulary in made.shape[-1:] or made.operator.startswith("aten::nll_loss")
        kind = "gradients" if number in gradients else "logits" if logits else "temporary" if made.path == _BACK else "activations"
        sums[kind] += size
    return Held(*(sums[kind] for kind in Held._fields))


def _fragmentation(ledger: Ledger, at_rest: Weights) -> int:
    """Return what torch's allocator needs for a step beyond the most that is alive, behind what was there before it."""
    step = Events([one.nbytes for one in ledger.allocations], ledger.events)
    replayed = needs(*at_rest.before(step), sum(round_size(nbytes) for nbytes in at_rest.sizes if nbytes))
    return replayed.least - replayed.allocated


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", 0) or model.config.get_text_config(decoder=True).vocab_size)


def trained(model: nn.Module) -> Iterator[Trainable]:
    """Yield the parameters that a step gave a gradient, those of one shape together."""
    rows = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds = Counter((tuple(one.shape), one.itemsize, id(one) in rows) for one in model.parameters() if one.grad is not None)
    for (shape, itemsize, embeds), count in kinds.items():
        yield Trainable(shape=shape, itemsize=itemsize, count=count, embeds=embeds)


@contextlib.contextmanager
def _autocasting_card() -> Iterator[None]:
    """Have torch take a fake card for one that autocasts."""
    with (
        swapped(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        swapped(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
    ):
        yield
