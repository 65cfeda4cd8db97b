"""Make a record of an architecture: trace a few layers at a few sizes, fit every storage, keep the moments that can be worst.

Two traces run the same operators where their passes have the same signature; then the storages correspond one by one in their
order, and the bytes of each are a polynomial in batch and length that a few points determine and others confirm.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from harness.architecture.traced_memory import UNALIGNED, Condition, Polynomial, Regime, TracedMemory, evaluate
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.fit import Pass, Point, fit, moments, passes_of, row, worst
from harness.worker.trace.kernels import Card
from harness.worker.trace.ledger import CARD, Ledger, fake_card

NEW_TOKENS = 3  # the prompt's pass, the first step and one like all that follow
# Lengths looked at for a change of operators, odd ones, as a mask then takes its padding; between two that differ it is sought.
PROBES = (3, 67, 1009, 8209, 131101)
PAIR, MANY = 2, 48  # batches looked at
LEAST_WIDTH = 8  # a shorter regime is counted to the one above it
AGREES = 0.002  # what one sequence alone may differ from the polynomials of several
DEVIATION = 0.005  # what a record may differ from a trace of all layers; beyond, all are traced
CHECKED = (2, 1501)


class Tracer:
    """Traces one placed model at any size, each size once, as if every kernel took all that it ever takes."""

    def __init__(self, ledger: Ledger, model: Any, layers: Layers | None, card: Card) -> None:
        self._ledger, self._model, self._layers, self._card = ledger, model, layers, card
        self._traces: dict[Point, list[Pass]] = {}

    def passes(self, point: Point) -> list[Pass]:
        """Return the passes of a batch and a prompt's length."""
        if point not in self._traces:
            with kernels.chosen_as_on(self._card, self._ledger, whole=True):
                traced = workload.run(self._ledger, self._model, self._layers, *point, NEW_TOKENS)
            self._traces[point] = passes_of(traced, point)
        return self._traces[point]

    def kinds(self) -> tuple[int, ...]:
        """Return the kinds of the layers that are traced apart: none where the model keeps no cache by layer."""
        layers = self._layers
        return layers.kinds if layers is not None and len(layers.kinds) == len(self.passes((PAIR, PROBES[1]))[0].cached) else ()

    def changes(self, number: int, batch: int) -> list[int]:
        """Return the lengths at which a pass begins to run other operators."""
        found = []
        for low, high in pairwise(PROBES):
            while self._signature(number, batch, low) != self._signature(number, batch, high):
                low = self._last_like(number, batch, low, high) + 1
                found.append(low)
        return found

    def _last_like(self, number: int, batch: int, low: int, high: int) -> int:
        same = self._signature(number, batch, low)
        for length in self._hints(low, high):
            if self._signature(number, batch, length) == same:
                low = length
            else:
                high = length
                break
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._signature(number, batch, middle) == same else (low, middle)
        return low

    def _hints(self, low: int, high: int) -> list[int]:
        """Return lengths around the windows of the config, where operators use to change."""
        config = self._model.config.get_text_config(decoder=True).to_dict()
        sizes = {size for name, size in config.items() if isinstance(size, int) and ("window" in name or "chunk" in name)}
        return sorted(size + off for size in sizes for off in (-3, -2, -1, 0, 1) if low < size + off < high)

    def _signature(self, number: int, batch: int, length: int) -> int:
        return self.passes((batch, length))[number].signature

    def alike(self, number: int, points: Sequence[Point]) -> bool:
        """Say whether a pass runs the same operators at all these sizes."""
        return len({self._signature(number, *point) for point in points}) == 1


class Recorder:
    """Turns the traces of one model into regimes."""

    def __init__(self, tracer: Tracer, conditions: Sequence[Condition]) -> None:
        self._tracer, self._kinds = tracer, tracer.kinds()
        self._numbers: dict[str | None, int] = {None: -1, **{one.name: index for index, one in enumerate(conditions)}}
        self.names: dict[str, int] = {}

    def regimes(self, number: int) -> Iterator[Regime]:
        """Yield the regimes of a pass, one sequence alone before several where it differs."""
        starts = [1, *self._tracer.changes(number, PAIR)]
        starts = [start for start, after in zip(starts, [*starts[1:], None], strict=True) if after is None or after - start >= LEAST_WIDTH]
        for index, (start, after) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
            lengths = (1 if index == 0 else start, after - 1 if after is not None else None)
            sizes = _samples(*lengths)
            several = self._regime(number, lengths, (PAIR, None), [(b, s) for s in sizes[:3] for b in (PAIR, 3)] + [(5, sizes[3])])
            if self._agrees(number, several, sizes[1]):
                yield Regime(several.lengths, (1, None), *(getattr(several, name) for name in ("before", "cached", "rows")))
            else:
                yield self._regime(number, lengths, (1, 1), [(1, s) for s in sizes])
                yield several

    def _regime(self, number: int, lengths: tuple[int, int | None], batches: tuple[int, int | None], points: list[Point]) -> Regime:
        if not self._tracer.alike(number, points):
            raise ValueError(f"pass {number} runs other operators at some of {points}")
        traced = [self._tracer.passes(point)[number] for point in points]
        polynomials = fit(points, np.array([one.nbytes for one in traced], dtype=np.float64))
        one, kinds = traced[0], self._kinds
        found = moments(one, polynomials, kinds)
        grid = [(batch, length) for batch in _batches(*batches) for length in _spread(*lengths)]
        rows = tuple(row(one, polynomials, found, index, self.names, self._numbers) for index in worst(found, grid))
        before, cached = (self._by_kind(side, polynomials) for side in (one.before, one.cached))
        return Regime(lengths, batches, before, cached, rows)

    def _by_kind(self, cache: Sequence[Sequence[int]], polynomials: Any) -> tuple[Polynomial, ...]:
        kinds = self._kinds or (0,) * len(cache)
        by_layer = [polynomials[list(layer)].sum(axis=0) for layer in cache]
        if not self._kinds:
            return (tuple(map(float, np.sum(by_layer, axis=0))) if by_layer else (),)
        return tuple(tuple(map(float, by_layer[kinds.index(kind)])) for kind in range(max(kinds) + 1))

    def _agrees(self, number: int, regime: Regime, length: int) -> bool:
        """Say whether the polynomials of several sequences give what one alone holds, at its worst."""
        ...
