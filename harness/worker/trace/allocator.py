"""torch's caching allocator for CUDA, replayed on the events of a ledger: what it reserves, and the least it gets through with.

The rules are those of torch 2.13, c10/cuda/CUDACachingAllocator.cpp, with its default settings and one stream; every function here
names the one that it follows. Sizes are bytes. What is not modeled: max_split_size, garbage_collection_threshold and
roundup_power2_divisions (all off by default), private pools of CUDA graphs, and blocks that wait for another stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

MIN_BLOCK = 512  # kMinBlockSize: all sizes are multiples of it
SMALL = 1 << 20  # kSmallSize: what is larger goes to the pool of large blocks
SMALL_SEGMENT = 2 << 20  # kSmallBuffer: a segment, or a page, of the pool of small blocks
MIN_LARGE = 10 << 20  # kMinLargeAlloc: what is smaller shares a segment of LARGE_SEGMENT
LARGE_SEGMENT = 20 << 20  # large_segment_size(): likewise a page of the pool of large blocks
ROUND_LARGE = 2 << 20  # kRoundLarge: what is larger has a segment of its own, a multiple of this
# Segments begin so far apart, later ones behind earlier ones: a whole number of pages of either pool.
_APART = LARGE_SEGMENT << 26


class MemoryBlock:
    """A piece of a segment: taken or free, and with expandable segments backed by memory or not."""

    __slots__ = ("address", "after", "before", "free", "mapped", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, *, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped, self.free = pool, address, size, mapped, True
        self.before: MemoryBlock | None = None
        self.after: MemoryBlock | None = None

    @property
    def is_split(self) -> bool:
        """Whether it is only a part of its segment."""
        return self.before is not None or self.after is not None

    def cut(self, size: int, *, mapped: bool) -> MemoryBlock:
        """Shorten the block to `size` and return what is left behind it."""
        rest = MemoryBlock(self.pool, self.address + size, self.size - size, mapped=mapped)
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.after, self.size = rest, size
        return rest

    def take_in(self, other: MemoryBlock | None) -> None:
        """Join a free neighbor of the same kind into this block (try_merge_blocks)."""
        if other is None or not other.free or other.mapped is not self.mapped:
            return
        other.pool.remove(other)
        if other is self.before:
            self.address, self.before = other.address, other.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = other.after
            if self.after is not None:
                self.after.before = self
        self.size += other.size


class Pool:
    """Free blocks by size and then address, and apart from them those without memory by address (BlockPool)."""

    def __init__(self, page: int) -> None:
        self.page = page
        self._keys: list[tuple[int, int]] = []
        self._unmapped: list[int] = []
        self._blocks: dict[int, MemoryBlock] = {}

    def add(self, block: MemoryBlock) -> None:
        """Offer a block."""
        self._blocks[block.address] = block
        if block.mapped:
            insort(self._keys, (block.size, block.address))
        else:
            insort(self._unmapped, block.address)

    def remove(self, block: MemoryBlock) -> None:
        """Offer a block no longer."""
        del self._blocks[block.address]
        if block.mapped:
            del self._keys[bisect_left(self._keys, (block.size, block.address))]
        else:
            self._unmapped.remove(block.address)

    def mapped(self) -> list[MemoryBlock]:
        """Return the free blocks with memory, the smallest first."""
        return [self._blocks[address] for _, address in self._keys]

    def unmapped(self) -> list[MemoryBlock]:
        """Return the blocks without memory, the lowest first."""
        return [self._blocks[address] for address in self._unmapped]

    def best_fit(self, size: int) -> MemoryBlock | None:
        """Return the smallest block that is large enough, the lowest of several; None without one (get_free_block).

        A block that memory can still be added to counts as large as it can become, so that others are preferred.
        """
        at = bisect_left(self._keys, (size, 0))
        if at == len(self._keys):
            return None
        found = self._blocks[self._keys[at][1]]
        for _, address in self._keys[at + 1 :] if self._unmapped else ():
            other = self._blocks[address]
            if _expandable_size(other) >= _expandable_size(found):
                break
            found = other
        return found


def _expandable_size(block: MemoryBlock) -> int:
    return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)


def round_size(nbytes: int) -> int:
    """Return what an allocation takes of its segment (round_size)."""
    return max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Return the size of a segment that is asked of the driver for an allocation (get_allocation_size)."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE


class CachingAllocator:
    """The allocator of one card that has `limit` bytes for it, or as many as it likes (DeviceCachingAllocator).

    `expandable` is torch's option expandable_segments: pages are mapped behind one another instead of segments.
    """

    def __init__(self, limit: int | None = None, *, expandable: bool = False) -> None:
        self.limit, self.expandable = limit, expandable
        self.reserved = self.peak_reserved = self.allocated = self.peak_allocated = 0
        self.retries = 0
        self._small, self._large = Pool(SMALL_SEGMENT), Pool(LARGE_SEGMENT)
        self._segments = 0

    def malloc(self, nbytes: int) -> MemoryBlock:
        """Return a block for an allocation (malloc, alloc_found_block).

        Raises:
            MemoryError: there is too little, even with what is cached and free given back to the driver.
        """
        size = round_size(nbytes)
        pool = self._small if size <= SMALL else self._large
        block = pool.best_fit(size)
        if block is not None:
            pool.remove(block)
        else:
            block = self._new(pool, size)
        if block is None:
            self.retries += 1
            self.release_cached()
            block = self._new(pool, size)
        if block is None:
            raise MemoryError(f"{size} bytes more than {self.allocated} do not fit into {self.limit}, {self.reserved} are reserved")
        if self._splits(pool, block.size - size):
            pool.add(block.cut(size, mapped=True))
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: MemoryBlock) -> None:
        """Take a block back, and join it with free ones beside it (free_block)."""
        self.allocated -= block.size
        block.free = True
        block.take_in(block.before)
        block.take_in(block.after)
        block.pool.add(block)

    def release_cached(self) -> None:
        """Give segments that are wholly free, or free pages, back to the driver (release_cached_blocks)."""
        for pool in (self._large, self._small):
            for block in pool.mapped():
                if self.expandable:
                    self._unmap(block)
                elif not block.is_split:
                    pool.remove(block)
                    self.reserved -= block.size

    def _splits(self, pool: Pool, rest: int) -> bool:
        """Say whether what an allocation leaves of a block is worth keeping apart (should_split)."""
        return rest >= MIN_BLOCK if self.expandable or pool is self._small else rest > SMALL

    def _new(self, pool: Pool, size: int) -> MemoryBlock | None:
        """Return memory that was not reserved before, out of every pool; None if there is none (alloc_block)."""
        if self.expandable:
            return self._expand(pool, size)
        whole = segment_size(size)
        return self._segment(pool, whole) if self._reserve(whole) else None

    def _segment(self, pool: Pool, size: int, *, mapped: bool = True) -> MemoryBlock:
        self._segments += 1
        return MemoryBlock(pool, self._segments * _APART, size, mapped=mapped)

    def _reserve(self, size: int) -> bool:
        if self.limit is not None and self.reserved + size > self.limit:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _expand(self, pool: Pool, size: int) -> MemoryBlock | None:
        """Map pages until a block is large enough (try_allocate_expandable_block)."""
        block = self._expandable(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            more = block.after
            assert more is not None, "a free block that is too small is followed by one without memory"
            if not self._map(more, min(size - block.size, more.size)):
                return None
            block = more  # which has taken in the one before it
        pool.remove(block)
        return block

    def _expandable(self, pool: Pool, size: int) -> MemoryBlock:
        """Return the lowest place where pages can be mapped, a free block before it included (find_expandable_block)."""
        for block in pool.unmapped():
            start = block.before if block.before is not None and block.before.free else block
            there: MemoryBlock | None = start
            room = 0
            while there is not None and there.free and room < size:
                room += there.size
                there = there.after
            if room >= size:
                return start
        segment = self._segment(pool, _APART, mapped=False)
        pool.add(segment)
        return segment

    def _map(self, block: MemoryBlock, size: int) -> bool:
        """Put memory behind the first `size` bytes of a block, in whole pages (map_block, ExpandableSegment::map)."""
        whole = -(-size // block.pool.page) * block.pool.page
        if not self._reserve(whole):
            return False
        block.pool.remove(block)
        if whole < block.size:
            block.pool.add(block.cut(whole, mapped=False))
        block.mapped = True
        block.take_in(block.before)
        block.take_in(block.after)
        block.pool.add(block)
        return True

    def _unmap(self, block: MemoryBlock) -> None:
        """Give the pages that lie wholly within a free block back (unmap_block)."""
        pool, page = block.pool, block.pool.page
        begin, end = -(-block.address // page) * page, (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if end < block.address + block.size:
            pool.add(block.cut(end - block.address, mapped=True))
        if begin > block.address:
            pages = block.cut(begin - block.address, mapped=False)
            pool.add(block)
            block = pages
        block.mapped = False
        block.take_in(block.before)
        block.take_in(block.after)
        pool.add(block)
        self.reserved -= end - begin


class Replayed(NamedTuple):
    """The peaks of allocated and reserved bytes, and the smallest limit that the same allocations get through with."""

    allocated: int
    reserved: int
    least: int


def run_events(
    sizes: Sequence[int], events: Sequence[int], first: int = 0, *, limit: int | None = None, expandable: bool = False
) -> CachingAllocator:
    """Run events through an allocator: the number of a size in `sizes` when it is allocated, ~number when it is freed.

    `first` bytes are allocated and freed at once before them, as transformers does before it loads (caching_allocator_warmup).

    Raises:
        MemoryError: `limit` bytes are too few.
    """
    allocator = CachingAllocator(limit, expandable=expandable)
    if first:
        allocator.free(allocator.malloc(first))
    live: dict[int, MemoryBlock] = {}
    for event in events:
        if event >= 0:
            if sizes[event]:  # torch asks nothing of an allocator for an empty tensor
                live[event] = allocator.malloc(sizes[event])
        elif ~event in live:
            allocator.free(live.pop(~event))
    return allocator


def needs(sizes: Sequence[int], events: Sequence[int], first: int = 0, *, expandable: bool = False) -> Replayed:
    """Return what events reserve, and find the least limit that they get through with, to the size of a small segment."""
    free = run_events(sizes, events, first, expandable=expandable)
    low, high = -(-free.peak_allocated // SMALL_SEGMENT) - 1, free.peak_reserved // SMALL_SEGMENT  # all is reserved in such steps
    while high - low > 1:
        middle = (low + high) // 2
        try:
            run_events(sizes, events, first, limit=middle * SMALL_SEGMENT, expandable=expandable)
            high = middle
        except MemoryError:
            low = middle
    return Replayed(free.peak_allocated, free.peak_reserved, high * SMALL_SEGMENT)
