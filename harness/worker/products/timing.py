"""Time products by layers of `harness.models` that unpack their weights, as decoding and reading a prompt make them.

A process of its own: how long unpacking takes differs between processors, and no small model that is published has such layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import msgspec
import torch

from harness.core.quantizers import ProductTime
from harness.machine.bandwidth import OthersAtWork
from harness.models.packed import GroupScaledLinear, RowScaledLinear

_GROUP = 128  # of MOSS's inputs
_ROWS = (1, 64)
_ROUNDS = 3
_PASSES, _LONGEST_S = 6, 0.2  # of one product in a round: so many passes, fewer if they take longer than this
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


class Product(NamedTuple):
    """A layer of a row of UNPACKINGS, and what it is given."""

    precision: str
    layer: torch.nn.Module
    given: torch.Tensor  #: of rows x inputs
    elements: int  #: inputs times outputs

    def time(self) -> ProductTime:
        """Return what a product takes: the fastest pass, for threads that wait tell of what else runs."""
        taken = list[float]()
        self.layer(self.given)  # memory that nothing has touched is no part of it
        with OthersAtWork() as others:
            while len(taken) < _PASSES and sum(taken) < _LONGEST_S:
                begun = time.perf_counter()
                self.layer(self.given)
                taken.append(time.perf_counter() - begun)
        return ProductTime(
            precision=self.precision,
            rows=len(self.given),
            elements=self.elements,
            held_bytes=sum(tensor.nbytes for tensor in self.layer.parameters()),
            seconds=min(taken),
            disturbed=others.are_many,
        )


def products(precisions: Iterable[str], shapes: Iterable[tuple[int, int]]) -> Iterator[Product]:
    """Yield one token and a prompt by each kind of layer of so many inputs and outputs."""
    for precision, (inputs, outputs) in product(precisions, shapes):
        layer = random_layer(precision, inputs, outputs)
        for rows in _ROWS:
            yield Product(precision, layer, torch.randn(rows, inputs).half(), inputs * outputs)


def fastest(asked: Sequence[Product]) -> list[ProductTime]:
    """Time each of all products in rounds, and return the fastest of each.

    A virtual machine may lose half of its cores for some seconds, which nothing in it tells of.
    """
    rounds = [[one.time() for one in asked] for _ in range(_ROUNDS)]
    return [min(times, key=lambda one: one.seconds) for times in zip(*rounds, strict=True)]


def main() -> None:
    asked: dict[str, Any] = msgspec.json.decode(sys.stdin.buffer.read())
    with torch.inference_mode():
        found = fastest([*products(asked["precisions"], asked["shapes"])])
    print(msgspec.json.encode(found).decode())
