"""What to do after a command of the fleet, as commands that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

SENT = Path("sent")  # where a person gathers what machines bring


def how_to_measure(shards: Sequence[Path]) -> str:
    """Say how a shard is run on its machine: the first of them, for an example."""
    path = shards[0]
    there = "On its machine" if len(shards) == 1 else "On the machine of each, e.g."
    return f"{there}:  {shlex.join(['pytest', 'cases/', '--shard', str(path), '--results', str(SENT / path.stem)])}"


def how_to_collect(contract: Path, results: Path) -> str:
    """Say how what came back is held against the contract."""
    return f"To collect:  {shlex.join(['fitmatrix', 'fleet', 'collect', str(contract), str(results), '--to', 'results'])}"


def how_to_resume(contract: Path, results: Path) -> str:
    """Say how what is missing is handed out again."""
    return f"To hand out what is missing:  {shlex.join(['fitmatrix', 'fleet', 'resume', str(contract), str(results)])}"
