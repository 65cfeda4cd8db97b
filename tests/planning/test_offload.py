"""Weights on the disk: how many bytes loading really writes there, and what is said where they do not go."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from harness.architecture import model_spec
from harness.checkpoint import reader
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Machine, Plan, Verdict
from harness.core.units import GIB, MIB
from harness.measure.protocol import Load
from harness.planning.code import Destination, loading_code
from harness.planning.planner import Planner
from harness.planning.verdict import short_of_disk
from harness.worker import model as work
from tests.support import builders, small_models

MACHINE = builders.machine()


def with_disk(free_bytes: int) -> Machine:
    tiers = tuple(replace(tier, free_bytes=free_bytes) if tier.name == "disk" else tier for tier in MACHINE.tiers)
    return replace(MACHINE, tiers=tiers)


def planned(directory: Path, placement: str = "disk", machine: Machine = MACHINE) -> Plan:
    spec = model_spec.of_checkpoint("tiny", str(directory), reader.read(directory), directory)
    return Planner(spec, machine).plan(builders.case("bf16", placement))


def needed(plan: Plan) -> int:
    assert plan.estimate is not None
    return plan.estimate.tiers["disk"].needed_bytes


def written(directory: Path, code: str, place: Path) -> int:
    """Load by this code, and count the bytes of the offload folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        work.load(Load(model=str(directory), code=code, tokenizer=False), lambda _: contextlib.nullcontext())
    return sum(path.stat().st_size for path in (place / "offload").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    small_models.save("llama", directory)
    return directory


@pytest.fixture(scope="module")
def llama_bin(llama: Path) -> Path:
    """The same in torch's old format."""
    directory = llama.with_name("llama-bin")
    shutil.copytree(llama, directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_what_lies_in_a_safetensors_file_already_is_not_written(llama: Path, tmp_path: Path) -> None:
    plan = planned(llama)
    assert plan.estimate is not None
    assert plan.estimate.tiers["disk"].weights_bytes > 0
    assert needed(plan) == 0 == written(llama, str(plan.code), tmp_path)


def test_what_lies_in_other_files_is_written(llama_bin: Path, tmp_path: Path) -> None:
    plan = planned(llama_bin)
    assert needed(plan) == pytest.approx(written(llama_bin, str(plan.code), tmp_path), rel=0.02)


def test_a_map_that_spills_to_the_disk_says_where(llama_bin: Path, tmp_path: Path) -> None:
    """transformers asks for a folder for what is not in safetensors, whoever drew the map."""
    little = replace(MACHINE, tiers=tuple(replace(t, limit_bytes=2 * MIB) if t.name == "cpu" else t for t in MACHINE.tiers))
    plan = planned(llama_bin, "auto", little)
    assert needed(plan) == pytest.approx(written(llama_bin, str(plan.code), tmp_path), rel=0.02)
    assert "offload_folder" not in str(planned(llama_bin, "auto").code)


def test_experts_that_are_stacked_are_written(tmp_path: Path) -> None:
    small_models.save("mixtral", tmp_path / "mixtral")
    plan = planned(tmp_path / "mixtral")
    assert needed(plan) == pytest.approx(written(tmp_path / "mixtral", str(plan.code), tmp_path), rel=0.02)
    assert needed(plan) > MIB


def test_accelerate_writes_everything(llama: Path, tmp_path: Path) -> None:
    limits = planned(llama).max_memory
    code = loading_code(PRECISIONS["bf16"], PLACEMENTS["dispatch"], "bfloat16", Destination(max_memory=limits))
    assert written(llama, code, tmp_path) > 0
    little = replace(MACHINE, tiers=tuple(replace(t, free_bytes=2 * MIB) if t.name == "cpu" else t for t in MACHINE.tiers))
    plan = planned(llama, "dispatch", little)
    assert plan.estimate is not None
    assert needed(plan) == plan.estimate.tiers["disk"].weights_bytes > 0


def test_a_disk_that_is_too_full_is_told_before_loading(llama_bin: Path) -> None:
    plan = planned(llama_bin, machine=with_disk(MIB))
    assert plan.verdict is Verdict.TOO_BIG
    assert str(plan.why).startswith("too big for disk: the offload folder needs ")
    assert "free 0.000977" in str(plan.why)
    assert "set TMPDIR to a directory on a larger disk" in str(plan.why)
    assert planned(llama_bin, machine=with_disk(GIB)).verdict is Verdict.FITS


def test_enough_is_enough(llama_bin: Path) -> None:
    plan = planned(llama_bin)
    assert short_of_disk(plan.estimate, needed(plan)) is None
    assert short_of_disk(plan.estimate, needed(plan) - 1) is not None
    assert short_of_disk(plan.estimate, None) is None
    assert short_of_disk(None, 0) is None
