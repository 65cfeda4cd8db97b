"""Directories that are no model to run, of every kind that people have: by name, and what is said of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.adapters import write_adapter


class Bad(NamedTuple):
    """A kind: `make` makes it of a good model beside it, and `said` is in the sentence that tells of it."""

    make: Callable[[Path, Path], object]
    said: str


def _with_config(**changes: Any) -> Callable[[Path, Path], object]:
    def make(folder: Path, good: Path) -> None:
        shutil.copytree(good, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return make


def _cut(folder: Path, good: Path) -> None:
    shutil.copytree(good, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _without_weights(folder: Path, good: Path) -> None:
    shutil.copytree(good, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def _orphan(folder: Path, _: Path) -> None:
    write_adapter(folder, "./gone")


BAD: Mapping[str, Bad] = {
    "missing": Bad(lambda *_: None, "no directory"),
    "empty": Bad(lambda folder, _: folder.mkdir(), "no config.json"),
    "cut": Bad(_cut, "download it again"),
    "unweighted": Bad(_without_weights, "no weights"),
    "orphan": Bad(_orphan, "an adapter for './gone', and that is not to be had"),
    "odd": Bad(_with_config(num_hidden_layers=-1), "num_hidden_layers"),
    "encoder": Bad(_with_config(model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
}


def write_bad(folder: Path, good: Path) -> list[str]:
    """Write one of each kind into a folder; return how each is named there."""
    for name, bad in BAD.items():
        bad.make(folder / name, good)
    return [f"./{name}" for name in BAD]
