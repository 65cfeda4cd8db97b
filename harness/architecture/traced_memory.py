"""What a traced model holds for any workload: live bytes as polynomials in batch and length, and the arithmetic on them. No torch.

A trace follows transformers' own code (`harness.worker.trace`) through three passes: the prompt's, the first decode step, and those
after it. A pass is a sequence of moments, each with what is alive; where one moment is never above another it is left out, and a
handful of rows remains. The KV cache is kept apart from them, by kind of layer, so that the passes of a few layers hold for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from harness.architecture.card_kernels import WITH_FLASH, CardKernels, cards_of, family, kernels_of
from harness.core.records import Record

Range = tuple[int, int | None]  # first and last, None without end
Spread = tuple[float, float, float]  # the least, the median and the most of several
# Of batch B and length S: 1, B, S, B S, S², B S²; where sequences are padded to chunks, the same of the least length that is padded
# as far, for what is as large for all of a chunk. What is not written is 0.
Polynomial = tuple[float, ...]
BEFORE, AFTER = -1, -2  # the places of moments outside of the decoder layers: no layer has cached the new tokens yet, or all have
# A copy of the mask, unless the keys are a multiple of 16; cuDNN takes a mask as it is, but no head as wide as the second's.
UNALIGNED, UNALIGNED_WIDE = "unaligned", "unaligned wide"
ALIGNED = 16


def chunk_start(length: int, step: int) -> int:
    """Return the least length that takes as many chunks of `step` tokens."""
    return (length - 1) // step * step + 1


def monomials(batch: int, length: int, step: int = 1) -> tuple[int, ...]:
    """Return what the coefficients of a polynomial are multiplied with; with chunks, those of the chunk's start follow."""
    plain = (1, batch, length, batch * length, length**2, batch * length**2)
    return plain if step == 1 else (*plain, *monomials(batch, chunk_start(length, step)))


class TensorPart(Record, frozen=True, kw_only=True, array_like=True):
    """One of the largest tensors of a row: its name in `TracedMemory.names`, and `nbytes` times one of the monomials."""

    name: int
    monomial: int
    nbytes: float


class MomentRow(Record, frozen=True, kw_only=True, array_like=True):
    """A moment: bytes alive beside weights and KV cache, in layers of the kind `place`, or BEFORE or AFTER them.

    `extra` are bytes that come on top where `condition`, a number in `TracedMemory.conditions`, holds; -1 without one.
    """

    place: int
    nbytes: Polynomial
    condition: int
    extra: Polynomial
    parts: tuple[TensorPart, ...]


class Regime(Record, frozen=True, kw_only=True, array_like=True):
    """Lengths and batches (first, last; None without end) in which a pass runs the same operators.

    `before` and `cached` are the bytes of the KV cache of one layer, by kind, before and after the pass. `step` is the chunk that
    some of what the pass makes is padded to, or 1.
    """

    lengths: Range
    batches: Range
    before: tuple[Polynomial, ...]
    cached: tuple[Polynomial, ...]
    rows: tuple[MomentRow, ...]
    step: int = 1

    def covers(self, batch: int, length: int) -> bool:
        """Say whether a workload lies inside."""
        sides = ((batch, self.batches), (length, self.lengths))
        return all(first <= value and (last is None or value <= last) for value, (first, last) in sides)


class Condition(Record, frozen=True, kw_only=True, array_like=True):
    """What decides on extra bytes: keys that are no multiple of 16, or rows of a 4-bit product outside of the ranges of a card.

    `packed` has these ranges (first, last) for each of the cards that the record is for, in the order of their table.
    """

    name: str
    packed: tuple[tuple[tuple[int, int], ...], ...] = ()

    def holds(self, tokens: int, keys: int, number: int, card: CardKernels) -> bool:
        """Return whether it holds for a pass over `tokens` tokens of all sequences that attends to `keys` keys, on a card."""
        if self.name in (UNALIGNED, UNALIGNED_WIDE):
            return keys % ALIGNED != 0 and not (card.takes_cudnn and self.name == UNALIGNED)
        return not any(first <= tokens <= last for first, last in self.packed[number])


class Gaps(Record, frozen=True, kw_only=True, array_like=True):
    """What torch's allocator takes beyond what is allocated at the peak, as shares of that without the weights.

    `least` of what it gets through with once it has given back what it can, `kept` of what it takes where there is room.
    """

    least: Spread
    kept: Spread


class Reserved(Record, frozen=True, kw_only=True, array_like=True):
    """The gaps of a model with torch's usual segments and with expandable ones, over workloads of many sizes."""

    usual: Gaps
    expandable: Gaps


