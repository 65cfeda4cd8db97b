"""How fast synthetic checkpoints are written, against dd on the same file system in the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from harness.architecture import synthetic
from harness.catalog import resolve
from tests.support.reporting import Figure

MODEL = "codegen-2b-mono"
ROUNDS = 3
WANTED = 1.5


def seconds_of_dd(path: Path, size: int) -> float:
    """Write `size` bytes with dd, down to the disk, and remove them."""
    start = time.perf_counter()
    blocks = -(-size // (16 << 20))
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={blocks}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def seconds_of_synth(made: synthetic.Synthetic, directory: Path) -> float:
    start = time.perf_counter()
    synthetic.write_synthetic(made, directory)
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    return seconds


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_it_keeps_up_with_dd(kind: str, figures: list[Figure], tmp_path: Path) -> None:
    made = synthetic.describe(resolve.resolve(MODEL), file_format=kind)
    ratios = []
    for _ in range(ROUNDS):
        plain = seconds_of_dd(tmp_path / "dd", made.bytes)
        ratios.append(seconds_of_synth(made, tmp_path / "twin") / plain)
    ratio = statistics.median(ratios)
    what = f"fitmatrix synth of {made.bytes / 1e9:.1f} GB, .{kind}, against dd"
    figures.append(Figure(what=what, found=f"x {ratio:.2f}", wanted=f"x {WANTED}", rows=ROUNDS))
    assert ratio <= WANTED
