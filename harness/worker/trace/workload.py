"""One workload on a fake card: what generating allocates, in order, by pass and by decoder layer."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.models.cache_argument import kv_cache_of
from harness.worker.build_skeleton import tensors_in
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.ledger import CARD, TOKEN, Allocation, Ledger


class Trace(NamedTuple):
    """What one run of generate() allocates beside the weights.

    `events` hold the number of an allocation when it is made and ~number when it is gone. Pass k, the prompt's being 0, begins at
    event `passes[k]`. `cached[k]` has, for each layer of the KV cache after pass k, the numbers of its allocations.
    """

    allocations: list[Allocation]
    events: list[int]
    passes: list[int]
    cached: list[list[tuple[int, ...]]]
    guesses: int
    peak_bytes: int


def run(ledger: Ledger, model: Any, layers: Layers | None, batch: int, prompt: int, new_tokens: int) -> Trace:
    """Generate `new_tokens` from `batch` prompts of `prompt` tokens, and return what was allocated for it.

    `peak_bytes` are those of the card, weights included.
    """
    passes: list[int] = []
    cached: list[list[tuple[int, ...]]] = []
    own = model.forward

    @functools.wraps(own)  # generate() reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        passes.append(len(ledger.events) if passes else 0)
        out = own(*args, **kwargs)
        cached.append([tuple(_numbers(ledger, layer)) for layer in _cache_layers(out)])
        return out

    gc.collect()
    gc.disable()  # else what a circle holds would be freed at a time of its own
    ledger.reset()
    guesses = ledger.guesses.total()
    try:
        with followed(ledger, model, layers), _patched(model, forward):
            _generate(model, batch, prompt, new_tokens)
    finally:
        gc.enable()
    return Trace(ledger.allocations, ledger.events, passes, cached, ledger.guesses.total() - guesses, ledger.peak[CARD])


def _generate(model: Any, batch: int, prompt: int, new_tokens: int) -> None:
    tokens = [TOKEN] * prompt
    ending = list(getattr(model, "prompt_ending", ()))
    if ending:
        tokens = (tokens + ending)[-prompt:]
    ids = torch.tensor([tokens] * batch, device=CARD)
    model.generation_config.eos_token_id = None  # no end before the last token
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )


@contextlib.contextmanager
def _patched(model: Any, forward: Any) -> Iterator[None]:
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@contextlib.contextmanager
def followed(ledger: Ledger, model: nn.Module, layers: Layers | None) -> Iterator[None]:
    """Tell the ledger which module runs, by its path, and which decoder layer was begun last; -1 before the first of a pass."""
    paths = {id(module): name for name, module in model.named_modules()}
    numbers = {id(layer): index for index, layer in enumerate(layers.held)} if layers else {}
    stack: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(ledger.path)
        ledger.path = paths.get(id(module), ledger.path)
        if module is model:
            ledger.layer = -1
        ledger.layer = numbers.get(id(module), ledger.layer)

    def leave(module: nn.Module, *_: Any) -> None:
        ledger.path = stack.pop() if stack else ""
        if numbers.get(id(module)) == len(numbers) - 1:
            ledger.layer = len(numbers)

    ledger.path, ledger.layer = "", -1
    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _cache_layers(out: Any) -> list[Any]:
    return list(getattr(kv_cache_of(out), "layers", ()))


def _numbers(ledger: Ledger, layer: Any) -> Iterator[int]:
    """Yield the allocations that a layer of a cache holds, keys and values or states of any name."""
    for tensor in {id(tensor): tensor for tensor in tensors_in(vars(layer))}.values():
        number = ledger.number(tensor)
        if number is not None and tensor.dim() > 1:  # beside them it keeps a number or two
            yield number
