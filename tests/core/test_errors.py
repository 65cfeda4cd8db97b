"""The error tree, and the words that help with a wrong name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.core import errors
from harness.core.errors import CheckpointError, HarnessError, StoreError, did_you_mean

CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, HarnessError)]


def test_the_docstring_draws_every_error_and_no_other() -> None:
    drawn = re.findall(r"\b\w+Error\b", errors.__doc__ or "")
    assert sorted(set(drawn)) == sorted(each.__name__ for each in CLASSES)


@pytest.mark.parametrize("kind", [each for each in CLASSES if each is not HarnessError])
def test_every_error_is_caught_as_one_of_the_harness(kind: type[HarnessError]) -> None:
    assert kind.__bases__ == (HarnessError,)


def test_a_checkpoint_error_leads_with_its_path() -> None:
    error = CheckpointError(Path("/models/tiny"), "no weights")
    assert str(error) == "/models/tiny: no weights"
    assert error.path == "/models/tiny"


@pytest.mark.parametrize(("line", "said"), [(None, "r.jsonl: full"), (7, "r.jsonl:7: full"), (0, "r.jsonl:0: full")])
def test_a_store_error_leads_with_path_and_line(line: int | None, said: str) -> None:
    error = StoreError("r.jsonl", "full", line)
    assert str(error) == said
    assert error.line == line


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gp+cpu", "did you mean 'gpu+cpu'?"),
        ("INT4", "did you mean 'int4' or 'int8'?"),
        ("Bf16", "did you mean 'bf16' or 'fp16'?"),
        ("zebra", "known: bf16, fp16, gpu+cpu, int4, int8"),
        ("", "known: bf16, fp16, gpu+cpu, int4, int8"),
    ],
)
def test_a_wrong_name_gets_its_neighbors_or_the_whole_list(value: str, said: str) -> None:
    assert did_you_mean(value, ["int8", "int4", "gpu+cpu", "fp16", "bf16"]) == said


def test_names_are_suggested_as_they_are_written() -> None:
    assert did_you_mean("rtx 3060", {"RTX 3060": 1, "A100": 2}) == "did you mean 'RTX 3060'?"
