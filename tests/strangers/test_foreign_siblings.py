"""Siblings of what transformers does not load: MLX, ModelOpt, HQQ and optimum-quanto, told for what they are, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec, skeleton_source
from harness.architecture.inspection import inspect
from harness.catalog import resolve
from harness.checkpoint import reader
from harness.core.records import Verdict
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from tests.strangers import made_by_packages
from tests.support.builders import case, machine

pytestmark = pytest.mark.filterwarnings("ignore")
Weights = Mapping[str, torch.Tensor]
TIED, ODD, ONE_KEY = {"tie_word_embeddings": True}, {"vocab_size": 515}, {"num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape).to(torch.uint8)


def mlx(bits: int, group: int) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pack as mlx-lm's `convert -q` does: words of 32 bits, with scales and biases of groups, embeddings as well."""

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        beside = {f"{module}.{part}": torch.ones(outputs, inputs // group).half() for part in ("scales", "biases")}
        return {f"{module}.weight": torch.zeros(outputs, inputs * bits // 32, dtype=torch.uint32), **beside}

    return pack


def modelopt(kind: str) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        one, other = torch.tensor(1.0), torch.tensor(1.0)
        if kind == "FP8":
            return {
                f"{module}.weight": weight.to(torch.float8_e4m3fn),
                f"{module}.weight_scale": one,
                f"{module}.input_scale": other,
            }
        if kind == "NVFP4":
            scale = torch.ones(outputs, inputs // 16).to(torch.float8_e4m3fn)
            beside = {f"{module}.weight_scale": scale, f"{module}.weight_scale_2": one, f"{module}.input_scale": other}
            return {f"{module}.weight": integers(outputs, inputs // 2), **beside}
        beside = {f"{module}.weight_scale": torch.ones(outputs, inputs // 64), f"{module}.pre_quant_scale": torch.ones(inputs)}
        return {f"{module}.weight": integers(outputs // 2, inputs), **beside}

    return pack


def hqq(bits: int, group: int) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.numel() // group
        beside = {f"{module}.{part}": torch.ones(groups, 1).half() for part in ("scale", "zero")}
        beside |= {f"{module}.nbits": torch.tensor(bits), f"{module}.shape": torch.tensor(weight.shape)}
        return {f"{module}.W_q": integers(group * bits // 8, groups), **beside}

    return pack


def quanto(bits: int) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        beside = {f"{module}.{part}": torch.tensor(1.0) for part in ("input_scale", "output_scale")}
        beside[f"{module}.weight._scale"] = torch.ones(outputs, 1).half()
        if bits == 8:
            return {f"{module}.weight._data": weight.to(torch.int8), **beside}
        beside[f"{module}.weight._shift"] = torch.ones(outputs, 1).half()
        return {f"{module}.weight._data._data": integers(outputs * bits // 8, inputs), **beside}

    return pack


def of_mlx(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group, **more}}


def of_modelopt(kind: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"], **more}}


def of_hqq(bits: int, group: int) -> dict[str, Any]:
    said = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": group}}}
    return {"quantization_config": {**said, "skip_modules": ["lm_head"]}}


def qmap(bits: int) -> dict[str, Any]:
    return {"quanto_qmap.json": {"model.layers.0.mlp.up_proj": {"weights": f"qint{bits}", "activations": "none"}}}


Pack = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
# what of the config differs, how weights are packed, embeddings as well, what the config says of it, files beside it, what is said
KINDS: dict[str, tuple[dict[str, Any], Pack, bool, dict[str, Any], dict[str, Any], str]] = {
    "mlx, tied": (TIED, mlx(4, 64), True, of_mlx(4, 64), {}, "mlx-lm"),
    "mlx, odd vocabulary": (ODD, mlx(8, 32), True, of_mlx(8, 32, mode="affine"), {}, "mlx-lm"),
    "mlx, 2 bits": (ONE_KEY, mlx(2, 64), True, of_mlx(2, 64), {}, "mlx-lm"),
    "modelopt fp8, tied": (TIED, modelopt("FP8"), False, of_modelopt("FP8"), {}, "vLLM"),
    "modelopt nvfp4": (ONE_KEY, modelopt("NVFP4"), False, of_modelopt("NVFP4"), {}, "vLLM"),
    "modelopt w4a16": (ODD, modelopt("W4A16_AWQ"), False, of_modelopt("W4A16_AWQ"), {}, "vLLM"),
    "modelopt, own file": (
        {},
        modelopt("FP8"),
        False,
        {},
        {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}},
        "vLLM",
    ),
    "hqq, 8 bits": (TIED, hqq(8, 64), False, of_hqq(8, 64), {}, "leaves out their W_q"),
    "hqq, 4 bits": (ODD, hqq(4, 64), False, of_hqq(4, 64), {}, "leaves out their W_q"),
    "hqq, 2 bits": (ONE_KEY, hqq(2, 16), False, of_hqq(2, 16), {}, "leaves out their W_q"),
    "quanto, 8 bits": (TIED, quanto(8), False, {}, qmap(8), "QuantizedModelForCausalLM"),
    "quanto, 4 bits": (ODD, quanto(4), False, {}, qmap(4), "QuantizedModelForCausalLM"),
    "quanto, 2 bits": (ONE_KEY, quanto(2), False, {}, qmap(2), "QuantizedModelForCausalLM"),
}


def save(folder: Path, kind: str) -> Path:
    changed, pack, embeddings, settings, beside, _ = KINDS[kind]
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**made_by_packages.CONFIG, **changed})).bfloat16().save_pretrained(
        folder
    )
    weights = dict(load_file(folder / "model.safetensors"))
    for name in [name for name in weights if name.endswith("_proj.weight") or (embeddings and weights[name].dim() == 2)]:
        weights |= pack(name.removesuffix(".weight"), weights.pop(name))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | settings))
    for name, own in beside.items():
        (folder / name).write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_told_for_what_it_is_and_counted(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", kind)
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    for precision in ("bf16", "int4"):
        plan = Planner(spec, machine(), here=True).plan(case(precision, "cpu"))
        assert plan.verdict is Verdict.INVALID
        assert KINDS[kind][-1] in str(plan.why)
    seen = inspect(reader.read(folder), name="stranger", kind="directory", source="stranger")
    assert seen.parameters == spec.skeleton.parameters


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "hqq" not in kind])
def test_transformers_does_not_load_it_right_either(kind: str, tmp_path: Path) -> None:
    """It raises, or leaves out the scales without which the weights are wrong, or fills what is missing with random numbers."""
    folder = save(tmp_path / "model", kind)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", output_loading_info=True)
    except (RuntimeError, ValueError):
        return
    assert loaded[1]["unexpected_keys"] or loaded[1]["missing_keys"]
