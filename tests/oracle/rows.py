"""Traced rows: what one workload of one model was traced to hold on a card. Nothing here needs torch.

`tests/data/traced_rows.csv` is written by `python -m tests.oracle.trace_rows`, `traced_placements.csv` beside it by
`python -m tests.oracle.trace_placements`; `traced_peaks.csv` was made by another tracer, before this one, and is held as well.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.catalog import shipped
from harness.core.records import Record

ROWS = Path(__file__).parents[1] / "data/traced_rows.csv"
GIVEN = ROWS.with_name("traced_peaks.csv")
PLACED = ROWS.with_name("traced_placements.csv")


class Row(Record, frozen=True, kw_only=True):
    """One traced workload: bytes on one tier, rounded as torch's allocator for CUDA rounds them, the CUDA context not among them.

    `peak_bytes` is the most of both passes, weights included; `peak_in` says which of them holds it, as far as is known. `cards`
    are the sizes of the machine's cards, such as "24GiB+24GiB". `load_peak_bytes` is the most while loading; 0 where only the
    passes were traced, as `peak_bytes` is where only loading was.
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
    load_peak_bytes: int = 0

    @property
    def size(self) -> tuple[int, int, int]:
        """Batch, prompt tokens, new tokens."""
        return self.batch, self.prompt_tokens, self.new_tokens


def everything() -> list[Row]:
    """Read the rows that are written here and those that were given."""
    return [*read(), *read(PLACED), *given()]


def given() -> list[Row]:
    """Read the rows that were given, with fewer columns."""
    known = {name.rpartition("/")[2].lower(): model.config["model_type"] for name, model in shipped.catalog().items()}
    with GIVEN.open(newline="") as file:
        lines = list(csv.DictReader(file))
    same = {"placement": "direct", "tier": "gpu:0", "peak_in": "unknown"}
    renamed = ({**line, **same, "architecture": known[line["model"]], "peak_bytes": line["peak_allocated_bytes"]} for line in lines)
    return list(_read(renamed))


def read(path: Path = ROWS) -> list[Row]:
    """Read rows as they were written."""
    with path.open(newline="") as file:
        return list(_read(csv.DictReader(file)))


def _read(lines: Iterable[dict[str, str]]) -> Iterator[Row]:
    for line in lines:
        known = {name: int(text) if name in _NUMBERS else text for name, text in line.items() if name in Row.__struct_fields__}
        yield Row(**known)  # type: ignore[arg-type]


_NUMBERS = {name for name, kind in Row.__annotations__.items() if kind == "int"}


def write(rows: Iterable[Row], path: Path = ROWS) -> None:
    """Write rows as lines of CSV, in the order of their fields."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Row.__struct_fields__)
        lines.writerows([getattr(row, name) for name in Row.__struct_fields__] for row in rows)
