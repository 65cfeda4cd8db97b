"""Eight runs at once into one directory: every result is there, once.

Real runs of `pytest cases/` with scripted workers, so that they end in the same moments and meet at the lock.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harness.results.store import Store
from tests.support import runs
from tests.support.reporting import Figure

RUNS, CASES = 8, 10


def test_eight_runs_at_once(tmp_path: Path, figures: list[Figure]) -> None:
    models = [[f"model-{run}-{number}" for number in range(CASES)] for run in range(RUNS)]
    folder = runs.folder(tmp_path, [name for names in models for name in names])
    started = [runs.start(folder, names, "-q", "-p", "no:cacheprovider") for names in models]
    ended = [run.communicate(timeout=300)[0] for run in started]
    assert [run.returncode for run in started] == [0] * RUNS, ended
    results, problems = Store(folder / "fitmatrix-results").read()
    found, wanted = Counter(result.id for result in results), {f"{name}/bf16/cpu" for names in models for name in names}
    lost, twice = wanted - found.keys(), [name for name, count in found.items() if count > 1]
    said = f"{len(found)} of {len(wanted)} results, {len(twice)} twice, {len(problems)} lines that are none"
    figures.append(
        Figure(what=f"{RUNS} runs of {CASES} cases at once into one directory", rows=len(wanted), found=said, wanted="all, once")
    )
    assert (lost, twice, problems, len({result.run for result in results})) == (set(), [], [], RUNS)
    assert (folder / "fitmatrix-results/index.html").is_file()
