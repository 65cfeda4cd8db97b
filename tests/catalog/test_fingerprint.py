"""The fingerprint of a model's files: the same for the same files, another for any that could load otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.catalog import fingerprint
from harness.checkpoint import reader
from harness.core.errors import CheckpointError
from tests.support import scripted
from tests.support.strangers import change


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return scripted.write_model(tmp_path / "tiny")


def of(directory: Path) -> str:
    return fingerprint.of_model(directory, reader.read(directory))


def other_weight(model: Path) -> None:
    """Change the last weight, in place, as training in the same directory does."""
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def other_weight_and_old_time(model: Path) -> None:
    weights = model / "model.safetensors"
    before = weights.stat()
    other_weight(model)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def same_bytes_written_anew(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(0, 0))


def other_config(model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))


def code_of_its_own(model: Path) -> None:
    (model / "modeling_tiny.py").write_text("")


def a_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "done",
    [other_weight, other_weight_and_old_time, same_bytes_written_anew, other_config, code_of_its_own, a_tokenizer],
)
def test_it_changes_with_what_is_loaded(model: Path, done: Callable[[Path], None]) -> None:
    before = of(model)
    done(model)
    assert of(model) != before


def test_code_below_counts_where_the_model_asks_for_code(model: Path) -> None:
    change(model / "config.json", {"auto_map": {"AutoConfig": "modeling_tiny.C"}})
    (model / "parts").mkdir()
    found = [of(model)]
    for text in ("a = 1", "a = 2"):
        (model / "parts" / "layers.py").write_text(text)
        found.append(of(model))
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "who/what--a.M"}},
        {"auto_map": {"AutoConfig": "gpt2--a.C"}},
        {"attn_implementation": "who/kernel"},
    ],
)
def test_code_of_another_repository_that_may_run_gives_no_fingerprint(model: Path, changes: dict[str, Any]) -> None:
    change(model / "config.json", changes)
    read = reader.read(model)
    assert fingerprint.of_model(model, read, trusted=True) == ""
    assert fingerprint.of_model(model, read) != ""


def test_it_stays_while_the_files_do(model: Path) -> None:
    before = of(model)
    (model / "README.md").write_text("# tiny")
    (model / "config.json").touch()
    assert of(model) == before


def test_a_snapshot_of_the_hub_is_known_by_its_blobs(model: Path, tmp_path: Path) -> None:
    """They are named by their hashes, so a cache that was filled anew holds the same model."""
    found = []
    for number, time_ns in enumerate((1, 2)):
        blob = tmp_path / f"models--a--b{number}/blobs/5f70bf18"
        blob.parent.mkdir(parents=True)
        blob.write_bytes((model / "model.safetensors").read_bytes())
        os.utime(blob, ns=(time_ns, time_ns))
        snapshot = blob.parents[1] / "snapshots/abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)
        (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
        found.append(of(snapshot))
    assert found[0] == found[1]


def test_large_weights_are_not_read_through(model: Path) -> None:
    """A hole of 30 GB behind the weights: read through, it would take a minute."""
    read = reader.read(model)
    before = fingerprint.of_model(model, read)
    os.truncate(model / "model.safetensors", 30 << 30)
    assert fingerprint.of_model(model, read) != before


def test_a_file_that_went_away_is_named(model: Path) -> None:
    read = reader.read(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(No such file or directory\)"):
        fingerprint.of_model(model, read)
