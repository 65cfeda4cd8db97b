"""How many more tokens there is room for: from what has been held since the prompt, by what a token takes.

What a token takes is counted by the plan exactly, and can be measured only roughly: memory comes and goes by more, on a processor
by 16 MiB of copies beside 1 MiB a token. So the samples say where memory stands, and how it grows only where they show clearly that
more grows than the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from harness.core.records import Record
from harness.core.units import MIB
from harness.live.reading import Reading
from harness.measure.beacon import Announced, Beat

CONTEXT = "context"
_LEAST_POINTS, _LEAST_BYTES = 10, 64 * MIB  # of growth that is told from what comes and goes
_CLEARLY_MORE = 1.25  # times what is planned
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
    """A line through what was held at counts of tokens: its value at the last count, and its slope in bytes for a token."""

    held: float
    slope: float
    is_measured: bool = False


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

    `ends` has by tier what is held and the most that this can become, in bytes.
    """
    beat = readings[-1].beat
    if beat is None or not beat.tokens:
        return None
    found = []
    for tier, (held, end) in ends.items():
        knots = announced.outlook.kv.get(tier)
        if held is None or end is None or not knots:
            continue
        points = points_of(readings, tier) or [(beat.tokens, held)]
        grown = growth(points, _slope(knots, beat.tokens))
        if grown.slope < _LEAST_PER_TOKEN:
            continue
        last = points[-1][0] + max(end - grown.held, 0) / grown.slope
        left = max(int(last) - beat.tokens, 0)
        found.append(Headroom(tokens=left, ends=tier, bytes_per_token=grown.slope, is_measured=grown.is_measured))
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


def growth(points: Sequence[tuple[float, int]], planned: float) -> Growth:
    """Return where memory stands at the last of some points, and what a token takes: `planned`, or clearly more by least squares.

    Where memory hardly grows, tokens fill what an earlier text has left on the heap: then it stands where it was seen last.
    """
    middle = sum(tokens for tokens, _ in points) / len(points)
    mean = sum(size for _, size in points) / len(points)
    spread = sum((tokens - middle) ** 2 for tokens, _ in points)
    last, size = points[-1]
    if not spread:
        return Growth(size, planned)
    measured = sum((tokens - middle) * (size - mean) for tokens, size in points) / spread
    if measured < planned / 2:
        return Growth(size, planned)
    is_clear = len(points) >= _LEAST_POINTS and measured * (last - points[0][0]) >= _LEAST_BYTES
    is_measured = is_clear and measured > _CLEARLY_MORE * planned
    slope = measured if is_measured else planned
    return Growth(mean + slope * (last - middle), slope, is_measured)
