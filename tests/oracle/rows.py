"""Rows of tests/data/traced_rows.csv: what one workload of one model was traced to hold on a card. Nothing here needs torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.core.records import Record

ROWS = Path(__file__).parents[1] / "data/traced_rows.csv"


class Row(Record, frozen=True, kw_only=True):
    """One traced workload: bytes on one tier, rounded as torch's allocator for CUDA rounds them, the CUDA context not among them.

    `peak_bytes` is the most of both passes, weights included; `peak_in` says which of them holds it. `cards` are the
    sizes of the machine's cards, such as "24GiB+24GiB".
    """

    model: str
    architecture: str
    precision: str
    placement: str
    tier: str
    prompt_tokens: int
    batch: int
    new_tokens: int
    weights_bytes: int
    kv_bytes: int
    peak_bytes: int
    peak_in: str
    cards: str = "2000GiB"

    @property
    def size(self) -> tuple[int, int, int]:
        """Batch, prompt tokens, new tokens."""
        return self.batch, self.prompt_tokens, self.new_tokens


def read(path: Path = ROWS) -> list[Row]:
    """Read rows as they were written."""
    with path.open(newline="") as file:
        return list(_read(csv.DictReader(file)))


def _read(lines: Iterable[dict[str, str]]) -> Iterator[Row]:
    for line in lines:
        given = {name: int(text) if name in _NUMBERS else text for name, text in line.items()}
        yield Row(**given)  # type: ignore[arg-type]


_NUMBERS = {name for name, kind in Row.__annotations__.items() if kind == "int"}


def write(rows: Iterable[Row], path: Path = ROWS) -> None:
    """Write rows as lines of CSV, in the order of their fields."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Row.__struct_fields__)
        lines.writerows([getattr(row, name) for name in Row.__struct_fields__] for row in rows)
