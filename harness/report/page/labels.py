"""Labels beside the points of a drawing that is as wide as the page lets it be: none over another, over a point or over the edge.

Across, a place is a share of the width and pixels from it, which do not stretch; down, it is in pixels. Libraries that place labels
(adjustText and textalloc for matplotlib, Vega's label transform) know one width, and what is free there may not be on a telephone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from harness.report.page.axes import text_width

# What a letter takes at most on the average, how high a line is, and how far a mark reaches from its point.
LETTER, LINE, MARK = 7.2, 14.0, 7.0
# The widths for which labels are placed: on a telephone, on a desk, and the widest. What fits the last two only is "roomy".
WIDTHS = (220.0, 420.0, 720.0)
# How far up or down a label at a corner stands: clear of a level line through the point.
_CORNER = LINE / 2 + 3


class Box(msgspec.Struct, frozen=True, gc=False):
    """A rectangle; its ends across are pairs of a share of the width and pixels."""

    left: tuple[float, float]
    right: tuple[float, float]
    top: float
    bottom: float

    def ends(self, width: float) -> tuple[float, float]:
        """Return where it begins and ends across, in pixels, in a drawing of this width."""
        return self.left[0] * width + self.left[1], self.right[0] * width + self.right[1]


class Label(msgspec.Struct, frozen=True, gc=False):
    """Where a text stands: how far from its point, which end of it is there, its room, and whether it needs a wide drawing."""

    dx: float
    dy: float
    anchor: str
    box: Box
    is_roomy: bool = False


def mark(share: float, y: float) -> Box:
    """Return the room that the mark of a point takes."""
    return Box((share, -MARK), (share, MARK), y - MARK, y + MARK)


def place(marks: Sequence[Box], texts: Mapping[int, str], height: float, taken: Sequence[Box] = ()) -> dict[int, Label]:
    """Place texts beside the marks of their numbers, the first first, clear of all that is there; leave out what has no room."""
    found: dict[int, Label] = {}
    full = [*marks, *taken]
    for number, text in texts.items():
        label = _free(list(_options(marks[number], text_width(text, LETTER))), full, height)
        if label:
            found[number] = label
            full.append(label.box)
    return found


def overlap(one: Box, other: Box, width: float) -> bool:
    """Tell whether two boxes share some area in a drawing of this width."""
    if one.top >= other.bottom or other.top >= one.bottom:
        return False
    (left, right), (begin, end) = one.ends(width), other.ends(width)
    return left < end and begin < right


def _options(point: Box, width: float) -> Iterator[Label]:
    """Offer places for a text: right, left, above, below, then at the corners."""
    y, half = (point.top + point.bottom) / 2, LINE / 2
    beside, over = MARK + 5, MARK + 2 + half
    for anchor, dx, dy in (
        ("start", beside, 0.0),
        ("end", -beside, 0.0),
        ("middle", 0.0, -over),
        ("middle", 0.0, over),
        *((anchor, dx, dy) for dy in (-_CORNER, _CORNER) for anchor, dx in (("start", MARK + 2), ("end", -MARK - 2))),
    ):
        left = {"start": dx, "end": dx - width, "middle": -width / 2}[anchor]
        share = point.left[0]
        yield Label(dx, dy, anchor, Box((share, left), (share, left + width), y + dy - half, y + dy + half))


def _free(options: Sequence[Label], full: Sequence[Box], height: float) -> Label | None:
    """Choose the first place that is free at every width, else the first that is where there is more room."""
    top, bottom = min(label.box.top for label in options), max(label.box.bottom for label in options)
    near = [box for box in full if box.top < bottom and box.bottom > top]
    inside = [label for label in options if label.box.top >= 0 and label.box.bottom <= height]
    for widths in (WIDTHS, WIDTHS[1:]):
        for label in inside:
            if all(_is_free(label.box, near, width) for width in widths):
                return msgspec.structs.replace(label, is_roomy=widths is not WIDTHS)
    return None


def _is_free(box: Box, near: Sequence[Box], width: float) -> bool:
    left, right = box.ends(width)
    return left >= 0 and right <= width and not any(overlap(box, one, width) for one in near)
