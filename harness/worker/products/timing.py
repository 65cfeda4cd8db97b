"""Time products as decoding does them: `python -m harness.worker.products`, a process of its own. Reads JSON, prints JSON."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from harness.core.precisions import PRECISIONS, Precision
from harness.machine.bandwidth import OthersAtWork
from harness.machine.products import ROWS, STACKS, STACKS_S, ProductTime

_PASSES, _LONGEST_S = 12, 1.0  # of one stack: so many passes, fewer if they take longer than this
_TURNED = (1024, 4)  # width, how many: where there is no kernel but a loop, a few say enough


def _quantized(asked: Precision, weight: torch.Tensor) -> torch.nn.Module:
    """Return a Linear as transformers makes it of a 16-bit weight."""
    made: Any = import_module("bitsandbytes.nn")
    width, settings = weight.shape[0], asked.quantization
    assert isinstance(settings, Mapping)
    linear: torch.nn.Module
    if settings.get("load_in_8bit"):
        linear = made.Linear8bitLt(width, width, bias=False, has_fp16_weights=False, threshold=6.0)
        linear.weight = made.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        return linear
    kind = str(settings["bnb_4bit_quant_type"])
    linear = made.Linear4bit(width, width, bias=False, compute_dtype=weight.dtype, quant_type=kind)
    linear.weight = made.Params4bit(weight, requires_grad=False, quant_type=kind).to("cpu")
    return linear


def _plain(weight: torch.Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(1, 1, bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _passes(stack: torch.nn.Module, given: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of the first pass and the median of later ones."""
    first = _timed(lambda: stack(given))
    later: list[float] = []
    while len(later) < _PASSES and sum(later) < _LONGEST_S:
        later.append(_timed(lambda: stack(given)))
    return first, statistics.median(later)


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _norms_and(made: Iterable[torch.nn.Module], width: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return modules in a row, each behind a norm."""
    return torch.nn.Sequential(*(part for one in made for part in (LlamaRMSNorm(width).to(dtype), one)))


def _of_stack(asked: Precision, width: int, layers: int) -> Iterator[ProductTime]:
    """Time one stack: to make it, products of one row, and by the widest of many."""
    dtype = getattr(torch, asked.dtype)
    weight, made = torch.randn(width, width).mul_(0.02).to(dtype), list[torch.nn.Module]()
    make = partial(_quantized, asked) if asked.quantization else _plain
    make(weight)  # what is imported, or compiled, at the first of them is no part of it
    spent = _timed(lambda: made.extend(make(weight) for _ in range(layers)))
    stack = _norms_and(made, width, dtype)
    known = ProductTime(precision=asked.name, done="product", width=width, layers=layers, held_bytes=_held(made), seconds=0.0)
    first, later = _passes(stack, torch.randn(1, 1, width).to(dtype))
    yield replace(known, seconds=later)
    if width < STACKS[-1][0]:
        return
    if asked.quantization:
        yield replace(known, done="quantize", seconds=spent)
        yield replace(known, done="pack", seconds=max(first - later, 0.0))
    yield replace(known, rows=ROWS, seconds=_passes(stack, torch.randn(1, ROWS, width).to(dtype))[1])


def _turned(asked: Precision) -> ProductTime:
    """Time products of one row by weights that lie inputs by outputs."""
    (width, layers), dtype = _TURNED, getattr(torch, asked.dtype)
    stack = torch.nn.Sequential(*(Conv1D(width, width).to(dtype) for _ in range(layers)))
    seconds = _passes(stack, torch.randn(1, 1, width).to(dtype))[1]
    held = width * width * layers * dtype.itemsize
    return ProductTime(precision=asked.name, done="turned", width=width, layers=layers, held_bytes=held, seconds=seconds)


def _cast(asked: Precision) -> ProductTime:
    """Time casts of weights to the dtype, as loading makes them: into memory that nothing has touched."""
    (width, layers), dtype = STACKS[-1], getattr(torch, asked.dtype)
    other = torch.randn(width, width, dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
    made: list[torch.Tensor] = []
    seconds = _timed(lambda: made.extend(other.to(dtype) for _ in range(layers)))
    held = sum(one.nbytes for one in made)
    return ProductTime(precision=asked.name, done="cast", width=width, layers=layers, held_bytes=held, seconds=seconds)


def _held(made: list[torch.nn.Module]) -> int:
    """Return the bytes of weights, and of the scales beside those that are quantized."""
    held = 0
    for one in made:
        weight = one.get_parameter("weight")
        state = getattr(weight, "quant_state", None)
        scales = state.absmax if state is not None else getattr(weight, "SCB", None)
        held += weight.nbytes + (scales.nbytes if scales is not None else 0)
    return held


def _beside_stacks(asked: Precision) -> Iterator[ProductTime]:
    """Time what weights that are not quantized have beside their stacks."""
    yield _cast(asked)
    if asked.dtype == "float16":
        yield _turned(asked)


def time_products_of(asked: Iterable[Precision]) -> Iterator[ProductTime]:
    """Time every precision in their order, until the seconds are over."""
    until = time.perf_counter() + STACKS_S
    for one in asked:
        steps = [partial(_of_stack, one, width, layers) for width, layers in STACKS]
        for step in steps if one.quantization else [partial(_beside_stacks, one), *steps]:
            if time.perf_counter() > until:
                return
            with OthersAtWork() as others:
                found = list(step())
            yield from (replace(each, disturbed=others.are_many) for each in found)


def main() -> None:
    names = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, list[str]])["precisions"]
    with torch.inference_mode():
        found = list(time_products_of(PRECISIONS[name] for name in names))
    print(msgspec.json.encode(found).decode())
