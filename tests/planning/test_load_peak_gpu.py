"""What a GPU holds at most while loading: the plan against transformers' own loader, on small hollow files and fake cards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.core_model_loading import dot_natural_key
from transformers.integrations import mxfp4

from harness.architecture import model_spec, skeleton_source
from harness.architecture.model_spec import ModelSpec
from harness.checkpoint import reader
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, TierEstimate, Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning import calibration
from harness.planning.cost.estimate import weight_format
from harness.planning.cost.inventory import Inventory
from harness.planning.loading import order
from harness.planning.loading.order import on_card, sort_key, stored_name
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker.trace.ledger import GRAIN
from harness.worker.trace.load import Cards, trace_load
from tests.strangers import stored_forms
from tests.support import hollow

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048}
SIZES |= {"num_hidden_layers": 3, "head_dim": 128, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
LLAMA = {"model_type": "llama", **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 3, "n_head": 8, "vocab_size": 128, "n_positions": 64}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "wide": ({**LLAMA, "hidden_size": 8192, "intermediate_size": 22528, "num_attention_heads": 64, "num_hidden_layers": 8}, {}),
    "tied": ({**LLAMA, "tie_word_embeddings": True}, {}),
    "tied and stored twice": ({**LLAMA, "tie_word_embeddings": True}, {"repeats_head": True}),
    "float32": (LLAMA, {"dtype": "float32"}),
    "neox, float32 in .bin": (
        {"model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 2048},
        {"dtype": "float32", "ending": "bin"},
    ),
    "gpt2, which transposes": ({**GPT2, "bos_token_id": 1, "eos_token_id": 2}, {}),
    "mixtral": ({"model_type": "mixtral", **SIZES, "num_local_experts": 4}, {}),
    "qwen3, experts": ({"model_type": "qwen3_moe", **SIZES, **EXPERTS}, {}),
}
ROWS = [
    *(("llama", precision) for precision in ("bf16", "int8", "int4", "nf4-dq", "fp8")),
    ("tied", "bf16"),
    ("tied and stored twice", "int8"),
    ("float32", "bf16"),
    ("neox, float32 in .bin", "int4"),
    ("gpt2, which transposes", "int4"),
    *(("mixtral", precision) for precision in ("bf16", "int4", "fp8")),
    ("qwen3, experts", "bf16"),
]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Build skeletons here, not in a worker each, and draw no bars."""
    transformers.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
        yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hollow")
    return {name: hollow.write(root / str(number), config, **how) for number, (name, (config, how)) in enumerate(MODELS.items())}


@cache
def spec_of(folder: Path) -> ModelSpec:
    return model_spec.of_checkpoint("small", str(folder), reader.read(folder), folder)


def planned(folder: Path, precision: str, placement: str = "direct") -> dict[str, TierEstimate]:
    machine = profile(["400GiB"], ram=400 * GIB)
    case = Case(model="small", precision=precision, placement=placement, workload=Workload(prompt_tokens=8, new_tokens=1, batch=1))
    found = Planner(spec_of(folder), machine, here=False).plan(case).estimate
    assert found is not None
    return found.tiers


def over(tier: TierEstimate) -> int:
    context = sum(calibration.default()[name].best for name in ("gpu_context_bytes", "gpu_workspace_bytes"))
    return tier.load_peak_bytes - tier.weights_bytes - int(context)


def rounding(folder: Path) -> int:
    """What the allocator's rounding of each tensor may add up to, of the few parts that a quantizer makes of one as well."""
    return 4 * GRAIN * len(spec_of(folder).skeleton.weights)


@pytest.mark.parametrize("precision", ["torchao-int8", "torchao-int8-dynamic", "torchao-int4", "quanto-int8"])
@pytest.mark.parametrize("model", ["wide", "tied"])
def test_the_plan_holds_what_packages_take(folders: dict[str, Path], model: str, precision: str) -> None:
    """Their tensors are classes of their own around others, which are counted. In 4 bits torchao pads inputs to 1,024."""
    pytest.importorskip(PRECISIONS[precision].needs[0])
    (found,) = trace_load(folders[model], precision, {"": 0}, Cards(capability="9.0"))
    tier = planned(folders[model], precision)["gpu:0"]
    assert tier.weights_bytes == pytest.approx(found.held_bytes, rel=0.02)
    assert over(tier) == pytest.approx(found.over_bytes, rel=0.01)


