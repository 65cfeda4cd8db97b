"""How many more tokens there is room for: by how memory has grown with the tokens so far, or as the plan says it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from harness.core.records import Record
from harness.core.units import MIB
from harness.live.reading import Reading
from harness.measure.beacon import Announced, Beat

CONTEXT = "context"
# Growth is measured once there is enough of it to tell it from what comes and goes; before that the plan's counts.
_LEAST_POINTS, _LEAST_TOKENS, _LEAST_BYTES = 5, 16, 8 * MIB
_LEAST_PER_TOKEN = 1.0  # bytes: what grows less fills nothing


class Headroom(Record, frozen=True, kw_only=True):
    """Room for `tokens` more in each sequence; then `ends` is full: a tier, or the context that the model knows.

    `bytes_per_token` is what a token takes there, of all sequences; `is_measured`: by what was seen, not by the plan.
    """

    tokens: int
    ends: str
    bytes_per_token: float = 0.0
    is_measured: bool = False


class Growth(NamedTuple):
    """A line through what was held at counts of tokens: its value at the last count, how far points lie above it, its slope."""

    held: float
    above: float
    slope: float


def planned_kv(announced: Announced, tier: str, tokens: int) -> int:
    """Return the planned bytes of the KV cache on a tier after so many tokens."""
    knots = announced.outlook.kv.get(tier, ())
    if not knots or tokens <= 0:
        return 0
    before = next((knot for knot in reversed(knots) if knot[0] <= tokens), (0, 0))
    return round(before[1] + (tokens - before[0]) * _slope(knots, tokens))


def _slope(knots: Sequence[tuple[int, int]], tokens: int) -> float:
    """Return the bytes that the next token takes, by the knots around it; beyond the last as before it."""
    pairs = [pair for pair in pairwise(((0, 0), *knots)) if pair[1][0] > pair[0][0]]
    first, then = next((pair for pair in pairs if tokens < pair[1][0]), pairs[-1])
    return (then[1] - first[1]) / (then[0] - first[0])


Ends = Mapping[str, tuple[int | None, int | None]]


def tokens_left(readings: Sequence[Reading], announced: Announced, ends: Ends) -> Headroom | None:
    """Return how many more tokens there is room for, and what ends first; None while no text is written.

    `ends` has by tier what is held and the most that this can become. The tier is measured where it has grown by enough since the
    prompt, by the line through all points of this text and the highest of them above it; else what is held now grows as planned.
    """
    beat = readings[-1].beat
    if beat is None or not beat.tokens:
        return None
    found = []
    for tier, (held, end) in ends.items():
        knots = announced.outlook.kv.get(tier)
        if held is None or end is None or not knots:
            continue
        measured = growth(points_of(readings, tier))
        grown = measured or Growth(held, 0.0, _slope(knots, beat.tokens))
        if grown.slope >= _LEAST_PER_TOKEN:
            left = max(end - grown.held - grown.above, 0) / grown.slope
            found.append(Headroom(tokens=int(left), ends=tier, bytes_per_token=grown.slope, is_measured=measured is not None))
    if announced.outlook.context_length is not None:
        found.append(Headroom(tokens=max(announced.outlook.context_length - beat.tokens, 0), ends=CONTEXT))
    return min(found, key=lambda one: one.tokens, default=None)


def points_of(readings: Sequence[Reading], tier: str) -> list[tuple[float, int]]:
    """Return tokens in the cache and bytes held on a tier, at the readings since the present text began.

    A beat may be some tokens old: those that came since are counted by how fast they have come in this text.
    """
    text = _this_text(readings)
    if not text:
        return []
    (first, _), (last, _) = text[0], text[-1]
    speed = (last.tokens - first.tokens) / (last.at_s - first.at_s) if last.at_s > first.at_s else 0.0
    sizes = ((beat.tokens + speed * max(one.at_s - beat.at_s, 0.0), _held(one, tier)) for beat, one in text)
    return [(tokens, size) for tokens, size in sizes if size is not None]


def _this_text(readings: Sequence[Reading]) -> list[tuple[Beat, Reading]]:
    """Return the readings since the tokens in the cache last became fewer, with their beats."""
    found: list[tuple[Beat, Reading]] = []
    for one in reversed(readings):
        beat = one.beat
        if beat is None or not beat.tokens:
            break
        if found and (one.pid != found[-1][1].pid or beat.begun_s != found[-1][0].begun_s or beat.tokens > found[-1][0].tokens):
            break
        found.append((beat, one))
    return found[::-1]


def _held(one: Reading, tier: str) -> int | None:
    if tier in one.gpus:
        card = one.gpus[tier]
        torch = one.beat.vram.get(tier) if one.beat else None
        return card.process_bytes if card.process_bytes is not None else torch[1] if torch else None
    return one.memory.anon_bytes if one.memory else None


def growth(points: Sequence[tuple[float, int]]) -> Growth | None:
    """Fit a line by least squares; None of too few points, tokens or bytes to tell growth from what comes and goes."""
    if len(points) < _LEAST_POINTS or points[-1][0] - points[0][0] < _LEAST_TOKENS:
        return None
    middle = sum(tokens for tokens, _ in points) / len(points)
    mean = sum(size for _, size in points) / len(points)
    spread = sum((tokens - middle) ** 2 for tokens, _ in points)
    slope = sum((tokens - middle) * (size - mean) for tokens, size in points) / spread
    if slope * (points[-1][0] - points[0][0]) < _LEAST_BYTES:
        return None
    above = max(size - mean - slope * (tokens - middle) for tokens, size in points)
    return Growth(mean + slope * (points[-1][0] - middle), above, slope)
