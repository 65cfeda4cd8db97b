"""The events of a whole model from a trace of some of its layers: those traced stand for the others of their kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.worker.trace.workload import Trace

_Made = tuple[int, int, int]  # in which pass, in which traced layer (-1 before them, their number after), as which of there


class Events(NamedTuple):
    """Allocations in order: `events` has the number of a size when it is allocated and ~number when it is gone."""

    sizes: list[int]
    events: list[int]


def stand_ins(kinds: Sequence[int], traced: Sequence[int]) -> list[int]:
    """Return for every layer which of the `traced` ones, counted from 0, stands for it: itself, else the last of its kind."""
    last = {kinds[layer]: index for index, layer in enumerate(traced)}
    own = {layer: index for index, layer in enumerate(traced)}
    return [own.get(layer, last[kind]) for layer, kind in enumerate(kinds)]


def whole(trace: Trace, layers: Sequence[int]) -> Events:
    """Repeat what the traced layers allocate for all `layers` that they stand for (`stand_ins`).

    A layer that frees what another has made frees that of the layer before it. A cache at the end of the run stays alive.

    Raises:
        ValueError: a layer frees what is not to be found in the whole.
    """
    return _Whole(trace, layers).events()


class _Whole:
    def __init__(self, trace: Trace, layers: Sequence[int]) -> None:
        self._trace, self._layers = trace, layers
        self._after = max(layers) + 1
        self._made: dict[int, _Made] = {}
        self._segments: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._owners: dict[int, int] = {}  # of what is made outside of the layers, which of those traced frees it
        self._take_apart()
        self._out = Events([], [])
        self._live: dict[tuple[_Made, int], int] = {}  # in which of all layers as well; -1 outside of them

    def _take_apart(self) -> None:
        starts, number, layer = [*self._trace.passes[1:], len(self._trace.events) + 1], 0, -1
        for index, event in enumerate(self._trace.events):
            while index >= starts[number]:
                number, layer = number + 1, -1
            if event >= 0:
                layer = min(self._trace.allocations[event].layer, self._after)
                made = self._segments[number, layer]
                self._made[event] = number, layer, len(made)
            elif self._is_layer(layer) and not self._is_layer(self._made[~event][1]):
                self._owners[~event] = layer
            self._segments[number, layer].append(event)

    def _is_layer(self, number: int) -> bool:
        return -1 < number < self._after

    def events(self) -> Events:
        """Return the events of all layers."""
        for number in range(len(self._trace.passes)):
            for layer, traced in ((-1, -1), *enumerate(self._layers), (-1, self._after)):
                for event in self._segments.get((number, traced), ()):
                    if event >= 0:
                        self._allocate(event, layer)
                    else:
                        self._free(~event, layer, traced)
        return self._out

    def _allocate(self, storage: int, layer: int) -> None:
        owner = self._owners.get(storage)
        for one in (layer,) if owner is None else (index for index, traced in enumerate(self._layers) if traced == owner):
            self._live[self._made[storage], one] = len(self._out.sizes)
            self._out.events.append(len(self._out.sizes))
            self._out.sizes.append(self._trace.allocations[storage].nbytes)

    def _free(self, storage: int, layer: int, traced: int) -> None:
        made = self._made[storage]
        for key in self._places(storage, made, layer, traced):
            if key in self._live:
                self._out.events.append(~self._live.pop(key))
                return
        if self._is_layer(traced):
            raise ValueError(f"layer {layer} frees what no layer has made: {self._trace.allocations[storage]}")

    def _places(self, storage: int, made: _Made, layer: int, traced: int) -> Iterator[tuple[_Made, int]]:
        number, where, _ = made
        if not self._is_layer(where):
            yield made, layer if storage in self._owners else -1
        elif where == traced:
            yield made, layer
        else:  # of the layer before it, which another may stand for
            before = layer - 1 if layer >= 0 else len(self._layers) - 1
            one = self._trace.allocations[storage]
            for event in self._segments[number, self._layers[before]]:
                if event >= 0 and self._trace.allocations[event][:4] == one[:4]:
                    yield self._made[event], before
