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
    chunk_start,
    evaluate,
    monomials,
    value,
)
from harness.core.precisions import PRECISIONS
from harness.worker.trace import fake_model, kernels, reserve, workload
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.ledger import CARD, Ledger, fake_card
from harness.worker.trace.passes.fit import TracedPoint, by_chunk, cached_bytes, fit, moments, row, tidy, worst
from harness.worker.trace.passes.tracer import CHUNKS, NEW_TOKENS, PAIR, PROBES, Tracer
from harness.worker.trace.quantized_kernels import conditions_of
from harness.worker.trace.whole import stand_ins

LEAST_LENGTH, SLACK = 41, 1 << 16
AGREES = 0.002  # what one sequence alone may differ from the polynomials of several
DEVIATION = 0.005  # what a record may differ from a trace of all layers; beyond, all are traced
CHECKED_SIZES = (2, 1501, 2)  # batch, prompt, new tokens


class Recorder:
    """Turns the traces of one model into regimes; `conditions` are numbered as the record has them."""

    def __init__(self, tracer: Tracer, conditions: Sequence[Condition]) -> None:
        self._tracer, self._kinds = tracer, tracer.kinds()
        self._numbers: dict[str | None, int] = {None: -1, **{one.name: index for index, one in enumerate(conditions)}}
        self.names: dict[str, int] = {}

    def passes(self) -> list[tuple[Regime, ...]]:
        """Return the regimes of all passes, by chunks of the prompt where it is walked in such, or where its length does not tell.

        Raises:
            ValueError: chunks do not tell it either.
        """
        if self._tracer.walks_chunks():
            self._tracer.look_at_chunks()
            return self._passes()
        try:
            return self._passes()
        except ValueError as error:
            said = str(error)
        try:
            self._tracer.look_at_chunks()
            return self._passes()
        except ValueError as error:
            raise ValueError(f"{said}; by chunks of {self._tracer.step}: {error}") from None

    def _passes(self) -> list[tuple[Regime, ...]]:
        self.names.clear()
        return [tuple(self.regimes(number)) for number in range(NEW_TOKENS)]

    def regimes(self, number: int) -> Iterator[Regime]:
        """Yield the regimes of a pass; one sequence alone has its own where what it holds does not follow from that of several."""
        for start, after in pairwise([1, *self._tracer.starts(number), None]):
            lengths = (int(start or 1), after - 1 if after else None)
            sizes = _samples(*lengths, self._step(number))
            crowd = self._tracer.crowd(number, sizes[0])
            several = self._regime(number, lengths, (PAIR, crowd - 1 if crowd else None), _points(PAIR, sizes))
            for probe in self._tracer.probes:
                if several.covers(PAIR, probe) and probe >= LEAST_LENGTH and not self._agrees(number, several, (PAIR, probe)):
                    raise ValueError(f"pass {number} holds other than its polynomials say at a length of {probe}")
            if self._agrees(number, several, (1, sizes[1])):
                several = msgspec.structs.replace(several, batches=(1, several.batches[1]))
            else:
                yield self._regime(number, lengths, (1, 1), [(1, size) for size in sizes])
            yield several
            if crowd:
                yield self._regime(number, lengths, (crowd, None), _points(crowd, sizes))

    def _step(self, number: int) -> int:
        return self._tracer.step if number == 0 else 1  # after the prompt each pass takes one token

    def _regime(self, number: int, lengths: Range, batches: Range, points: list[TracedPoint]) -> Regime:
        if not self._tracer.alike(number, points):
            raise ValueError(f"pass {number} runs other operators at some of {points}")
        traced = [self._tracer.passes(point)[number] for point in points]
        sizes = np.array([one.nbytes for one in traced], dtype=np.float64)
        polynomials, one, step = fit(points, sizes), traced[1], self._step(number)
        if step > 1:
            batch, length = points[1]
            further = self._tracer.passes((batch, length + 1))[number]
            polynomials = by_chunk(polynomials, points[1], step, sizes[1], np.array(further.nbytes, dtype=np.float64))
        found = moments(one, polynomials, self._kinds)
        grid = [(batch, length) for batch in _spread(*batches, most=256) for length in _spread(*lengths, most=1 << 18)]
        rows = tuple(row(one, polynomials, found, index, self.names, self._numbers) for index in worst(found, grid, step))
        before, cached = (self._by_kind(side) for side in cached_bytes(one, polynomials, bool(self._kinds)))
        return Regime(lengths=lengths, batches=batches, before=before, cached=cached, rows=rows, step=step)

    def _by_kind(self, cache: Any) -> tuple[Polynomial, ...]:
        kinds = self._kinds or (0,)
        return tuple(tidy(cache[kinds.index(kind)]) for kind in range(max(kinds) + 1))

    def _agrees(self, number: int, regime: Regime, point: TracedPoint) -> bool:
        """Say whether a regime gives what was traced at a size outside of it, in every place."""
        one = self._tracer.passes(point)[number]
        real = np.zeros((len(one.nbytes), 6))
        real[:, 0] = one.nbytes
        found, at = moments(one, real, self._kinds), monomials(*point, regime.step)
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


def _samples(first: int, last: int | None, step: int) -> list[int]:
    """Choose four lengths within a range, odd as those looked at, the same for ranges that begin or end nearly alike."""
    least = LEAST_LENGTH if step == 1 else CHUNKS * step
    low = max(first, least) if last is None or last > 2 * least else first
    low = -(-low // 8) * 8
    high = min(last // 8 * 8 if last is not None else 4 * low, 4 * low)
    if high - low < 16:
        raise ValueError(f"lengths from {first} to {last} are too few to tell how sizes grow")
    chosen = [int(low + (high - low) * share) | 1 for share in (0.0, 0.4, 0.9, 0.6)]
    return [chunk_start(length, step) for length in chosen]


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
    cards = cards_of(family(kernels_of(capability), precision), precision)
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
        prefill, first, later = recorder.passes()
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
    for one in conditions_of(model):
        yield Condition(name=one.name, packed=(one.rows,) * len(cards))
