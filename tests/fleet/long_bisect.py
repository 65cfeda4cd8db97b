"""Bisects over real releases of transformers, and over wheels of ours with a change planted in one.

Run by `tox run -e fleet`. Each release is installed and measured; the models are small and random.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.fleet import lease
from tests.support import runs, small_models
from tests.support.reporting import Figure, gathered
from tests.support.wheels import write_wheel

pytestmark = pytest.mark.skipif(
    shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) is None, reason="needs uv"
)

FAST = ("--case", "bf16/cpu", "--new-tokens", "2", "--repeats", "1", "--prompt-tokens", "16")
PLANTED_FROM, VERSIONS = 4, 8  # of the wheels of ours, 9.0 to 9.7, the first with the change
_MODEL = "harness/worker/model.py"
_PLANT = "\n_PLANTED = bytes(range(256)) * (100 << 12)  # 100 MiB\n"


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[list[Figure]]:
    for section in gathered(request, "fleet.md", "Many machines", "tox run -e fleet", "bisect"):
        yield section.figures


def found(place: Path, *words: str) -> tuple[Mapping[str, Any], float]:
    """Bisect in a folder; return the answer and the seconds that it took."""
    shutil.copytree(runs.ROOT / "cases", place / "cases", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "harness", "fleet", "bisect", *FAST, "--json", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), "HF_HUB_OFFLINE": "1", lease.LEASE: str(place / "lease")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer: Mapping[str, Any] = json.loads(done.stdout)["answer"]
    return answer, time.monotonic() - started


def told(what: str, answer: Mapping[str, Any], seconds: float, wanted: str) -> Figure:
    tried = f"{len(answer['tried'])} releases tried in {seconds:.0f} s"
    return Figure(what=f"{what}: {answer['said']} ({tried})", found=f"{answer['last_good']}, {answer['first_bad']}", wanted=wanted)


def test_a_real_change_among_five_releases_is_found(tmp_path: Path, figures: list[Figure]) -> None:
    """transformers 5.2 brought what our own architectures import: with 5.1 and 5.0 the worker does not start."""
    small_models.save("llama", tmp_path / "tiny")
    small_models.write_letters(tmp_path / "tiny", 1500)
    answer, seconds = found(tmp_path, "--package", "transformers", "--good", "5.4", "--bad", "5.0", "--model", "tiny")
    figures.append(told("transformers 5.4 to 5.0, 5 releases", answer, seconds, "5.2.0, 5.1.0"))
    assert (answer["figure"], answer["last_good"], answer["first_bad"]) == ("end", "5.2.0", "5.1.0")


def test_a_change_planted_in_a_wheel_of_ours_is_found(tmp_path: Path, figures: list[Figure]) -> None:
    """100 MiB that the worker holds from one release on, in a package that stands before the harness that runs."""
    small_models.save("llama", tmp_path / "tiny")
    small_models.write_letters(tmp_path / "tiny", 1500)
    ours = {
        str(path.relative_to(runs.ROOT)): path.read_bytes()
        for path in sorted((runs.ROOT / "harness").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for number in range(VERSIONS):
        planted = {_MODEL: ours[_MODEL] + _PLANT.encode()} if number >= PLANTED_FROM else {}
        write_wheel(tmp_path / "wheels", "fitmatrix", f"9.{number}", ours | planted)
    words = ("--package", "fitmatrix", "--find-links", "wheels", "--good", "9.0", "--bad", f"9.{VERSIONS - 1}", "--model", "tiny")
    answer, seconds = found(tmp_path, *words)
    wanted = f"9.{PLANTED_FROM - 1}", f"9.{PLANTED_FROM}"
    figures.append(told("100 MiB planted in one of 8 wheels of ours", answer, seconds, ", ".join(wanted)))
    assert (answer["figure"], answer["last_good"], answer["first_bad"]) == ("ram_needed_bytes", *wanted)
