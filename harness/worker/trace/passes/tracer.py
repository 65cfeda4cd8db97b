"""One model traced at many sizes: where its operators change with the length, and what its prompts are padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from harness.architecture.card_kernels import CardKernels
from harness.worker.trace import kernels, workload
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.ledger import Ledger
from harness.worker.trace.passes.fit import Pass, TracedPoint, passes_of

NEW_TOKENS = 3  # the prompt's pass, the first step and one like all that follow
# Lengths looked at for a change of operators, odd ones, as a mask then takes its padding; between two that differ it is sought.
PROBES = (3, 43, 1009, 8209, 131101)
PAIR, MANY = 2, 48  # batches looked at
LEAST_WIDTH, MOST_CHANGES = 32, 12
CHUNKS = 8  # the least width of a regime in chunks, where a prompt is padded to such


class Tracer:
    """Traces one placed model at any size, each size once, as if every kernel took all that it ever takes.

    `step` is 1, or the chunk that prompts are padded to.
    """

    step = 1
    _loops_cut = False

    def __init__(self, ledger: Ledger, model: Any, layers: Layers | None, card: CardKernels) -> None:
        self._ledger, self._model, self._layers, self._card = ledger, model, layers, card
        self._traces: dict[TracedPoint, list[Pass]] = {}

    def passes(self, point: TracedPoint) -> list[Pass]:
        """Return the passes of a batch and a prompt's length."""
        if point not in self._traces:
            with kernels.chosen_as_on(self._card, self._ledger, whole=True):
                traced = workload.run(self._ledger, self._model, self._layers, *point, NEW_TOKENS)
            self._traces[point] = passes_of(traced, point, loops_cut=self._loops_cut)
        return self._traces[point]

    def walks_chunks(self) -> bool:
        """Say whether it is loops over chunks alone that run other operators for a longer prompt; they are cut from then on."""
        ends = [(PAIR, PROBES[2]), (PAIR, 2 * PROBES[2])]
        if self.alike(0, ends):
            return False
        self._loops_cut = True
        self._traces.clear()
        self._loops_cut = self.alike(0, ends)
        if not self._loops_cut:
            self._traces.clear()
        return self._loops_cut

    def look_at_chunks(self) -> None:
        """Find what a prompt is padded to: what grows with its length, but not from each token to the next, grows by so many.

        Raises:
            ValueError: nothing does.
        """
        low, high = PROBES[2], 2 * PROBES[2]
        here, next_one, far = (self.passes((PAIR, length))[0] for length in (low, low + 1, high))
        sizes = zip(here.nbytes, next_one.nbytes, far.nbytes, strict=len({here.signature, next_one.signature, far.signature}) == 1)
        padded = [number for number, (least, less, most) in enumerate(sizes) if least == less < most]
        if not padded:
            raise ValueError("nothing of it is padded to chunks")
        first = self._next_larger(low, high, padded)
        self.step = self._next_larger(first, high, padded) - first

    def _next_larger(self, length: int, high: int, storages: Sequence[int]) -> int:
        """Return the first length at which storages are larger than they are here."""
        held = self._sizes(length, storages)
        return length + bisect_left(range(length, high), True, key=lambda one: self._sizes(one, storages) > held)

    def _sizes(self, length: int, storages: Sequence[int]) -> int:
        nbytes = self.passes((PAIR, length))[0].nbytes
        return sum(nbytes[number] for number in storages)

    @property
    def probes(self) -> Sequence[int]:
        """Lengths looked at for a change of operators."""
        return PROBES if self.step == 1 else [length for length in PROBES if length >= self.least_width]

    @property
    def least_width(self) -> int:
        """Lengths of a regime of its own; a shorter one is counted to the one above it."""
        return LEAST_WIDTH if self.step == 1 else CHUNKS * self.step

    def kinds(self) -> tuple[int, ...]:
        """Return the kinds of the layers that are traced apart: none where the model keeps no cache by layer."""
        layers = self._layers
        return layers.kinds if layers is not None and len(layers.kinds) == len(self.passes((PAIR, PROBES[1]))[0].cached) else ()

    def starts(self, number: int) -> list[int]:
        """Return the lengths, beyond 1, at which a regime of a pass begins: other operators run, or a window is full."""
        changes = self._changes(number, PAIR)
        full = [window - number for window in self._windows() if window > self.least_width + number]
        found = sorted({*changes, *(size for size in full if all(abs(size - change) > 8 for change in changes))})
        return [
            start
            for start, after in pairwise([*found, None])
            if start and start >= self.least_width and (not after or after - start >= self.least_width)
        ]

    def _changes(self, number: int, batch: int) -> list[int]:
        found = list[int]()
        for low, high in pairwise(self.probes):
            while self._signature(number, batch, low) != self._signature(number, batch, high):
                low = self._last_like(number, batch, low, high) + 1
                found.append(low)
                if len(found) > MOST_CHANGES:
                    raise ValueError(f"pass {number} runs other operators at each of {found}")
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
        """Return lengths around the sizes of the config where operators use to change."""
        return sorted(size + off for size in self._turns() for off in (-4, 2) if low < size + off < high)

    def _turns(self) -> set[int]:
        """Return the windows, and what scaled positions were scaled from."""
        config = self._model.config.get_text_config(decoder=True).to_dict()
        named = [*config.items(), *(config.get("rope_parameters") or {}).items()]
        return self._windows() | {size for name, size in named if type(size) is int and "max_position" in name}

    def _windows(self) -> set[int]:
        config = self._model.config.get_text_config(decoder=True).to_dict()
        sizes = {name: size for name, size in config.items() if "window" in name or "chunk" in name}
        if config.get("use_sliding_window") is False:
            sizes = {}
        return {size for name, size in sizes.items() if type(size) is int and not name.startswith("max_")}

    def crowd(self, number: int, length: int) -> int | None:
        """Return the batch from which on other operators run than for two sequences, up to MANY; None if none does."""
        same = self._signature(number, PAIR, length)
        low, high = PAIR, MANY
        if self._signature(number, MANY, length) == same:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._signature(number, middle, length) == same else (low, middle)
        return high

    def _signature(self, number: int, batch: int, length: int) -> int:
        return self.passes((batch, length))[number].signature

    def alike(self, number: int, points: Sequence[TracedPoint]) -> bool:
        """Say whether a pass runs the same operators at all these sizes."""
        return len({self._signature(number, *point) for point in points}) == 1
