"""Time products by layers of `harness.models` that unpack their weights, as decoding and reading a prompt make them.

A process of its own: how long unpacking takes differs between processors, and no small model that is published has such layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec
import torch

from harness.core.quantizers import ProductTime
from harness.machine.bandwidth import OthersAtWork
from harness.models.packed import GroupScaledLinear, RowScaledLinear

_GROUP = 128  # of MOSS's inputs
_ROWS = (1, 64)
_PASSES, _LONGEST_S = 12, 0.6  # of one product: so many passes, fewer if they take longer than this
# Row of UNPACKINGS -> a layer of so many inputs and outputs.
LAYERS: Mapping[str, Callable[[int, int], torch.nn.Module]] = {
    **{f"chatglm-int{bits}": partial(RowScaledLinear, bits=bits, bias=False) for bits in (8, 4)},
    **{f"gptq-int{bits}": partial(GroupScaledLinear, bits=bits, group=_GROUP, bias=False) for bits in (8, 4)},
}


def random_layer(precision: str, inputs: int, outputs: int) -> torch.nn.Module:
    """Return a layer of random weights whose floats are in float16, as both are published."""
    layer = LAYERS[precision](inputs, outputs)
    for name, tensor in layer.named_parameters():
        if name == "g_idx":
            tensor.data = torch.arange(inputs, dtype=torch.int32) // _GROUP
        elif tensor.dtype.is_floating_point:
            tensor.data.uniform_(0.0, 1e-3)
        else:
            limits = torch.iinfo(tensor.dtype)
            tensor.data.random_(limits.min, limits.max)
    return layer.half()


def time_products(precision: str, inputs: int, outputs: int) -> Iterator[ProductTime]:
    """Yield what one token and a prompt take by such a layer: the fastest pass, for threads that wait tell of what else runs."""
    layer = random_layer(precision, inputs, outputs)
    held = sum(tensor.nbytes for tensor in layer.parameters())
    for rows in _ROWS:
        given, taken = torch.randn(1, rows, inputs).half(), list[float]()
        layer(given)  # memory that nothing has touched is no part of it
        with OthersAtWork() as others:
            while len(taken) < _PASSES and sum(taken) < _LONGEST_S:
                begun = time.perf_counter()
                layer(given)
                taken.append(time.perf_counter() - begun)
        yield ProductTime(
            precision=precision,
            rows=rows,
            elements=inputs * outputs,
            held_bytes=held,
            seconds=min(taken),
            disturbed=others.are_many,
        )


def main() -> None:
    asked: dict[str, Any] = msgspec.json.decode(sys.stdin.buffer.read())
    with torch.inference_mode():
        found = [one for name in asked["precisions"] for shape in asked["shapes"] for one in time_products(name, *shape)]
    print(msgspec.json.encode(found).decode())
