"""Checkpoints that the packages of methods made, from what is kept of them: planned and counted as their real loads were.

Where a package is installed, its checkpoint is made anew and loaded, and what is kept must still be so.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.architecture import model_spec, skeleton_source
from harness.architecture.inspection import inspect
from harness.architecture.model_spec import ModelSpec
from harness.checkpoint import reader
from harness.core.errors import CheckpointError
from harness.core.methods import packages
from harness.core.methods.table import METHODS
from harness.core.precisions import PRECISIONS
from harness.core.records import Plan, Verdict
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.cost import estimate
from harness.planning.device_map import tiers
from harness.planning.device_map.infer import infer
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.strangers import made_by_packages
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

NEAR = 0.005
ROWS: dict[str, Any] = json.loads(made_by_packages.ROWS.read_text())
BY_DTYPE = {PRECISIONS[name].dtype: name for name in ("fp32", "bf16", "fp16")}
# What a processor loads and multiplies by, and what nothing here does.
RUN = [(name, dtype) for name, row in ROWS.items() for dtype, found in row["loaded"].items() if "error" not in found]
FAIL = [(name, dtype) for name, row in ROWS.items() for dtype, found in row["loaded"].items() if "error" in found]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds; and let what is asked for be installed."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))


def save_hollow(folder: Path, name: str, but: str = "") -> Path:
    """Write the config and the headers of a checkpoint that is kept; its data is a hole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ROWS[name]["config"]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in ROWS[name]["tensors"].items():
        if but and key.endswith(but):
            continue
        start, end = end, end + math.prod(shape) * int("".join(filter(str.isdigit, dtype.partition("_")[0]))) // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def spec(folder: Path) -> ModelSpec:
    return model_spec.of_checkpoint("stranger", "stranger", reader.read(folder), folder)


def precision_of(one: ModelSpec, dtype: str) -> str:
    """Return the row that loads a checkpoint as it is stored, with the rest in a dtype."""
    assert one.packed is not None
    return one.packed.precision or BY_DTYPE[dtype]


def planned(one: ModelSpec, dtype: str, *, here: bool = False) -> Plan:
    return Planner(one, machine(), here=here).plan(case(precision_of(one, dtype), "cpu"))


def weights(one: Plan) -> int:
    assert one.estimate is not None, one.why
    return sum(tier.weights_bytes for tier in one.estimate.tiers.values())


@pytest.mark.parametrize(("name", "dtype"), RUN)
def test_what_is_planned_is_what_the_real_load_took(name: str, dtype: str, tmp_path: Path) -> None:
    plan = planned(spec(save_hollow(tmp_path, name)), dtype)
    assert plan.verdict is Verdict.FITS, plan.why
    assert weights(plan) == pytest.approx(ROWS[name]["loaded"][dtype]["held"], rel=NEAR)


@pytest.mark.parametrize(("name", "dtype"), FAIL)
def test_what_no_processor_runs_is_refused_with_a_way_out(name: str, dtype: str, tmp_path: Path) -> None:
    plan = planned(spec(save_hollow(tmp_path, name)), dtype)
    assert plan.verdict is Verdict.INVALID
    assert "use" in (plan.why or "") or "take" in (plan.why or "") or " only" in (plan.why or "")


@pytest.mark.parametrize("name", ROWS)
def test_the_parameters_that_are_counted_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    one = spec(save_hollow(tmp_path, name))
    seen = inspect(reader.read(tmp_path), name="stranger", kind="directory", source="stranger")
    if name == "vptq":  # an index stands for a vector, and how long that is only its settings say: what is stored is counted
        assert METHODS["vptq"].unsupported
    else:
        assert seen.parameters == pytest.approx(one.skeleton.parameters, rel=NEAR)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["auto"]])