class TracedMemory(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One architecture in one precision. `layers` has the kind of each decoder layer; `source` names the libraries that ran.

    It holds for the cards of the family `capability` (`harness.architecture.card_kernels`). `first` is empty where the first decode
    step is like all later ones, one token earlier. `deviation` is the relative error of the peak that this record gives where the
    whole model was traced beside it. `reserved` comes from a replay of what it allocates
    (`harness.worker.trace.reserve`); None where that could not be made.
    """

    source: str
    precision: str
    attention: str
    weights_bytes: int
    layers: tuple[int, ...]
    prefill: tuple[Regime, ...]
    later: tuple[Regime, ...]
    first: tuple[Regime, ...] = ()
    capability: str = WITH_FLASH
    conditions: tuple[Condition, ...] = ()
    names: tuple[str, ...] = ()
    deviation: float = 0.0
    reserved: Reserved | None = None


class Moment(NamedTuple):
    """What is held at the worst moment of a pass: all bytes beside the weights, those of the KV cache, the largest tensors."""

    nbytes: int
    kv_bytes: int
    tensors: tuple[tuple[str, int], ...]


class TracedPeak(NamedTuple):
    """What a workload holds on one card: the weights, the KV cache at the end, and the worst moments of prefill and decode."""

    weights_bytes: int
    kv_bytes: int
    prefill: Moment
    decode: Moment | None

    @property
    def worst(self) -> Moment:
        """The larger of the two."""
        return max((moment for moment in (self.prefill, self.decode) if moment is not None), key=lambda moment: moment.nbytes)

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator has handed out at the peak, without the CUDA context."""
        return self.weights_bytes + self.worst.nbytes

    @property
    def activation_bytes(self) -> int:
        """What the peak has beyond the weights and the final KV cache."""
        return max(*self.phases, 0)

    @property
    def phases(self) -> tuple[int, int]:
        """What prefill and decode have at most beyond the weights and the final KV cache; less than 0 if that is larger."""
        decode = self.decode.nbytes if self.decode is not None else 0
        return self.prefill.nbytes - self.kv_bytes, decode - self.kv_bytes


def evaluate(traced: TracedMemory, batch: int, prompt: int, new_tokens: int, capability: str | None = None) -> TracedPeak | None:
    """Return what generating `new_tokens` from `batch` prompts of `prompt` tokens holds on a card of a compute capability.

    None of a length that was not traced, and of a card that the record does not hold for. Without a capability it is that of the
    family.
    """
    card = kernels_of(capability or traced.capability)
    if family(card, traced.precision) != traced.capability:
        return None
    start = _regime(traced.prefill, batch, prompt)
    if start is None:
        return None
    prefill, kv_bytes = _worst(traced, start, batch, prompt, batch * prompt, card), _all(traced, start, batch, prompt)
    first = (traced.first, prompt) if traced.first else (traced.later, max(prompt - 1, 1))
    steps = [first] if new_tokens > 1 else []
    steps += [(traced.later, prompt + new_tokens - 3)] if new_tokens > 2 else []
    moments = []
    for regimes, length in steps:
        regime = _regime(regimes, batch, length)
        if regime is None:
            return None
        moments.append(_worst(traced, regime, batch, length, batch, card))
        kv_bytes = _all(traced, regime, batch, length)
    decode = max(moments, key=lambda moment: moment.nbytes, default=None)
    return TracedPeak(traced.weights_bytes, kv_bytes, prefill, decode)


def _regime(regimes: Sequence[Regime], batch: int, length: int) -> Regime | None:
    return next((regime for regime in regimes if regime.covers(batch, length)), None)


def value(polynomial: Sequence[float], at: Sequence[int]) -> float:
    """Return a polynomial's value, at what `monomials` says; one without coefficients is 0."""
    total: float = sum(map(mul, polynomial, at))  # what is not written is 0
    return total


def _all(traced: TracedMemory, regime: Regime, batch: int, length: int) -> int:
    at = monomials(batch, length, regime.step)
    return round(sum(value(regime.cached[kind], at) for kind in traced.layers))


def _worst(traced: TracedMemory, regime: Regime, batch: int, length: int, tokens: int, card: CardKernels) -> Moment:
    """Find the moment that holds the most. A pass over many tokens is that of the prompt, and sees as many keys as it has."""
    at, keys = monomials(batch, length, regime.step), length
    held = _cached(traced.layers, regime, at)
    cards = cards_of(traced.capability, traced.precision)
    number = cards.index(card) if card in cards else 0
    met = [condition.holds(tokens, keys, number, card) for condition in traced.conditions]

    totals = [
        held[row.place] + value(row.nbytes, at) + (value(row.extra, at) if row.condition >= 0 and met[row.condition] else 0.0)
        for row in regime.rows
    ]
    most = max(totals)
    row = regime.rows[totals.index(most)]
    tensors = tuple((traced.names[part.name], round(part.nbytes * at[part.monomial])) for part in row.parts)
    return Moment(round(most), round(held[row.place]), tensors)


def _cached(layers: Sequence[int], regime: Regime, at: Sequence[int]) -> Mapping[int, float]:
    """Return the most bytes of the whole KV cache while a layer of each kind runs, and those outside of all."""
    before = [value(polynomial, at) for polynomial in regime.before]
    grown = [value(polynomial, at) - least for polynomial, least in zip(regime.cached, before, strict=True)]
    start = sum(map(before.__getitem__, layers))
    held = list(accumulate(map(grown.__getitem__, layers), initial=start))
    most = dict.fromkeys(layers, -math.inf)
    for kind, size in zip(layers, held[1:], strict=True):  # while it runs, the new tokens are in its cache and in those before
        if size > most[kind]:
            most[kind] = size
    return most | {BEFORE: start, AFTER: held[-1]}
