"""Compare how far two revisions' plans are from traced rows, and fail if this one's are worse. Without torch, in seconds.

    python -m tests.oracle.gate --against REV

Each revision plans every traced row (`tests.oracle.rows`) twice, in a process of its own: with the records it ships, and by its
formulas alone, which every model without a record gets. The mean error may grow by 5 %, in no part by more than 10 %.
Speeds that were published, and seconds that were measured (reports/), count by the score of their intervals, width and misses: the
mean score may grow by 5 %, in no part by more than 10 %. What the revision plans and this one does not fails as well.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from harness.core.records import Span
from tests.oracle import rows
from tests.oracle.rows import Row
from tests.support import published

ROOT = Path(__file__).parents[2]
# Of the revision itself, as it knows its own modules; ours where it has none.
PROGRAM, SPEEDS = "tests/oracle/planned_rows.py", "tests/oracle/planned_speeds.py"
RECORDS = "harness/data/traces*"
ALLOWED, ALLOWED_IN_PART = 0.05, 0.10
# Errors below this count as this. The traces themselves were held against published cards to a median of 0.1 % (docs/estimates.md):
# a plan that is nearer to a trace than that is no better for it, and what rounding moves there is no news.
FLOOR = 0.001
TOLD = 0.005  # what a part must move to be in the table
FIGURES = {"weights": "weights_bytes", "kv": "kv_bytes", "allocated": "peak_bytes", "load": "load_peak_bytes"}
WAYS = ("as planned", "by formulas")
COMPARED, WORSE, IMPOSSIBLE = 0, 1, 2

Answers = Sequence[Mapping[str, int] | None]
Spans = Mapping[str, Sequence[float]]
Part = tuple[str, str]


class Moved(NamedTuple):
    """A part of the rows, and the mean errors of both revisions in it."""

    part: Part
    figures: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """How much larger the error has become, as a share of what it was."""
        return self.after / self.before - 1

    def told(self, error: float) -> str:
        """Write a mean error as a share, the mean score of intervals as a factor."""
        return f"{math.exp(error):.2f}x" if self.is_of_intervals else f"{error:.3%}"

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows, or all intervals."""
        return self.part in (EVERYTHING, EVERY_INTERVAL)

    @property
    def is_of_intervals(self) -> bool:
        """Whether these are intervals, of speeds or seconds."""
        return self.part[0] in INTERVALS

    @property
    def fails(self) -> bool:
        """Whether it has become larger than is allowed."""
        return self.change > (ALLOWED if self.is_whole else ALLOWED_IN_PART)


EVERYTHING: Part = ("all", "all")
EVERY_INTERVAL: Part = ("interval", "all")
# The parts of intervals: by what is planned, and by the columns of what was published or the case of what was measured.
INTERVALS = ("interval", "card", "held in", "measured in", "measured on")


class NotCompared(Exception):
    """There is no revision to compare with; `status` is what the command exits with."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print the parts that moved. Returns 0, 1 if a part is worse, 2 if the revision is none."""
    parser = argparse.ArgumentParser(prog="tests.oracle.gate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", metavar="REV", default="HEAD^", help="the revision to compare with (default HEAD^)")
    asked = parser.parse_args(arguments)
    try:
        return compare(asked.against, rows.everything())
    except NotCompared as why:
        print(why)
        return why.status


def compare(revision: str, traced: Sequence[Row]) -> int:
    """Plan the rows by this working tree and by a revision, and print what moved. Returns the exit status.

    Raises:
        NotCompared: the repository has no such revision, or it plans in a way that cannot be asked for.
    """
    with tempfile.TemporaryDirectory(prefix="oracle-gate-") as folder:
        then, now = Path(folder) / "then", Path(folder) / "now"
        _extract(revision, then)
        _copy(now)
        with ThreadPoolExecutor(2) as pool:
            before, after = pool.map(lambda tree: plans_of(tree, traced), (then, now))
        with ThreadPoolExecutor(2) as pool:
            spans = list(pool.map(lambda tree: answers(tree, SPEEDS, questions()), (then, now)))
    found = [*parts(traced, before, after), *scores(*spans)]
    missing = [*lost(traced, before, after), *lost_intervals(*spans)]
    print("\n".join(told(revision, found, missing)))
    return WORSE if any(one.fails for one in found) or missing else COMPARED


