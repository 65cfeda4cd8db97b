"""Routed experts that stay in RAM: what is planned where, how fast, and what transformers and accelerate do of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, hooks
from transformers import AutoModelForCausalLM

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Plan, Verdict
from harness.machine.gpus import profile
from harness.planning.choice.search import search
from harness.planning.code import loading_code
from harness.planning.planner import Planner
from harness.planning.verdict import experts_of
from tests.support import small_models

GIB = 1 << 30
NAME = "experts-in-ram"


def planner_for(model: str) -> Planner:
    return Planner(read_spec(resolve.resolve(model)), profile(["RTX 4090"], ram=96 * GIB), here=False)


def plan(model: str, placement: str = NAME, precision: str = "bf16") -> Plan:
    return planner_for(model).plan(Case(model=model, precision=precision, placement=placement))


def speed(one: Plan) -> float:
    assert one.estimate is not None
    return one.estimate.decode_tok_s.best


def test_experts_lie_in_ram_and_all_else_on_the_card() -> None:
    one = plan("qwen3-30b-a3b")
    assert one.estimate is not None
    held = {name: tier.weights_bytes for name, tier in one.estimate.tiers.items()}
    experts = 48 * 128 * 3 * 2048 * 768 * 2  # layers, experts, their matrices, in 16 bits
    assert held["cpu"] == experts
    whole = plan("qwen3-30b-a3b", "cpu").estimate
    assert whole is not None
    assert held["gpu:0"] + held["cpu"] == whole.tiers["cpu"].weights_bytes
    assert isinstance(one.device_map, dict)
    assert one.device_map[""] == "gpu:0"
    assert one.device_map["model.layers.47.mlp.experts"] == "cpu"
    assert len(one.device_map) == 49


def test_it_is_faster_than_bringing_experts_to_the_card() -> None:
    assert speed(plan("qwen3-30b-a3b")) > 3 * speed(plan("qwen3-30b-a3b", "auto"))
    assert speed(plan("qwen3-30b-a3b")) > speed(plan("qwen3-30b-a3b", "cpu"))


def test_a_search_finds_it() -> None:
    planner = planner_for("qwen3-30b-a3b")
    found = search(planner, Case(model="m", precision="bf16", placement="cpu").workload)
    assert NAME in {one.case.placement for one in found.plans if one.case.id in found.contexts and one.case.precision == "bf16"}


@pytest.mark.parametrize(
    ("model", "precision", "told"),
    [
        ("qwen2.5-7b-instruct", "bf16", "Qwen2ForCausalLM has no routed experts that could stay in RAM: take gpu+cpu"),
        ("qwen3-30b-a3b", "int4", "and int4 packs weights for one device"),
    ],
)
def test_what_cannot_stay_in_ram_is_one_sentence(model: str, precision: str, told: str) -> None:
    one = plan(model, precision=precision)
    assert one.verdict is Verdict.INVALID
    assert told in str(one.why)


@pytest.fixture(params=["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    small_models.save(request.param, tmp_path)
    return tmp_path


def test_the_code_leaves_exactly_the_planned_modules_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no card, `.to` goes nowhere; what is hooked is what would stay, and the model answers as before."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    names: dict[str, Any] = {"MODEL": str(saved)}
    exec(loading_code(PRECISIONS["bf16"], PLACEMENTS[NAME], "bfloat16"), names)
    model = names["model"]
    hooked = [name for name, part in model.named_modules() if hasattr(part, "_hf_hook")]
    assert hooked == experts_of(read_spec(resolve.resolve(str(saved))).skeleton) != []
    ids = torch.arange(12)[None]
    plain: Any = AutoModelForCausalLM.from_pretrained(saved, dtype="bfloat16")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the tensors that accelerate brings to where it computes."""
    sizes: list[int] = []
    own = hooks.set_module_tensor_to_device

    def counting(module: Any, name: str, device: Any, value: Any = None, **more: Any) -> Any:
        if value is not None and str(device) != "meta":
            sizes.append(value.nbytes)
        return own(module, name, device, value=value, **more)

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", counting)
    return sizes


def test_accelerate_brings_all_experts_of_a_layer_whichever_a_token_chooses(tmp_path: Path, brought: list[int]) -> None:
    small_models.save("qwen3_moe", tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    experts = sum(one.nbytes for name, one in model.named_parameters() if ".experts." in name)
    assert experts > 0
    cpu_offload(model, execution_device=torch.device("cpu"))
    brought.clear()
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    assert sum(brought) >= experts
