"""Weights as estimated against weights as held: small models really loaded, full-size ones built without memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers

from harness.architecture import skeleton_source
from harness.architecture.skeleton import Skeleton
from harness.catalog import shipped
from harness.checkpoint import reader
from harness.core.units import format_share
from harness.planning.cost.memory import WeightFormat
from harness.worker import build_skeleton as worker
from harness.worker.auto_class import auto_class_of
from tests.support import small_models
from tests.support.builders import weight_bytes
from tests.support.gguf_files import GGUF_KINDS, small_gguf_of
from tests.support.packed_files import estimated, spec, write_packed
from tests.support.reporting import Figure
from tests.support.small_models import MODELS, WAYS

NEAR = 0.005


def said(errors: Sequence[float]) -> str:
    return f"at most {format_share(max(map(abs, errors)))}"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars out of the output."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Skeleton]]:
    folder = tmp_path_factory.mktemp("small")
    return {name: (folder / name, small_models.save(name, folder / name)) for name in MODELS}


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_loaded_models(way: str, saved: dict[str, tuple[Path, Skeleton]], figures: list[Figure]) -> None:
    """One architecture a row, loaded by the code that plan prints."""
    errors = []
    for folder, built in saved.values():
        held = small_models.held_bytes(small_models.load(folder, WAYS[way]))
        errors.append(small_models.estimated(built, WAYS[way]) / held - 1)
    figures.append(Figure(what=f"weights of loaded models, {way}", rows=len(errors), found=said(errors), wanted="0.5 %"))
    assert max(map(abs, errors)) < NEAR


def full_size() -> dict[str, dict[str, Any]]:
    """Return the configs of the catalog whose class transformers has, one for each skeleton."""
    configs = {skeleton_source.fingerprint(entry.config): (name, entry.config) for name, entry in shipped.catalog().items()}
    native = {name: worker._translate(config) for name, config in configs.values()}
    return {name: config for name, config in native.items() if config["model_type"] in transformers.CONFIG_MAPPING}


def test_weights_of_full_size_models(figures: list[Figure]) -> None:
    """Every skeleton that is shipped against the model that transformers builds on the meta device, in bfloat16."""
    errors, parameters = [], []
    for name, config in full_size().items():
        read, named = worker.read_model_config(config), worker._named(shipped.catalog()[name].config)
        ours, model = skeleton_source.named(name), worker.construct(auto_class_of(read, named), read)
        estimated = sum(weight_bytes(ours, WeightFormat(dtype="bfloat16")).values())
        errors.append(estimated / small_models.held_bytes(model) - 1)
        parameters.append(ours.parameters / sum(parameter.numel() for parameter in model.parameters()) - 1)
    figures.append(Figure(what="weights of full-size models, bf16", rows=len(errors), found=said(errors), wanted="0.5 %"))
    figures.append(Figure(what="parameters of full-size models", rows=len(parameters), found=said(parameters), wanted="0"))
    assert max(map(abs, errors)) < NEAR
    assert not any(parameters)


@pytest.mark.parametrize("way", [way for way, row in WAYS.items() if row.needs == ("bitsandbytes",)])
def test_weights_that_bitsandbytes_saved(
    way: str, saved: dict[str, tuple[Path, Skeleton]], figures: list[Figure], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Models that have Linears to quantize, saved and loaded again as they are."""
    monkeypatch.setattr(
        skeleton_source, "build", lambda config, _: worker.build_skeleton(config)
    )  # in this process: a worker costs seconds
    errors = []
    for name, (folder, built) in saved.items():
        if any(weight.quantizes for weight in built.weights):
            small_models.load(folder, WAYS[way]).save_pretrained(tmp_path / name)
            held = small_models.held_bytes(small_models.load(tmp_path / name, WAYS["bf16"]))
            errors.append(estimated(spec(tmp_path / name), "bf16", saved=False) / held - 1)
    figures.append(Figure(what=f"weights saved by bitsandbytes, {way}", rows=len(errors), found=said(errors), wanted="0.5 %"))
    assert max(map(abs, errors)) < NEAR


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 128)])
def test_weights_of_gptq_files(bits: int, group: int, figures: list[Figure], tmp_path: Path) -> None:
    """Models of the catalog in GPTQ's layout, as many tensors as a checkpoint may have."""
    errors = []
    for index, (name, config) in enumerate(full_size().items()):
        if "wbits" not in config and skeleton_source.named(name).model_type not in ("gpt_oss", "qwen3_moe"):
            stored = write_packed(tmp_path / str(index), name, bits, group)
            errors.append(estimated(spec(tmp_path / str(index))) / stored - 1)
    what = f"weights of GPTQ files, {bits} bits, groups of {group}"
    figures.append(Figure(what=what, rows=len(errors), found=said(errors), wanted="0.5 %"))
    assert max(map(abs, errors)) < NEAR


def test_weights_of_gguf_files(figures: list[Figure], tmp_path: Path) -> None:
    kinds = [gguf.GGMLQuantizationType[kind] for kind in GGUF_KINDS]
    errors = [reader.read(path).bytes / stored - 1 for path, stored in (small_gguf_of(tmp_path, kind) for kind in kinds)]
    figures.append(Figure(what="weights of GGUF files, a type a row", rows=len(errors), found=said(errors), wanted="0"))
    assert not any(errors)
