"""Published speeds of transformers on one card, beside what is planned for it: Qwen's tables of an A100 and an H20."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from harness.core.records import Record, Span
from tests.oracle.planned_speeds import CARDS
from tests.oracle.planned_speeds import published as planned

PUBLISHED = Path(__file__).parents[1] / "data" / "published_figures.csv"
# The best values of the constants follow from these rows and all others are held out; how wide they are was set in sight of all.
SEEN = frozenset(("Qwen2.5-7B-Instruct", "Qwen3-4B"))
# Its experts were looped over by the transformers of that day; those of today call one kernel.
NOT_DENSE = frozenset(("Qwen3-30B-A3B",))
SHARE = 0.9  #: of what is measured, how much an interval is to hold


class Prediction(Record, frozen=True, kw_only=True):
    """A figure that was measured, and what is planned."""

    measured: float
    planned: Span

    @property
    def error(self) -> float:
        return self.planned.best / self.measured - 1

    @property
    def is_inside(self) -> bool:
        return self.planned.low <= self.measured <= self.planned.high

    @property
    def width(self) -> float:
        return self.planned.high / self.planned.low


class Speed(Prediction, frozen=True, kw_only=True):
    """Tokens/s of one published row."""

    card: str
    model: str
    quantization: str
    prompt: int


@cache
def published_speeds() -> tuple[Speed, ...]:
    """Return the rows of dense models on one card."""
    return tuple(_speeds())


def rows() -> Iterator[dict[str, str]]:
    """Yield the published rows of dense models on one card, as they are written."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["gpus"] == "1" and row["gpu"] in CARDS and row["model"] not in NOT_DENSE:
                yield row


def _speeds() -> Iterator[Speed]:
    for row in rows():
        yield Speed(
            card=CARDS[row["gpu"]],
            model=row["model"],
            quantization=row["quant"],
            prompt=int(row["input_len"]),
            measured=float(row["tokens_per_s"]),
            planned=planned(row),
        )


def interval_score(speeds: Iterable[Prediction]) -> float:
    """Return Winkler's score of the intervals as a factor: their mean width, and for each miss 2 / 0.1 times by how much.

    Of logarithms, so that 1 is perfect and twice too wide is as bad at any speed (Gneiting and Raftery 2007, section 6.2).
    """
    return math.exp(statistics.fmean(score_of(one.planned, one.measured) for one in speeds))


def score_of(planned: Span, measured: float) -> float:
    """Return the logarithm of the score of one interval."""
    missed = max(0.0, math.log(planned.low / measured), math.log(measured / planned.high))
    return math.log(planned.high / planned.low) + 2 / (1 - SHARE) * missed


def median_error(speeds: Sequence[Prediction]) -> float:
    return statistics.median(abs(one.error) for one in speeds)


def share_inside(speeds: Sequence[Prediction]) -> float:
    return statistics.fmean(one.is_inside for one in speeds)


def median_width(speeds: Sequence[Prediction]) -> float:
    return statistics.median(one.width for one in speeds)
