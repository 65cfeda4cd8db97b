"""From traces to polynomials: the passes of a trace, the size of every storage fitted, the moments that can be the worst."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.architecture.traced_memory import AFTER, BEFORE, MomentRow, Polynomial, TensorPart, monomials
from harness.worker.trace.passes.loops import cut_loops
from harness.worker.trace.workload import Trace

TracedPoint = tuple[int, int]  # batch, length
Array = NDArray[np.float64]

SLACK_BYTES, SLACK_SHARE = 512, 0.001  # what a fitted size may be off at a point that it was not fitted to
MOST_NAMED = 4
LEAST_NAMED = 0.1  # of the largest: what is smaller is not named


class Pass(NamedTuple):
    """One pass of a trace by itself. `steps` are its events: k when storage k is made, ~k when it is gone.

    `nbytes`, `layers`, `conditions` and `labels` go by storage; the first `held` of them are there when it begins. `before` and
    `cached` are the storages of the KV cache by layer, as the pass finds it and as it leaves it.
    """

    nbytes: tuple[int, ...]
    layers: tuple[int, ...]
    conditions: tuple[str | None, ...]
    labels: tuple[str, ...]
    held: int
    steps: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    cached: tuple[tuple[int, ...], ...]

    @property
    def signature(self) -> int:
        """Hash what runs, sizes aside."""
        operators = tuple(label.partition("[")[0] for label in self.labels)
        return hash((operators, self.layers, self.held, self.steps, self.before, self.cached))


def passes_of(trace: Trace, point: TracedPoint, loops_cut: bool = False) -> list[Pass]:
    """Take a trace apart into its passes, with the storages of each numbered from 0.

    With `loops.cut_loops` a loop shows twice however often it ran (`loops.cut`), so that lengths of many chunks can be compared.
    """
    if loops_cut:
        trace = cut_loops(trace)
    ends = [*trace.passes[1:], len(trace.events)]
    live: dict[int, None] = {}
    found: list[Pass] = []
    for number, (start, end) in enumerate(zip(trace.passes, ends, strict=True)):
        order = {ident: index for index, ident in enumerate(live)}
        held, steps = len(order), []
        for event in trace.events[start:end]:
            if event >= 0:
                live[event] = None
                steps.append(order.setdefault(event, len(order)))
            else:
                del live[~event]
                steps.append(~order[~event])
        made = [trace.allocations[ident] for ident in order]
        before = trace.cached[number - 1] if number else [() for _ in trace.cached[0]]
        found.append(
            Pass(
                tuple(one.nbytes for one in made),
                tuple(one.layer for one in made),
                tuple(one.condition for one in made),
                tuple(f"{one.operator.partition('::')[2].partition('.')[0] or one.operator} "
                      f"{one.dtype}[{_symbols(one.shape, point)}] of {one.path or 'generate'}" for one in made),
                held,
                tuple(steps),
                *(tuple(tuple(order[ident] for ident in layer if ident in order) for layer in cache)
                  for cache in (before, trace.cached[number])),
            )
        )  # fmt: skip
    return found


def _symbols(shape: Sequence[int], point: TracedPoint) -> str:
    """Write a shape with B for the batch and S for the length."""
    batch, length = point
    named = {length: "S", length + 1: "S+1", batch * length: "B*S"}
    return ", ".join(named.get(size, "B" if size == batch and not index else str(size)) for index, size in enumerate(shape))


def fit(points: Sequence[TracedPoint], sizes: Array) -> Array:
    """Return the polynomials [storages, 6] through sizes [points, storages].

    Raises:
        ValueError: the sizes are none; the last points are there to show that.
    """
    at = np.array([monomials(*point) for point in points], dtype=np.float64)
    scale = at.max(axis=0)
    usable = [0, 2, 4] if len({batch for batch, _ in points}) == 1 else list(range(6))
    solved = np.linalg.lstsq(at[:, usable] / scale[usable], sizes, rcond=None)[0]
    found = np.zeros((6, sizes.shape[1]))
    found[usable] = solved / scale[usable, None]
    rounded = np.round(found)
    found = np.where(np.abs(found - rounded) * scale[:, None] < 1e-6 * np.maximum(sizes.max(axis=0), 1), rounded, found)
    off = np.abs(at @ found - sizes) > SLACK_BYTES + SLACK_SHARE * sizes
    if off.any():
        raise ValueError(f"the sizes of {int(off.any(axis=0).sum())} storages are no polynomials in batch and length")
    return found.T


def by_chunk(polynomials: Array, start: TracedPoint, step: int, sizes: Array, further: Array) -> Array:
    """Tell sizes that grow with every token from those that grow by chunks, and return the polynomials of both.

    [storages, 6] become [storages, 12], as `monomials` has them.

    `sizes` and `further` are those [storages] at the first length of a chunk and one token later.

    Raises:
        ValueError: some do neither.
    """
    padded = polynomials[:, 2:].any(axis=1) & (sizes == further)
    found = np.zeros((len(polynomials), 12))
    found[~padded, :6], found[padded, 6:] = polynomials[~padded], polynomials[padded]
    off = (
        np.abs(found @ np.array(monomials(start[0], start[1] + 1, step), dtype=np.float64) - further)
        > SLACK_BYTES + SLACK_SHARE * sizes
    )
    if off.any():
        raise ValueError(f"the sizes of {int(off.sum())} storages grow neither by the token nor by chunks of {step}")
    return found


class Moments(NamedTuple):
    """All moments of a pass: place, bytes beside the cache [moments, 6], condition and extra bytes, and the step they follow."""

    places: list[int]
    nbytes: Array
    conditions: list[str | None]
    extra: Array
    steps: list[int]


def moments(one: Pass, polynomials: Array, kinds: Sequence[int]) -> Moments:
    """Follow a pass and note what is alive after each storage is made, without the KV cache that belongs to the place."""
    apart = _cache_at(*cached_bytes(one, polynomials, bool(kinds)))
    after = max(apart)
    none = np.zeros(polynomials.shape[1])
    plain, extra = polynomials[: one.held].sum(axis=0), defaultdict[str, Array](lambda: none)
    found: list[tuple[int, Array, str | None, Array, int]] = []
    for step, event in enumerate(one.steps):
        storage = event if event >= 0 else ~event
        condition, sign = one.conditions[storage], 1 if event >= 0 else -1
        if condition is None:
            plain = plain + sign * polynomials[storage]
        else:
            extra[condition] = extra[condition] + sign * polynomials[storage]
        if event < 0:
            continue
        layer = one.layers[storage]
        number = -1 if layer < 0 else min(layer, after) if kinds else after
        place = BEFORE if number < 0 else AFTER if number == after else kinds[number]
        taken = next((name for name, nbytes in extra.items() if nbytes.any()), None)
        more = extra[taken] if taken is not None else none
        found.append((place, plain - apart[number], taken, more, step))
    places, nbytes, conditions, extras, steps = zip(*found, strict=True)
    return Moments(list(places), np.array(nbytes), list(conditions), np.array(extras), list(steps))


def cached_bytes(one: Pass, polynomials: Array, by_layer: bool) -> tuple[Array, Array]:
    """Return the KV cache before and after a pass [layers, 6]; as that of one layer where it is not kept by layer."""
    before, after = (
        np.array([polynomials[list(layer)].sum(axis=0) for layer in side]).reshape(-1, polynomials.shape[1])
        for side in (one.before, one.cached)
    )
    return (before, after) if by_layer else (before.sum(axis=0, keepdims=True), after.sum(axis=0, keepdims=True))


def _cache_at(before: Array, after: Array) -> dict[int, Array]:
    """Return the KV cache that belongs to each layer's number: its own and those before it have the new tokens."""
    count = len(after)
    whole = {index: after[: index + 1].sum(axis=0) + before[index + 1 :].sum(axis=0) for index in range(count)}
    return {-1: before.sum(axis=0), **whole, count: after.sum(axis=0)}