def test_auto_s_map_is_the_one_that_transformers_inferred(name: str, tmp_path: Path) -> None:
    one = spec(save_hollow(tmp_path, name))
    dtype = next(dtype for form, dtype in RUN if form == name)
    fmt = estimate.weight_format(PRECISIONS[precision_of(one, dtype)], dtype, one)
    counted = tiers.widths_of(one.skeleton, fmt)
    assert len(ROWS[name]["auto"]) >= 10
    for memory, expected in ROWS[name]["auto"]:
        budget = {int(key) if key.isdigit() else key: size for key, size in memory.items()}
        assert infer(one.skeleton, counted, max_memory=budget) == expected, str(memory)


@pytest.mark.parametrize(
    ("name", "scales"),
    [("quark-int8", ".weight_scale"), ("aqlm-2x8", ".scales"), ("torchao-int8", "._weight_scale"), ("auto-round", ".scales")],
)
def test_packed_weights_without_scales_are_refused_before_loading(name: str, scales: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"without its .*{scales.lstrip('.')}"):
        spec(save_hollow(tmp_path, name, but=scales))


def test_transformers_puts_no_layer_of_vptq_into_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a nested module among those of the top, whatever the package: the row says so as long as it does."""
    from transformers.integrations.vptq import replace_with_vptq_linear

    stub = SimpleNamespace(VQuantLinear=lambda inputs, outputs, **_: torch.nn.Linear(inputs, outputs))
    monkeypatch.setitem(sys.modules, "vptq", stub)
    layer = ROWS["vptq"]["config"]["quantization_config"]["config_for_layers"]["model.layers.0.mlp.up_proj"]
    nested = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)})})
    asked = SimpleNamespace(config_for_layers={"model.up_proj": layer}, shared_layer_config={})
    with pytest.raises(KeyError, match=r"model\.up_proj"):
        replace_with_vptq_linear(nested, quantization_config=asked)
    assert METHODS["vptq"].unsupported is not None


def test_transformers_reads_other_names_than_sinq_saves() -> None:
    from transformers.quantizers.quantizer_sinq import SinqHfQuantizer

    (read,) = SinqHfQuantizer.serialized_names.values()
    saved = {f".{key.partition('up_proj.')[2]}" for key in ROWS["sinq-int4"]["tensors"] if "layers.0.mlp.up_proj." in key}
    assert any(name.startswith(".meta.") for name in saved)
    assert {name for name in saved if name.startswith(".meta")}.isdisjoint(read)
    assert METHODS["sinq"].unsupported is not None


def test_torchao_s_parts_are_those_that_transformers_groups() -> None:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    from harness.core.methods.layouts import TORCHAO_PARTS

    asked: Any = SimpleNamespace(pre_quantized=True, _discover_quantized_param_names=lambda: {"weight"})
    names = TorchAoHfQuantizer.serialized_names.fget(asked)["weight"]  # type: ignore[attr-defined]
    assert {f".{name}" for name in names} == {"._weight_qdata", *TORCHAO_PARTS}


# ---- where a package is installed ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_a_checkpoint_that_is_made_here_is_loaded_as_it_is_kept(name: str, tmp_path: Path) -> None:
    kept = ROWS[name]
    package = made_by_packages.MAKERS[name].package
    module = {"amd-quark": "quark", "auto-round": "auto_round"}.get(package, package)
    if absent := packages.lacking((module,)):
        pytest.skip(f"{absent[0]} is not installed")
    found = made_by_packages.row(name, tmp_path)
    assert found["tensors"] == kept["tensors"]
    assert found["loaded"] == kept["loaded"]
    assert found["auto"] == kept["auto"]
    folder = next(path.parent for path in (tmp_path / "made").rglob("config.json"))
    one = spec(folder)
    for dtype in (dtype for form, dtype in RUN if form == name):
        plan = planned(one, dtype, here=True)
        assert plan.verdict is Verdict.FITS, plan.why
        assert plan.code is not None
        model = work.load(Load(model=str(folder), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
        assert set(verify.checks(plan, work.loaded_facts(model)).values()) == {verify.OK}
        model.module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        assert weights(plan) == pytest.approx(held_bytes(model.module), rel=NEAR)
