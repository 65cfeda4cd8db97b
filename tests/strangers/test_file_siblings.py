"""Files that are written otherwise than transformers writes them: planned as it loads them all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec, skeleton_source
from harness.catalog import resolve
from harness.core.records import Verdict
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from tests.strangers import made_by_packages
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

Weights = dict[str, torch.Tensor]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def save_again(
    metadata: dict[str, str] | None, change: Callable[[Weights], Weights] = lambda weights: weights
) -> Callable[[Path], None]:
    """Write the file of weights anew, with another header."""
    return lambda folder: save_file(change(load_file(folder / WHOLE)), folder / WHOLE, metadata=metadata)


def cast(**dtypes: torch.dtype) -> Callable[[Weights], Weights]:
    """Change the dtype of what has a word in its name."""

    def change(weights: Weights) -> Weights:
        found = (
            (name, tensor, next((dtypes[word] for word in dtypes if word in name), tensor.dtype))
            for name, tensor in weights.items()
        )
        return {name: tensor.to(dtype) for name, tensor, dtype in found}

    return change


def total(size: object) -> Callable[[Path], None]:
    """Split the weights into shards whose index gives another size of all."""

    def write(folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
        (folder / WHOLE).unlink()
        model.save_pretrained(folder, max_shard_size="200KB")
        index = json.loads((folder / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 1
        (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": size}}))

    return write


def whole_beside_shards(folder: Path) -> None:
    shutil.copy(folder / WHOLE, folder / "kept")
    total(1)(folder)
    (folder / "kept").rename(folder / WHOLE)


PT = {"format": "pt"}
KINDS: dict[str, Callable[[Path], None]] = {
    "no metadata": save_again(None),
    "metadata without a format": save_again({"made": "by hand"}),
    "the format of another library": save_again({"format": "mlx"}),
    "64-bit floats": save_again(PT, cast(weight=torch.float64)),
    "8-bit floats without scales": save_again(PT, cast(proj=torch.float8_e4m3fn)),
    "a dtype for each kind": save_again(PT, cast(mlp=torch.float16, norm=torch.float32)),
    "a total too small": total(7),
    "a total that is no number": total("all"),
    "a whole file beside shards": whole_beside_shards,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_planned_as_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    folder = made_by_packages.plain(tmp_path / "model")
    KINDS[kind](folder)
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    for precision, dtype in {"bf16": "bfloat16", "fp32": "float32"}.items():
        plan = Planner(spec, machine(), here=True).plan(case(precision, "cpu"))
        assert plan.verdict is Verdict.FITS, plan.why
        assert plan.estimate is not None
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not any(loaded[1].values())
        assert plan.estimate.tiers["cpu"].weights_bytes == pytest.approx(held_bytes(loaded[0]), rel=0.01)
