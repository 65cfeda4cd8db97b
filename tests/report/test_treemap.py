"""The treemap: areas are bytes, every block and kind has its rectangle, and no file makes it endless."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.size_breakdown import SizePart
from harness.report.page.treemap import LEAST_SHARE, MOST_BLOCKS, TREEMAP_HEIGHT, TREEMAP_WIDTH, Rectangle, divide, draw, grid

SIZES = st.lists(st.integers(1, 1 << 40), min_size=1, max_size=40).map(lambda sizes: sorted(sizes, reverse=True))
SIDES = st.floats(1, 2000)
RECT = re.compile(r'<g class="m-(\w+)"><title>([^<]*)</title><rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"/>')


def part(block: str, repeats: int, kind: str, size: int) -> SizePart:
    return SizePart(
        block=block, repeats=repeats, kind=kind, tensors=repeats, parameters=size // 2, bytes=size, dtype_bytes={"float16": size}
    )


def area(box: Rectangle) -> float:
    return box.width * box.height


def overlap(one: Rectangle, other: Rectangle) -> float:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    return max(width, 0) * max(height, 0)


@given(SIZES, SIDES, SIDES)
def test_areas_are_sizes_and_nothing_overlaps(sizes: list[int], width: float, height: float) -> None:
    boxes = divide(sizes, Rectangle(3, 5, width, height))
    for size, box in zip(sizes, boxes, strict=True):
        assert area(box) == pytest.approx(width * height * size / sum(sizes), rel=1e-6, abs=LEAST_SHARE * width * height)
        assert min(box.x - 3, box.y - 5) > -1e-6
        assert box.x + box.width <= 3 + width * (1 + 1e-6)
        assert box.y + box.height <= 5 + height * (1 + 1e-6)
    assert all(overlap(one, other) < 1e-4 * width * height for one, other in combinations(boxes, 2))


def test_equal_sizes_become_squares() -> None:
    assert all(box.width == pytest.approx(box.height) for box in divide([1] * 16, Rectangle(0, 0, 400, 400)))


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [5, 0, 0]])
def test_nothing_has_no_area(sizes: list[int]) -> None:
    boxes = divide(sizes, Rectangle(0, 0, 10, 10))
    assert [area(box) for box in boxes] == [100.0 if size else 0.0 for size in sizes]


@given(st.integers(1, 200), SIDES, SIDES)
def test_a_grid_has_equal_areas_in_reading_order(count: int, width: float, height: float) -> None:
    boxes = list(grid(count, Rectangle(0, 0, width, height)))
    assert [area(box) for box in boxes] == pytest.approx([width * height / count] * count)
    assert all(one.y < other.y or (one.y == other.y and one.x < other.x) for one, other in pairwise(boxes))


def test_every_block_and_kind_has_its_rectangle() -> None:
    parts = [part("", 1, "embedding", 500), part("layers.0-2,5", 4, "mlp", 4000), part("layers.0-2,5", 4, "norm", 400)]
    drawn = RECT.findall(str(draw(parts, 4900)))
    assert Counter(kind for kind, *_ in drawn) == {"embedding": 1, "mlp": 4, "norm": 4}
    titles = [title for _, title, *_ in drawn]
    assert "layers.5: mlp, 500 parameters, 1000 bytes (20.4 %)" in titles
    assert "embedding, 250 parameters, 500 bytes (10.2 %)" in titles
    covered = sum(float(width) * float(height) for *_, width, height in drawn)
    assert covered > 0.85 * TREEMAP_WIDTH * TREEMAP_HEIGHT


def test_more_blocks_than_can_be_told_apart_are_drawn_as_one() -> None:
    drawn = RECT.findall(str(draw([part("layers.0-99998", 99_999, "mlp", 99_999_000)], 99_999_000)))
    assert [(kind, title.partition(":")[0]) for kind, title, *_ in drawn] == [("mlp", "layers.0-99998")]
    assert len(RECT.findall(str(draw([part("layers.0-511", MOST_BLOCKS, "mlp", 1 << 20)], 1 << 20)))) == MOST_BLOCKS


def test_a_checkpoint_without_a_byte_is_drawn_empty() -> None:
    assert "<rect" not in draw([part("", 1, "other", 0)], 0)
