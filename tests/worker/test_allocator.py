"""The model of torch's caching allocator: every rule by itself, what must hold for any program, and torch's own constants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.worker.trace import allocator, ledger
from harness.worker.trace.allocator import CachingAllocator, needs, run_events

KIB, MIB = 1 << 10, 1 << 20
HEADER = Path(torch.__file__).parent / "include" / "c10" / "core" / "AllocatorConfig.h"
either = pytest.mark.parametrize("expandable", [False, True])


def test_the_sizes_are_those_of_the_torch_that_is_installed() -> None:
    text = HEADER.read_text()
    constants = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", text))
    large = re.search(r"large_segment_size_\{(\d+)\}", text)
    assert large, "the size of large segments is told elsewhere"
    ours = {
        "kMinBlockSize": allocator.MIN_BLOCK,
        "kSmallSize": allocator.SMALL,
        "kSmallBuffer": allocator.SMALL_SEGMENT,
        "kMinLargeAlloc": allocator.MIN_LARGE,
        "kRoundLarge": allocator.ROUND_LARGE,
    }
    assert {name: int(size) for name, size in constants.items()} == ours
    assert int(large[1]) == allocator.LARGE_SEGMENT
    assert ledger.GRAIN == allocator.MIN_BLOCK


def test_what_is_off_by_default_is_off_in_the_torch_that_is_installed() -> None:
    text = HEADER.read_text()
    assert "max_split_size_{std::numeric_limits<size_t>::max()}" in text
    assert "garbage_collection_threshold_{0}" in text
    assert "use_expandable_segments_{false}" in text


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_sizes_are_rounded_to_blocks_of_512_bytes(asked: int, taken: int) -> None:
    found = CachingAllocator()
    found.malloc(asked)
    assert found.allocated == taken


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (25 * MIB, 26 * MIB),
    ],
)
def test_segments_have_2_mib_20_mib_or_their_own_size(asked: int, reserved: int) -> None:
    found = CachingAllocator()
    found.malloc(asked)
    assert found.reserved == reserved


def test_small_and_large_allocations_share_no_segment() -> None:
    found = CachingAllocator()
    found.malloc(2 * MIB)
    found.malloc(MIB)
    assert found.reserved == 22 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    found = CachingAllocator()
    blocks = [found.malloc(size * MIB) for size in (40, 12, 30, 12)]
    for block in blocks:
        found.free(block)
    assert found.malloc(11 * MIB + 1).address == blocks[1].address
    assert found.malloc(12 * MIB).address == blocks[3].address
    assert found.malloc(12 * MIB).address == blocks[2].address
    assert found.reserved == 94 * MIB


def test_of_a_large_block_no_more_than_a_mib_is_wasted_and_of_a_small_one_nothing() -> None:
    found = CachingAllocator()
    block = found.malloc(20 * MIB)
    found.free(block)
    assert found.malloc(19 * MIB).size == 20 * MIB  # what is left is not more than 1 MiB: not split
    found = CachingAllocator()
    found.free(found.malloc(20 * MIB))
    assert found.malloc(19 * MIB - 512).size == 19 * MIB - 512
    small = CachingAllocator()
    small.malloc(MIB)
    small.malloc(MIB - 512)
    small.malloc(512)
    assert small.reserved == 2 * MIB


def test_free_neighbors_are_joined_on_both_sides() -> None:
    found = CachingAllocator()
    left, middle, right, last = (found.malloc(5 * MIB) for _ in range(4))
    for block in (left, right, middle):
        found.free(block)
    assert found.malloc(15 * MIB).address == left.address
    assert found.reserved == 20 * MIB
    found.free(last)


def test_cached_segments_go_back_when_there_is_no_room_and_split_ones_stay() -> None:
    found = CachingAllocator(limit=60 * MIB)
    whole, split = found.malloc(20 * MIB), found.malloc(4 * MIB)
    found.free(whole)
    found.malloc(30 * MIB)  # 20 + 20 + 30 are too many: the first goes
    assert (found.reserved, found.retries) == (50 * MIB, 1)
    assert not split.free
    with pytest.raises(MemoryError, match=r"17825792 bytes more than 35651584 do not fit into 62914560, 52428800 are reserved"):
        found.malloc(17 * MIB)


def test_expandable_segments_map_pages_of_20_and_of_2_mib() -> None:
    found = CachingAllocator(expandable=True)
    found.malloc(25 * MIB)
    assert found.reserved == 40 * MIB
    found.malloc(15 * MIB)
    assert found.reserved == 40 * MIB
    found.malloc(512)
    assert found.reserved == 42 * MIB


def test_expandable_segments_grow_behind_a_free_block_of_any_size() -> None:
    found = CachingAllocator(expandable=True)
    first, second = found.malloc(20 * MIB), found.malloc(20 * MIB)
    found.free(second)
    assert found.malloc(30 * MIB).address == second.address
    assert found.reserved == 60 * MIB
    assert first.after is not None


def test_expandable_segments_split_down_to_512_bytes() -> None:
    found = CachingAllocator(expandable=True)
    assert found.malloc(20 * MIB - 512).size == 20 * MIB - 512


def test_expandable_segments_prefer_what_cannot_grow() -> None:
    found = CachingAllocator(expandable=True)
    hole, _, tail = found.malloc(30 * MIB), found.malloc(2 * MIB), found.malloc(28 * MIB)
    found.free(tail)  # 28 MiB, and what can be mapped behind
    found.free(hole)
    assert found.malloc(25 * MIB).address == hole.address


def test_free_pages_go_back_one_by_one_and_are_mapped_again_at_the_lowest_address() -> None:
    found = CachingAllocator(limit=100 * MIB, expandable=True)
    first, kept = found.malloc(50 * MIB), found.malloc(10 * MIB)
    found.free(first)
    found.malloc(80 * MIB)  # 60 + 80 are too many: two of the three first pages are free as a whole
    assert (found.reserved, found.retries) == (100 * MIB, 1)
    assert not kept.free
    assert found.malloc(10 * MIB).address < kept.address  # what is left of the third page


def test_an_empty_tensor_asks_for_nothing() -> None:
    assert run_events([0, 512], [0, 1, ~0]).allocated == 512


def test_what_is_warmed_up_takes_in_what_comes_after_it() -> None:
    sizes = [12 * MIB] * 4
    assert run_events(sizes, range(4), sum(sizes)).peak_reserved == 48 * MIB
    assert run_events([11 * MIB] * 4, range(4)).peak_reserved == 48 * MIB


def programs() -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """Sizes, and events that allocate them in order and free some between, in any order."""
    nbytes = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 4 * MIB), st.integers(1, 64 * MIB))

    @st.composite
    def build(draw: Any) -> tuple[list[int], list[int]]:
        sizes: list[int] = draw(st.lists(nbytes, min_size=1, max_size=40))
        events: list[int] = []
        live: list[int] = []
        for number in range(len(sizes)):
            events.append(number)
            live.append(number)
            while live and draw(st.booleans()):
                events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        return sizes, events

    return build()


def check(sizes: Sequence[int], events: Sequence[int], limit: int | None, expandable: bool) -> None:
    """Run a program step by step and hold every state of the allocator against what must always be true."""
    found, live = CachingAllocator(limit, expandable=expandable), {}
    for event in events:
        if event >= 0:
            live[event] = found.malloc(sizes[event])
        else:
            found.free(live.pop(~event))
        taken = sorted((block.address, block.address + block.size) for block in live.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert found.allocated == sum(end - start for start, end in taken) <= found.reserved
        assert limit is None or found.reserved <= limit
    for block in live.values():
        found.free(block)
    found.release_cached()
    assert (found.allocated, found.reserved) == (0, 0)


@either
@settings(max_examples=150, deadline=None)
@given(program=programs())
def test_nothing_overlaps_and_everything_comes_back(program: tuple[list[int], list[int]], expandable: bool) -> None:
    check(*program, None, expandable)


@either
@settings(max_examples=75, deadline=None)
@given(program=programs())
def test_the_least_limit_works_and_lies_between_what_is_allocated_and_reserved(
    program: tuple[list[int], list[int]], expandable: bool
) -> None:
    found = needs(*program, expandable=expandable)
    assert found.allocated <= found.least <= found.reserved
    check(*program, found.least, expandable)
    if found.least > -(-found.allocated // (2 * MIB)) * 2 * MIB:
        with pytest.raises(MemoryError):
            run_events(*program, limit=found.least - 2 * MIB, expandable=expandable)
