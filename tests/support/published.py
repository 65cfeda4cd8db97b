"""Published speeds of transformers on one card, beside what is planned for it: Qwen's tables of an A100 and an H20."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from harness.architecture import model_spec
from harness.catalog import resolve
from harness.core.records import Record, Span, Workload
from harness.machine.gpus import profile
from harness.planning import calibration
from harness.planning.cost.estimate import estimate
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.memory import WeightFormat

PUBLISHED = Path(__file__).parents[1] / "data" / "published_figures.csv"
# Bits a weight of a Linear with 16-bit scales and zeros of groups of 128; FP8 has a float32 for 128 x 128.
PACKED = {
    "BF16": None,
    "FP8": 8 + 32 / 128**2,
    "GPTQ-Int8": 8 + 24 / 128,
    "GPTQ-Int4": 4 + 20 / 128,
    "AWQ": 4 + 20 / 128,
    "AWQ-INT4": 4 + 20 / 128,
}
CARDS = {"A100-80GB": "A100 80GB", "H20-96GB": "H20"}
# The best values of the constants follow from these rows and all others are held out; how wide they are was set in sight of all.
SEEN = frozenset(("Qwen2.5-7B-Instruct", "Qwen3-4B"))
# Its experts were looped over by the transformers of that day; those of today call one kernel.
NOT_DENSE = frozenset(("Qwen3-30B-A3B",))
SHARE = 0.9  #: of what is measured, how much an interval is to hold


class Speed(Record, frozen=True, kw_only=True):
    """Tokens/s of one published row, and what is planned."""

    card: str
    model: str
    quantization: str
    prompt: int
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


@cache
def published_speeds() -> tuple[Speed, ...]:
    """Return the rows of dense models on one card."""
    return tuple(_speeds())


def _speeds() -> Iterator[Speed]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["gpus"] == "1" and row["gpu"] in CARDS and row["model"] not in NOT_DENSE:
                yield Speed(
                    card=CARDS[row["gpu"]],
                    model=row["model"],
                    quantization=row["quant"],
                    prompt=int(row["input_len"]),
                    measured=float(row["tokens_per_s"]),
                    planned=_planned(row),
                )


def _planned(row: dict[str, str]) -> Span:
    """Plan what was measured: all the seconds, by the tokens that were made, or on the H20 by those of the prompt as well."""
    load = Workload(prompt_tokens=int(row["input_len"]), new_tokens=int(row["gen_len"]))
    spec, bits = model_spec.read_spec(resolve.resolve(f"Qwen/{row['model']}")), PACKED[row["quant"]]
    dtype = "bfloat16" if bits is None else "float16"
    held = WeightFormat(dtype=dtype, packed_bits=bits, in_blocks=row["quant"] == "FP8")
    footprint = Footprint(Inventory(spec, held), "gpu:0", load, calibration.default())
    found = estimate(footprint, "bf16", profile([CARDS[row["gpu"]]]))
    counted = load.new_tokens + (load.prompt_tokens if "(prompt+generated)" in row["env"] else 0)
    first, decode, more = found.first_token_s, found.decode_tok_s, load.new_tokens - 1
    return Span(
        low=counted / (first.high + more / decode.low),
        best=counted / (first.best + more / decode.best),
        high=counted / (first.low + more / decode.high),
    )


def interval_score(speeds: Iterable[Speed]) -> float:
    """Return Winkler's score of the intervals as a factor: their mean width, and for each miss 2 / 0.1 times by how much.

    Of logarithms, so that 1 is perfect and twice too wide is as bad at any speed (Gneiting and Raftery 2007, section 6.2).
    """
    return math.exp(statistics.fmean(_score(one) for one in speeds))


def _score(one: Speed) -> float:
    missed = max(0.0, math.log(one.planned.low / one.measured), math.log(one.measured / one.planned.high))
    return math.log(one.width) + 2 / (1 - SHARE) * missed


def median_error(speeds: Sequence[Speed]) -> float:
    return statistics.median(abs(one.error) for one in speeds)


def share_inside(speeds: Sequence[Speed]) -> float:
    return statistics.fmean(one.is_inside for one in speeds)


def median_width(speeds: Sequence[Speed]) -> float:
    return statistics.median(one.width for one in speeds)