def worst(found: Moments, grid: Sequence[TracedPoint], step: int) -> list[int]:
    """Choose the moments that are the largest of their place somewhere on a grid, with and without their condition."""
    at = np.array([monomials(*point, step) for point in grid], dtype=np.float64).T
    plain, extra = found.nbytes @ at, found.extra @ at
    groups: dict[int, list[int]] = defaultdict(list)
    for index, place in enumerate(found.places):
        groups[place].append(index)
    chosen: set[int] = set()
    for members in groups.values():
        rows = np.array(members)
        best = plain[rows].max(axis=0)
        chosen |= {int(rows[index]) for index in plain[rows].argmax(axis=0)}
        for condition in {found.conditions[index] for index in members} - {None}:
            under = np.array([index for index in members if found.conditions[index] == condition])
            total = plain[under] + extra[under]
            chosen |= {
                int(under[row])
                for row, top, least in zip(total.argmax(axis=0), total.max(axis=0), best, strict=True)
                if top > least
            }
    return sorted(chosen)


def row(
    one: Pass, polynomials: Array, found: Moments, index: int, names: dict[str, int], numbers: Mapping[str | None, int]
) -> MomentRow:
    """Write one moment down, with the largest tensors that are alive in it."""
    cached = {storage for side in (one.before, one.cached) for layer in side for storage in layer}
    live = dict.fromkeys(range(one.held))
    for event in one.steps[: found.steps[index] + 1]:
        if event >= 0:
            live[event] = None
        else:
            del live[~event]
    parts = sorted(_parts(one, polynomials, set(live) - cached), key=lambda part: -part[2])[:MOST_NAMED]
    parts = [part for part in parts if part[2] >= LEAST_NAMED * parts[0][2]]
    return MomentRow(
        place=found.places[index],
        nbytes=tidy(found.nbytes[index]),
        condition=numbers[found.conditions[index]],
        extra=tidy(found.extra[index]),
        parts=tuple(
            TensorPart(name=names.setdefault(label, len(names)), monomial=monomial, nbytes=nbytes)
            for label, monomial, _, nbytes in parts
        ),
    )


REFERENCE = (1, 4096)  # what decides which tensors are named


def _parts(one: Pass, polynomials: Array, live: set[int]) -> Iterator[tuple[str, int, float, float]]:
    at = np.array(monomials(*REFERENCE) * (polynomials.shape[1] // 6))
    for storage in live:
        weighed = polynomials[storage] * at
        largest = int(weighed.argmax())
        yield one.labels[storage], largest, float(weighed[largest]), _number(polynomials[storage][largest])


def tidy(polynomial: Array) -> Polynomial:
    """Write a polynomial with whole coefficients where it has such, up to the last that is not 0."""
    numbers = [_number(coefficient) for coefficient in polynomial]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _number(value: float) -> float:
    rounded = round(float(value))
    return rounded if abs(value - rounded) < 1e-3 else round(float(value), 3)
