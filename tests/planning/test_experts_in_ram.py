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
from harness.planning.code import Destination, loading_code
from harness.planning.device_map.experts import blocks_of_experts, experts_map, experts_of
from harness.planning.device_map.tiers import tier
from harness.planning.planner import Planner
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


def test_the_card_is_filled_with_experts_of_the_first_blocks_and_the_others_lie_in_ram() -> None:
    one = plan("qwen3-30b-a3b")
    assert one.estimate is not None
    held = {name: tier.weights_bytes for name, tier in one.estimate.tiers.items()}
    of_a_block = 128 * 3 * 2048 * 768 * 2  # experts, their matrices, in 16 bits
    assert isinstance(one.device_map, dict)
    in_ram = [path for path, place in one.device_map.items() if place == "cpu"]
    assert 0 < len(in_ram) < 48
    assert in_ram == [f"model.layers.{number}.mlp.experts" for number in range(48 - len(in_ram), 48)]
    assert held["cpu"] == len(in_ram) * of_a_block
    assert one.why == f"The experts of {len(in_ram)} of 48 blocks are in RAM."
    whole = plan("qwen3-30b-a3b", "cpu").estimate
    assert whole is not None
    assert held["gpu:0"] + held["cpu"] == whole.tiers["cpu"].weights_bytes
    card = one.estimate.tiers["gpu:0"]
    assert card.needed_high_bytes <= (card.capacity_bytes or 0) < card.needed_high_bytes + of_a_block
    assert not any(path.startswith(f"{other}.") for path in one.device_map for other in one.device_map)


def test_a_smaller_card_holds_fewer_experts_and_a_large_one_all_but_one_block() -> None:
    def in_ram(card: str) -> int:
        planner = Planner(read_spec(resolve.resolve("qwen3-30b-a3b")), profile([card], ram=128 * GIB), here=False)
        found = planner.plan(Case(model="qwen3-30b-a3b", precision="bf16", placement=NAME)).device_map
        assert isinstance(found, dict)
        return [*found.values()].count("cpu")

    assert in_ram("4GiB") == 48 > in_ram("12GiB") > in_ram("24GiB") > in_ram("80GiB") == 1


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


@pytest.mark.parametrize("left", [1, 2])
def test_the_code_multiplies_where_the_experts_of_the_last_blocks_lie(saved: Path, brought: list[int], left: int) -> None:
    """A card that is the processor by another name is one to accelerate: its hooks bring to it what lies in RAM."""
    skeleton = read_spec(resolve.resolve(str(saved))).skeleton
    blocks = blocks_of_experts(skeleton)[-left:]
    placed = {path: tier(place) for path, place in experts_map(skeleton, 0, blocks).items()}
    code = loading_code(PRECISIONS["bf16"], PLACEMENTS[NAME], "bfloat16", Destination(device_map=placed, on_gpu=True))
    names: dict[str, Any] = {"MODEL": str(saved), "torch": torch}
    exec(code.replace(": 0", ': torch.device("cpu")'), names)
    model = names["model"]
    hooked = [name for name, part in model.named_modules() if hasattr(part, "_hf_hook")]
    assert hooked == [module for module, block in experts_of(skeleton).items() if block in blocks] != []
    assert not any(weight.is_meta for weight in model.parameters())
    brought.clear()
    ids = torch.arange(12)[None]
    plain: Any = AutoModelForCausalLM.from_pretrained(saved, dtype="bfloat16")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not brought