def _extract(revision: str, tree: Path) -> None:
    known = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if known.returncode != 0:
        shallow = _git("rev-parse", "--is-shallow-repository").stdout.strip() == b"true"
        cure = "skipped, as this clone is shallow: fetch with more depth to compare" if shallow else "give one that it has"
        raise NotCompared(f"no revision {revision!r} in this repository: {cure}", COMPARED if shallow else IMPOSSIBLE)
    archive = subprocess.run(["git", "archive", known.stdout.decode().strip()], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        wanted = [member for member in tar.getmembers() if member.name in (PROGRAM, SPEEDS) or member.name.startswith("harness/")]
        tar.extractall(tree, wanted, filter="data")
    _lend(tree)


def _lend(tree: Path) -> None:
    for program in (PROGRAM, SPEEDS):
        (tree / program).parent.mkdir(parents=True, exist_ok=True)
        if not (tree / program).exists():
            shutil.copy(ROOT / program, tree / program)


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


def _copy(tree: Path) -> None:
    shutil.copytree(ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    _lend(tree)


def plans_of(tree: Path, traced: Sequence[Row]) -> dict[str, Answers]:
    """Have the code in a folder plan the rows, first with the records it ships and then without."""
    asked = [{name: getattr(row, name) for name in _ASKED} for row in traced]
    planned = answers(tree, PROGRAM, asked)
    kept = [records.rename(records.with_suffix(".left out")) for records in tree.glob(RECORDS)]
    by_formulas = answers(tree, PROGRAM, asked)
    for records in kept:
        records.rename(records.with_suffix(".jsonl"))
    return dict(zip(WAYS, (planned, by_formulas), strict=True))


def answers(tree: Path, program: str, questions: Iterable[Mapping[str, Any]]) -> Any:
    """Ask the code in a folder what it plans: an object by figure, or None, for each question."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FITMATRIX_", "HF_", "XDG_", "PYTHON"))}
    with tempfile.TemporaryDirectory(prefix="oracle-home-") as home:  # in which nothing was measured or traced
        done = subprocess.run(
            [sys.executable, tree / program],
            input="".join(f"{json.dumps(question)}\n" for question in questions),
            capture_output=True,
            text=True,
            cwd=tree,
            env={**kept, "HOME": home, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotCompared(f"{program} of {tree.name} cannot plan the rows: {last}", IMPOSSIBLE)
    about, *found = (json.loads(line) for line in done.stdout.splitlines())
    if not Path(about["harness"]).resolve().is_relative_to(tree.resolve()):
        raise NotCompared(f"the plans of {tree.name} came from {about['harness']}: PYTHONPATH was not heeded", IMPOSSIBLE)
    return found


_ASKED = ("model", "precision", "placement", "tier", "cards", "prompt_tokens", "batch", "new_tokens")


def parts(traced: Sequence[Row], before: Mapping[str, Answers], after: Mapping[str, Answers]) -> list[Moved]:
    """Average the errors over all rows that both revisions plan, and over each part of them."""
    errors: dict[Part, list[tuple[float, float]]] = defaultdict(list)
    for way in WAYS:
        for row, old, new in zip(traced, before[way], after[way], strict=True):
            for figure, field in FIGURES.items():
                if old is None or new is None or figure not in old.keys() & new.keys() or not getattr(row, field):
                    continue
                pair = _error(old[figure], getattr(row, field)), _error(new[figure], getattr(row, field))
                for part in _parts_of(row, figure, way):
                    errors[part].append(pair)
    return [_moved(part, pairs) for part, pairs in errors.items()]


def _moved(part: Part, pairs: Sequence[tuple[float, float]]) -> Moved:
    return Moved(part, len(pairs), *(sum(side) / len(pairs) for side in zip(*pairs, strict=True)))


def questions() -> list[dict[str, Any]]:
    """Return what was published of speeds, and what this repository's own results have measured."""
    stored = (line for file in sorted((ROOT / "reports").glob("*/results.jsonl")) for line in file.read_text("utf-8").splitlines())
    results = [json.loads(line) for line in stored]
    return [{"published": row} for row in published.rows()] + [{"result": one} for one in results if one["outcome"] == "ok"]


def scores(before: Sequence[Spans | None], after: Sequence[Spans | None]) -> list[Moved]:
    """Average the scores of the intervals that both revisions give, all and by part (`published.score_of`)."""
    found: dict[Part, list[tuple[float, float]]] = defaultdict(list)
    for asked, old, new in zip(questions(), before, after, strict=True):
        for figure in (old or {}).keys() & (new or {}).keys():
            real = asked["published"]["tokens_per_s"] if "published" in asked else asked["result"]["metrics"].get(figure)
            if real and old is not None and new is not None:
                pair = _score(old[figure], float(real)), _score(new[figure], float(real))
                for part in _interval_parts(asked, figure):
                    found[part].append(pair)
    return [_moved(part, pairs) for part, pairs in found.items()]


def _score(span: Sequence[float], real: float) -> float:
    low, best, high = span
    return published.score_of(Span(low=low, best=best, high=high), real)


def _interval_parts(asked: Mapping[str, Any], figure: str) -> Iterator[Part]:
    yield EVERY_INTERVAL
    if "published" in asked:
        row = asked["published"]
        yield from (("interval", f"{figure}, published"), ("card", row["gpu"]), ("held in", row["quant"]))
    else:
        case = asked["result"]["case"]
        yield from (("interval", f"{figure}, measured"), ("measured in", case["precision"]), ("measured on", case["placement"]))


def lost_intervals(before: Sequence[Spans | None], after: Sequence[Spans | None]) -> list[str]:
    """Name what the revision gives intervals of and this working tree does not."""
    asked = zip(questions(), before, after, strict=True)
    return [_question_name(one) for one, old, new in asked if (old or {}).keys() - (new or {}).keys()]


def _question_name(asked: Mapping[str, Any]) -> str:
    """Write a published row, or a case that was measured, in a few words."""
    if "published" in asked:
        return " ".join(asked["published"][name] for name in ("model", "quant", "gpu"))
    return " ".join(asked["result"]["case"][name] for name in ("model", "precision", "placement"))


def _error(planned: int, traced: int) -> float:
    return max(abs(planned / traced - 1), FLOOR)


def _parts_of(row: Row, figure: str, way: str) -> Iterator[Part]:
    yield EVERYTHING
    yield "architecture", row.architecture
    yield "precision", row.precision
    yield "placement", row.placement
    yield "figure", f"{figure}, {way}"
    yield "peak in", f"{row.peak_in}, {way}"


def lost(traced: Sequence[Row], before: Mapping[str, Answers], after: Mapping[str, Answers]) -> list[str]:
    """Name the rows that the revision plans and this working tree does not."""
    planned = zip(traced, before[WAYS[0]], after[WAYS[0]], strict=True)
    return [f"{row.model} {row.precision} {row.placement}" for row, old, new in planned if old is not None and new is None]


def told(revision: str, found: Sequence[Moved], missing: Sequence[str]) -> Iterator[str]:
    """Write what moved: a line for everything, and one for each part that did, those that fail marked."""
    shown = [one for one in found if one.is_whole or one.part[0] == "interval" or abs(one.change) > TOLD]
    yield f"Mean errors of plans against traces, {revision} and now; below {FLOOR:.1%} they count as {FLOOR:.1%}:"
    yield from _aligned(
        [
            ("part", "", "figures", "then", "now", "change", ""),
            *(
                (*one.part, str(one.figures), one.told(one.before), one.told(one.after), f"{one.change:+.1%}", "WORSE" * one.fails)
                for one in sorted(shown, key=lambda one: (not one.is_whole, -one.change))
            ),
        ]
    )
    if missing:
        yield f"{len(missing)} rows are planned no more, the first is {missing[0]}"
    failing = [one for one in found if one.fails]
    if failing:
        yield f"{len(failing)} parts are worse by more than {ALLOWED_IN_PART:.0%}, or all by more than {ALLOWED:.0%}"
    elif not missing:
        yield "no part is worse"


def _aligned(lines: Iterable[Sequence[str]]) -> Iterator[str]:
    table = list(lines)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        yield "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
