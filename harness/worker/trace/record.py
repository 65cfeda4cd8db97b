"""Make a record of an architecture: trace a few layers at a few sizes, fit every storage, keep the moments that can be worst.

Two traces run the same operators where their passes have the same signature; then the storages correspond one by one in their
order, and the bytes of each are a polynomial in batch and length that a few points determine and others confirm.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch

from harness.architecture.card_kernels import WITH_FLASH, CardKernels, cards_of, family, kernels_of
from harness.architecture.traced_memory import (
    UNALIGNED,
    UNALIGNED_WIDE,
    Condition,
    Polynomial,
    Range,
    Regime,
    TracedMemory,
    evaluate,
    monomials,
    value,
)
from harness.core.precisions import PRECISIONS
from harness.worker.trace import fake_model, kernels, reserve, workload
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.fit import Pass, TracedPoint, cached_bytes, fit, moments, passes_of, row, tidy, worst
from harness.worker.trace.ledger import CARD, Ledger, fake_card
from harness.worker.trace.whole import stand_ins

NEW_TOKENS = 3  # the prompt's pass, the first step and one like all that follow
# Lengths looked at for a change of operators, odd ones, as a mask then takes its padding; between two that differ it is sought.
PROBES = (3, 43, 1009, 8209, 131101)
PAIR, MANY = 2, 48  # batches looked at
LEAST_WIDTH = 32  # a shorter regime is counted to the one above it
LEAST_LENGTH, SLACK = 41, 1 << 16
AGREES = 0.002  # what one sequence alone may differ from the polynomials of several
DEVIATION = 0.005  # what a record may differ from a trace of all layers; beyond, all are traced
CHECKED_SIZES = (2, 1501, 2)  # batch, prompt, new tokens


class Tracer:
    """Traces one placed model at any size, each size once, as if every kernel took all that it ever takes."""

    def __init__(self, ledger: Ledger, model: Any, layers: Layers | None, card: CardKernels) -> None:
        self._ledger, self._model, self._layers, self._card = ledger, model, layers, card
        self._traces: dict[TracedPoint, list[Pass]] = {}

    def passes(self, point: TracedPoint) -> list[Pass]:
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

    def starts(self, number: int) -> list[int]:
        """Return the lengths, beyond 1, at which a regime of a pass begins: other operators run, or a window is full."""
        changes = self._changes(number, PAIR)
        full = [window - number for window in self._windows() if window > LEAST_WIDTH + number]
        found = sorted({*changes, *(size for size in full if all(abs(size - change) > 8 for change in changes))})
        return [
            start
            for start, after in pairwise([*found, None])
            if start and start >= LEAST_WIDTH and (not after or after - start >= LEAST_WIDTH)
        ]

    def _changes(self, number: int, batch: int) -> list[int]:
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


class Recorder:
    """Turns the traces of one model into regimes; `conditions` are numbered as the record has them."""

    def __init__(self, tracer: Tracer, conditions: Sequence[Condition]) -> None:
        self._tracer, self._kinds = tracer, tracer.kinds()
        self._numbers: dict[str | None, int] = {None: -1, **{one.name: index for index, one in enumerate(conditions)}}
        self.names: dict[str, int] = {}

    def regimes(self, number: int) -> Iterator[Regime]:
        """Yield the regimes of a pass; one sequence alone has its own where what it holds does not follow from that of several."""
        for start, after in pairwise([1, *self._tracer.starts(number), None]):
            lengths = (int(start or 1), after - 1 if after else None)
            sizes = _samples(*lengths)
            crowd = self._tracer.crowd(number, sizes[0])
            several = self._regime(number, lengths, (PAIR, crowd - 1 if crowd else None), _points(PAIR, sizes))
            for probe in PROBES:
                if several.covers(PAIR, probe) and probe >= LEAST_LENGTH and not self._agrees(number, several, (PAIR, probe)):
                    raise ValueError(f"pass {number} holds other than its polynomials say at a length of {probe}")
            if self._agrees(number, several, (1, sizes[1])):
                several = msgspec.structs.replace(several, batches=(1, several.batches[1]))
            else:
                yield self._regime(number, lengths, (1, 1), [(1, size) for size in sizes])
            yield several
            if crowd:
                yield self._regime(number, lengths, (crowd, None), _points(crowd, sizes))

    def _regime(self, number: int, lengths: Range, batches: Range, points: list[TracedPoint]) -> Regime:
        if not self._tracer.alike(number, points):
            raise ValueError(f"pass {number} runs other operators at some of {points}")
        traced = [self._tracer.passes(point)[number] for point in points]
        polynomials = fit(points, np.array([one.nbytes for one in traced], dtype=np.float64))
        one = traced[1]
        found = moments(one, polynomials, self._kinds)
        grid = [(batch, length) for batch in _spread(*batches, most=256) for length in _spread(*lengths, most=1 << 18)]
        rows = tuple(row(one, polynomials, found, index, self.names, self._numbers) for index in worst(found, grid))
        before, cached = (self._by_kind(side) for side in cached_bytes(one, polynomials, bool(self._kinds)))
        return Regime(lengths=lengths, batches=batches, before=before, cached=cached, rows=rows)

    def _by_kind(self, cache: Any) -> tuple[Polynomial, ...]:
        kinds = self._kinds or (0,)
        return tuple(tidy(cache[kinds.index(kind)]) for kind in range(max(kinds) + 1))

    def _agrees(self, number: int, regime: Regime, point: TracedPoint) -> bool:
        """Say whether a regime gives what was traced at a size outside of it, in every place."""
        one = self._tracer.passes(point)[number]
        real = np.zeros((len(one.nbytes), 6))
        real[:, 0] = one.nbytes
        found, at = moments(one, real, self._kinds), monomials(*point)
        held: dict[int, float] = defaultdict(float)
        for place, nbytes in zip(found.places, (found.nbytes + found.extra)[:, 0], strict=True):
            held[place] = max(held[place], nbytes)
        given: dict[int, float] = defaultdict(float)
        for line in regime.rows:
            given[line.place] = max(given[line.place], value(line.nbytes, at) + value(line.extra, at))
        slack = AGREES * max(*held.values(), sum(one.nbytes[: one.held])) + SLACK
        return all(abs(given[place] - held[place]) <= slack for place in held)


def _points(batch: int, sizes: Sequence[int]) -> list[TracedPoint]:
    """Choose where to trace for six coefficients, and a point more to confirm them."""
    return [*((number, size) for size in sizes[:3] for number in (batch, batch + 1)), (batch + 3, sizes[3])]


def _samples(first: int, last: int | None) -> list[int]:
    """Choose four lengths within a range, odd as those looked at, the same for ranges that begin or end nearly alike."""
    low = max(first, LEAST_LENGTH) if last is None or last > 2 * LEAST_LENGTH else first
    low = -(-low // 8) * 8
    high = min(last // 8 * 8 if last is not None else 4 * low, 4 * low)
    if high - low < 16:
        raise ValueError(f"lengths from {first} to {last} are too few to tell how sizes grow")
    return [int(low + (high - low) * share) | 1 for share in (0.0, 0.4, 0.9, 0.6)]


def _spread(first: int, last: int | None, most: int) -> list[int]:
    """Choose values across a range, each twice the one before it."""
    end = min(last, most) if last is not None else max(most, first)
    return sorted({*(min(first << power, end) for power in range(most.bit_length())), end})


class LayersDiffer(ValueError):
    """A few layers of a model do not stand for all of them."""


def record(
    config: Mapping[str, Any], precision: str, attention: str | None = None, capability: str = WITH_FLASH, check: bool = True
) -> TracedMemory:
    """Trace an architecture in a precision, as on cards of the family of this compute capability, and return its record.

    With `check` one workload is traced with all layers as well, but where weights are quantized: what runs is the same.

    Raises:
        ValueError: transformers has no class for it, no trace is made in this precision, or its sizes are no polynomials.
    """
    cards = cards_of(family(kernels_of(capability), precision))
    try:
        return _recorded(config, precision, attention, cards, check)
    except LayersDiffer:  # traced whole, which takes longer
        return _recorded(config, precision, attention, cards, check=False, few=False)


def _recorded(
    config: Mapping[str, Any], precision: str, attention: str | None, cards: Sequence[CardKernels], check: bool, few: bool = True
) -> TracedMemory:
    card, capability = cards[0], f"{cards[0].capability[0]}.{cards[0].capability[1]}"
    model = fake_model.build_fake(config, precision, attention, capability)
    conditions = [Condition(name=UNALIGNED), Condition(name=UNALIGNED_WIDE), *_unpackings(model, cards)]
    with fake_card({}, card.capability) as ledger:
        fake_model.place_on_card(model)
        _settle()
        weights, layers = ledger.live[CARD], fake_model.layers_of(model)
        placed, whole = reserve.Weights.on(ledger), None
        if check and not PRECISIONS[precision].quantizes:
            with kernels.chosen_as_on(card, ledger, whole=False):
                whole = workload.run(ledger, model, layers, *CHECKED_SIZES).peak_bytes
        about = _about(model, precision, weights, capability)
        kinds = layers.kinds if layers is not None else (0,)
        chosen = fake_model.representatives(kinds) if few else list(range(len(kinds)))
        if layers is not None:
            layers = fake_model.keep(model, layers, chosen)
        _run_once(ledger, model, layers, card, may_differ=len(chosen) < len(kinds))
        recorder = Recorder(Tracer(ledger, model, layers, card), conditions)
        prefill, first, later = (tuple(recorder.regimes(number)) for number in range(NEW_TOKENS))
        names = tuple(_numbered(name, layers, chosen) for name in recorder.names)
        gaps = reserve.reserved(ledger, model, layers, stand_ins(kinds, chosen), placed, card)
    traced = TracedMemory(
        **about, layers=kinds, prefill=prefill, first=first, later=later, conditions=tuple(conditions), names=names, reserved=gaps
    )
    made = _without_first(_without_spares(traced))
    return made if whole is None else _checked(made, whole)


def _run_once(ledger: Ledger, model: Any, layers: Layers | None, card: CardKernels, may_differ: bool) -> None:
    """Run a model, so that what is made once and kept is there before a trace begins."""
    try:
        with kernels.chosen_as_on(card, ledger, whole=True):
            workload.run(ledger, model, layers, 1, PROBES[0], 2)
        _settle()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if may_differ:
            raise LayersDiffer(str(error)) from error
        raise


def _settle() -> None:
    """Look for circles in all that is there once, and leave it out when a trace looks, which else takes as long as the trace."""
    gc.unfreeze()  # of the model before this one nothing stays
    gc.collect()
    gc.freeze()


def _without_spares(made: TracedMemory) -> TracedMemory:
    """Leave out the conditions that no moment has."""
    used = sorted({row.condition for passes in (made.prefill, made.first, made.later) for one in passes for row in one.rows} - {-1})
    numbers = {-1: -1} | {old: new for new, old in enumerate(used)}

    def numbered(regime: Regime) -> Regime:
        rows = tuple(msgspec.structs.replace(row, condition=numbers[row.condition]) for row in regime.rows)
        return msgspec.structs.replace(regime, rows=rows)

    passes = {name: tuple(map(numbered, getattr(made, name))) for name in ("prefill", "first", "later")}
    return msgspec.structs.replace(made, conditions=tuple(made.conditions[number] for number in used), **passes)


def _without_first(made: TracedMemory) -> TracedMemory:
    """Leave out the first decode step where it holds what a later one holds that is a token earlier."""
    short = msgspec.structs.replace(made, first=())
    edges = [edge for regime in (*made.first, *made.later) for edge in regime.lengths if edge]
    lengths = {64, 1500, 40_000, *(max(edge + off, 2) for edge in edges for off in (-1, 0, 1))}
    for batch, length in itertools.product((1, 2, 64), sorted(lengths)):
        full, shorter = (evaluate(one, batch, length, 2) for one in (made, short))
        if full is None or full.decode is None or shorter is None or shorter.decode is None:
            return made
        if abs(full.decode.nbytes - shorter.decode.nbytes) > AGREES * full.decode.nbytes + SLACK:
            return made
    return short


def _numbered(name: str, layers: Layers | None, chosen: Sequence[int]) -> str:
    """Give the layers in a name the numbers that they have in the whole model."""
    if layers is None:
        return name
    own = re.escape(layers.path)
    return re.sub(rf"(?<= {own}\.)\d+", lambda number: str(chosen[int(number[0])]), name)


def _checked(made: TracedMemory, whole: int) -> TracedMemory:
    """Note how far a record is from a trace of all layers."""
    given = evaluate(made, *CHECKED_SIZES)
    deviation = given.allocated_bytes / whole - 1 if given is not None else float("inf")
    if abs(deviation) > DEVIATION:
        raise LayersDiffer(f"{len(made.layers)} layers hold {whole} bytes, of the traces of some of them follows {deviation:+.1%}")
    return msgspec.structs.replace(made, deviation=round(deviation, 6) + 0.0)  # no -0.0


def source() -> str:
    """Name the libraries that are installed and run in a trace, with their versions."""
    libraries = ("transformers", "torch", "bitsandbytes")
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in libraries)


def _about(model: Any, precision: str, weights: int, capability: str) -> dict[str, Any]:
    attention = model.config._attn_implementation or "eager"
    said: dict[str, Any] = {"source": source(), "precision": precision, "attention": attention}
    return said | {"weights_bytes": weights} | ({"capability": capability} if capability != WITH_FLASH else {})


def _unpackings(model: Any, cards: Sequence[CardKernels]) -> Iterator[Condition]:
    dtype = next((module.compute_dtype for module in model.modules() if type(module).__name__ == "Linear4bit"), torch.bfloat16)
    for outputs, inputs in fake_model.linears_in_4_bits(model):
        ranges = tuple(tuple(kernels.packed_rows(dtype, outputs, inputs, card)) for card in cards)
        yield Condition(name=f"unpack {outputs} {inputs}", packed=ranges)