def test_what_quanto_packs_of_no_fake_tensor_is_not_traced(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no trace of loading in quanto-int4: optimum-quanto packs tensors of torch's own class"):
        trace_load(folders["llama"], "quanto-int4", {"": 0})


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is how transformers is asked to unpack
@pytest.mark.parametrize("form", ["fp8-blocks", "metal"])
def test_weights_that_are_unpacked_on_the_card_pass_through_wider_ones(form: str, tmp_path: Path) -> None:
    """One at a time, beside those that threads copied ahead as they are stored."""
    folder = stored_forms.save_hollow(tmp_path, form)
    (alone,) = trace_load(folder, "bf16", {"": 0})
    (ahead,) = trace_load(folder, "bf16", {"": 0}, ahead=True)
    found = over(planned(folder, "bf16")["gpu:0"])
    assert found == pytest.approx(ahead.over_bytes, rel=0.02)
    assert found > alone.over_bytes > 400 << 20


@pytest.mark.parametrize(("model", "precision"), ROWS)
def test_the_plan_holds_what_the_loader_holds(folders: dict[str, Path], model: str, precision: str) -> None:
    folder, cards = folders[model], Cards(capability="9.0")
    (alone,) = trace_load(folder, precision, {"": 0}, cards)
    tier, slack = planned(folder, precision)["gpu:0"], rounding(folder)
    assert tier.weights_bytes == pytest.approx(alone.held_bytes, abs=slack)
    assert least_over(folder, precision) == pytest.approx(alone.over_bytes, abs=slack)
    if PRECISIONS[precision].quantizes:  # which no threads help with
        assert over(tier) == pytest.approx(alone.over_bytes, abs=slack)
    else:
        (ahead,) = trace_load(folder, precision, {"": 0}, cards, ahead=True)
        assert over(tier) == pytest.approx(ahead.over_bytes, abs=slack)
        assert ahead.over_bytes >= alone.over_bytes


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu+cpu", "recommended", "disk"])
def test_the_loader_leaves_off_the_card_what_the_plan_leaves_there(
    folders: dict[str, Path], placement: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes beside the card: the map that the plan writes out, through transformers' own checks, quantizer and loader."""
    monkeypatch.chdir(tmp_path)  # an offload folder would lie here
    folder = folders["wide"]
    machine = profile([{"int8": "4GiB", "int4": "2.75GiB"}[precision]], ram=40 * GIB)
    case = Case(model="small", precision=precision, placement=placement, workload=Workload(prompt_tokens=8, new_tokens=1, batch=1))
    plan = Planner(spec_of(folder), machine, here=False).plan(case)
    assert plan.verdict.is_good, plan.why
    assert isinstance(plan.device_map, dict)
    assert plan.estimate is not None
    places = {path: int(str(tier).removeprefix("gpu:")) if "gpu" in str(tier) else tier for path, tier in plan.device_map.items()}
    assert {0, "cpu"} <= {*places.values()}
    (found,) = trace_load(folder, precision, places)
    assert plan.estimate.tiers["gpu:0"].weights_bytes == pytest.approx(found.held_bytes, abs=rounding(folder))
    assert over(plan.estimate.tiers["gpu:0"]) == pytest.approx(found.over_bytes, abs=rounding(folder))


def least_over(folder: Path, precision: str) -> float:
    """Return what a loader that copies one tensor after the other takes, by the steps of the plan."""
    row, spec = PRECISIONS[precision], spec_of(folder)
    inventory = Inventory(spec, weight_format(row, row.dtype, spec))
    twice = inventory.total.twice  # a head that is stored although it is tied, compared with what it is tied to
    return twice + max(on_card(inventory.load_runs, None, sequential=True).low, twice / 2)


@pytest.mark.parametrize("experts", [4, 12])
def test_experts_in_mxfp4_are_unpacked_beside_their_stack(tmp_path: Path, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few experts the index into the table of values is the most, with more than are unpacked at once the turned stack."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 512, "num_local_experts": experts, "num_experts_per_tok": 2}
    folder = hollow.write(tmp_path / "m", {"model_type": "gpt_oss", **sizes, "quantization_config": {"quant_method": "mxfp4"}})
    rows = 4 * 1024 * 512 // 32  # of four experts
    own = mxfp4._convert_moe_packed_tensors
    assert signature(own).parameters["rows_per_chunk"].default == order._MX_ROWS
    monkeypatch.setattr(
        mxfp4, "_convert_moe_packed_tensors", lambda *given, **named: own(*given, **named | {"rows_per_chunk": rows})
    )
    monkeypatch.setattr(order, "_MX_ROWS", rows)
    (found,) = trace_load(folder, "bf16", {"": 0}, Cards(capability="9.0"), ahead=True)
    assert over(planned(folder, "bf16")["gpu:0"]) == pytest.approx(found.over_bytes, abs=rounding(folder))
    assert found.over_bytes > 10 * rounding(folder)


def test_the_small_models_are_large_enough_to_tell(folders: dict[str, Path]) -> None:
    rows = [("llama", "int8"), ("gpt2, which transposes", "int4"), ("mixtral", "bf16"), ("mixtral", "fp8"), ("llama", "nf4-dq")]
    assert all(over(planned(folders[model], precision)["gpu:0"]) > 5 * rounding(folders[model]) for model, precision in rows)


def test_the_largest_tensors_are_named(folders: dict[str, Path]) -> None:
    (found,) = trace_load(folders["mixtral"], "bf16", {"": 0})
    halves = ("stack bfloat16[4, 2816, 1024] of model.layers.2.mlp.experts.gate_up_proj", 4 * 2816 * 1024 * 2)
    assert found.tensors[:2] == (halves, halves)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_each_of_two_cards_has_its_own_peak(folders: dict[str, Path], precision: str) -> None:
    """What comes later on the other card does not matter."""
    folder, row = folders["mixtral"], PRECISIONS[precision]
    spec = spec_of(folder)
    first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    homes = {**dict.fromkeys(first, 0), "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    steps = Inventory(spec, weight_format(row, row.dtype, spec)).load_runs
    for number, found in enumerate(trace_load(folder, precision, homes, Cards(count=2))):
        pieces = [path for path, home in homes.items() if home == number]
        given = on_card(steps, pieces, sequential=True).low
        assert given == pytest.approx(found.over_bytes, abs=rounding(folder))
        assert given > 10 * rounding(folder)


def test_a_map_is_inferred_for_the_cards_that_there_are(folders: dict[str, Path]) -> None:
    (whole,) = trace_load(folders["llama"], "bf16", "auto")
    halves = trace_load(folders["llama"], "bf16", "auto", Cards(count=2, total_bytes=whole.held_bytes * 3 // 4))
    assert [half.device for half in halves] == ["cuda:0", "cuda:1"]
    assert sum(half.held_bytes for half in halves) == pytest.approx(whole.held_bytes, abs=rounding(folders["llama"]))


def test_nothing_passes_over_a_card_that_gets_a_whole_model(folders: dict[str, Path]) -> None:
    assert over(planned(folders["mixtral"], "bf16", "ram-to-gpu")["gpu:0"]) == 0


def test_files_that_hold_the_stacks_need_no_more(tmp_path: Path) -> None:
    from harness.architecture import synthetic
    from harness.catalog.resolve import Source

    source = tmp_path / "config"
    hollow.write(source, MODELS["mixtral"][0])
    made = synthetic.describe(Source(kind="directory", name="small", location=str(source)))
    folder = synthetic.write_synthetic(made, tmp_path / "stacked", hollow=True)
    (found,) = trace_load(folder, "bf16", {"": 0}, ahead=True)
    assert found.over_bytes == over(planned(folder, "bf16")["gpu:0"]) == 0


def test_names_are_sorted_as_transformers_sorts_them() -> None:
    names = ["model.layers.10.mlp.w2", "model.layers.9.mlp.w10", "lm_head.weight", "a.1.b", "a.b", "a.b2", "a.b11", "x.01", "x.1a"]
    assert sorted(names, key=sort_key) == sorted(names, key=dot_natural_key)
    assert [list(sort_key(name)) for name in names] == [dot_natural_key(name) for name in names]


def test_the_order_is_that_of_the_names_in_the_files(folders: dict[str, Path]) -> None:
    naming = spec_of(folders["mixtral"]).skeleton.naming
    gate = stored_name("model.layers.2.mlp.experts.gate_up_proj", naming)
    assert sort_key(gate) < sort_key(stored_name("model.layers.2.mlp.experts.down_proj", naming))  # w1 and w3 before w2
    assert stored_name("lm_head.weight", spec_of(folders["neox, float32 in .bin"]).skeleton.naming) == "embed_out.weight"
