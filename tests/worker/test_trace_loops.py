"""Loops over chunks: cut to two rounds they hold what all of them hold, and sizes that grow by chunks are told from others."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch

from harness.architecture.traced_memory import chunk_start, monomials, value
from harness.worker.trace.ledger import CARD, Allocation, fake_card
from harness.worker.trace.passes.fit import by_chunk, passes_of
from harness.worker.trace.passes.loops import cut_loops
from harness.worker.trace.workload import Trace


def walked(rounds: int, kept: bool = False) -> Trace:
    """Trace a loop in Python as a linear attention has one: each round a product, and a state that takes the place of the last."""
    held = []
    with fake_card({}, (8, 0)) as ledger:
        ledger.reset()
        around = torch.empty(4096, device=CARD)
        state = torch.zeros(64, device=CARD)
        for _ in range(rounds):
            product = around.exp()
            state = state + product[:64]
            if kept:
                held.append(product)
            del product
        out = state.sum()
        cached = ledger.number(state)
        assert cached is not None
        found = Trace(ledger.allocations, list(ledger.events), [0], [[(cached,)]], 0, ledger.peak[CARD])
        del out, around, held
    return found


def peak(trace: Trace) -> int:
    sizes = (trace.allocations[max(event, ~event)].handed_out * (1 if event >= 0 else -1) for event in trace.events)
    return max(accumulate(sizes))


@pytest.mark.parametrize("rounds", [1, 3, 4, 7, 40])
def test_a_loop_that_is_cut_holds_what_it_held(rounds: int) -> None:
    whole = walked(rounds)
    short = cut_loops(whole)
    assert peak(short) == peak(whole) == whole.peak_bytes
    if rounds > 3:
        assert len(short.events) < len(whole.events)


def test_loops_of_any_length_are_alike_once_cut() -> None:
    signatures = {passes_of(walked(rounds), (1, rounds), loops_cut=True)[0].signature for rounds in (5, 6, 17, 40)}
    assert len(signatures) == 1
    assert len({passes_of(walked(rounds), (1, rounds))[0].signature for rounds in (5, 6, 17, 40)}) == 4


def test_the_cache_that_a_loop_leaves_is_still_there() -> None:
    (one,) = passes_of(walked(12), (1, 12), loops_cut=True)
    assert [[one.nbytes[storage] for storage in layer] for layer in one.cached] == [[256]]


def test_a_loop_that_keeps_what_it_makes_is_left() -> None:
    whole = walked(9, kept=True)
    assert cut_loops(whole).events == whole.events


def test_what_is_made_before_a_loop_may_be_gone_in_its_first_round() -> None:
    """Then the first round is not like the others, and stays."""
    made = Allocation(1024, "made", (), "float32", "", 0, None, CARD)
    allocations = [made] * 8
    # 0 before the loop; each round makes one and frees the one before it; the first frees it late
    events = [0, 1, 2, ~0, ~1, 3, ~2, 4, ~3, 5, ~4, 6, ~5, 7, ~6]
    short = cut_loops(Trace(allocations, events, [0], [[()]], 0, 0))
    alive = set()
    for event in short.events:
        if event >= 0:
            alive.add(event)
        else:
            alive.remove(~event)  # a KeyError if what is freed was never made
    assert alive == {7}
    assert len(short.events) < len(events)


def test_sizes_by_the_token_and_by_chunks_are_told_apart() -> None:
    """At the first length of a chunk both look alike."""
    step, start = 64, (2, 129)
    plain = np.array([[0, 0, 8, 0, 0, 0], [0, 0, 0, 16, 0, 0], [100, 0, 0, 0, 0, 0]], dtype=np.float64)
    sizes, further = np.array([8 * 129, 16 * 2 * 129, 100]), np.array([8 * 130, 16 * 2 * 129, 100])
    found = by_chunk(plain, start, step, sizes, further)
    for length in (129, 150, 192, 193):
        at = monomials(2, length, step)
        first = chunk_start(length, step)
        assert [value(one, at) for one in found] == [8 * length, 16 * 2 * first, 100]


def test_sizes_that_do_neither_are_refused() -> None:
    plain = np.array([[0, 0, 1 << 16, 0, 0, 0]], dtype=np.float64)
    with pytest.raises(ValueError, match="1 storages grow neither by the token nor by chunks of 64"):
        by_chunk(plain, (2, 129), 64, np.array([129 << 16]), np.array([129 << 16]) + 4096)


@pytest.mark.parametrize(("length", "start"), [(1, 1), (64, 1), (65, 65), (128, 65), (129, 129)])
def test_chunks_begin_after_each_multiple(length: int, start: int) -> None:
    assert chunk_start(length, 64) == start
