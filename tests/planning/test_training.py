"""Plans of training on one card: their arithmetic, what they refuse, and that the printed program trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.checkpoint.adapter import MODULE
from harness.core.errors import UsageError
from harness.core.methods.packages import lacking
from harness.core.records import Machine, Verdict
from harness.core.training.setup import OPTIMIZERS, TracedStep, Trainable, TrainingSetup
from harness.core.units import GIB, MIB
from harness.planning.training import code, memory
from tests.support import small_models
from tests.support.builders import gpu, machine

WITHOUT = pytest.mark.skipif(bool(lacking((MODULE,))), reason="peft is not installed")
CARD = machine(gpu(free_bytes=8 * GIB))
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trained") / "small"
    skeleton = small_models.save("llama", made)
    small_models.write_letters(made, skeleton.vocab_size)
    return made


@pytest.fixture(scope="module")
def spec(folder: Path) -> ModelSpec:
    return model_spec.read_spec(resolve.resolve(str(folder)))


def setup_of(method: str = "lora", **settings: Any) -> TrainingSetup:
    return TrainingSetup(method=method, **{"sequence_length": 32, **settings})


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit", "sgd"])
def test_a_plan_is_a_traced_step_and_the_optimizer(spec: ModelSpec, optimizer: str) -> None:
    setup = memory.settled(spec, CARD, setup_of(rank=4, targets=("q_proj", "down_proj"), optimizer=optimizer))
    plan = memory.plan_training(spec, CARD, setup)
    adapted = [one.tensor.shape for one in spec.skeleton.weights if one.path.endswith(("q_proj.weight", "down_proj.weight"))]
    assert plan.trained == sum(4 * sum(shape) for shape in adapted)
    states = sum(OPTIMIZERS[optimizer].state_bytes(one) for one in plan.step.trained)
    paged = optimizer.startswith("paged")
    assert (plan.parts["optimizer"], plan.paged) == ((0, states) if paged else (states, 0))
    assert plan.parts["weights"] == pytest.approx(2 * spec.skeleton.parameters, rel=0.05)
    assert plan.peak_bytes == sum(plan.parts.values())
    assert plan.needed.low <= plan.needed.best <= plan.needed.high
    assert plan.verdict is Verdict.FITS


def test_the_step_of_the_optimizer_can_be_the_worst_moment(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (Trainable(shape=(1024, 1024), itemsize=2),)
    sizes = dict.fromkeys(("adapters_bytes", "gradients_bytes", "activations_bytes", "logits_bytes", "temporary_bytes"), 0)
    step = TracedStep(weights_bytes=2 * MIB, **sizes, fragmentation_bytes=0, trained=weights, source="")
    monkeypatch.setattr(memory, "traced_step", lambda *_: step)
    parts = memory.plan_training(spec, CARD, setup_of("full", optimizer="adamw_torch")).parts
    assert {name: parts[name] // MIB for name in ("weights", "gradients", "optimizer", "temporary", "activations")} == {
        "weights": 2, "gradients": 2, "optimizer": 4, "temporary": 2, "activations": 0
    }  # fmt: skip


def test_targets_are_all_linears_but_the_head(spec: ModelSpec) -> None:
    assert memory.settled(spec, CARD, setup_of()).targets == LINEARS
    assert memory.settled(spec, CARD, setup_of("full")).targets == ()


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (setup_of(targets=("c_attn",)), "has no Linear called 'c_attn': known: .*; it has q_proj, k_proj"),
        (setup_of(targets=("lm_head",)), "has no Linear called 'lm_head'"),
        (setup_of(sequence_length=1 << 20), "--sequence-length 1048576 is beyond the context of small, [0-9]+ tokens: lower it"),
    ],
)
def test_what_a_model_has_not_is_one_sentence(spec: ModelSpec, setup: TrainingSetup, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        memory.settled(spec, CARD, setup)


def test_cards_that_cannot_are_one_sentence(spec: ModelSpec) -> None:
    old = machine(gpu(compute_capability="7.5"))
    assert memory.settled(spec, old, setup_of()).targets == LINEARS
    with pytest.raises(UsageError, match=r"needs bfloat16 \(compute capability 8.0\), and .* has compute capability 7.5: try"):
        memory.settled(spec, old, setup_of("full"))
    with pytest.raises(UsageError, match="needs a GPU, and this machine has none"):
        memory.settled(spec, machine(), setup_of())


def test_a_card_is_as_large_as_it_is(spec: ModelSpec) -> None:
    plan = memory.plan_training(spec, CARD, setup_of("full"))

    def verdict(size: int | None) -> Verdict:
        return plan._replace(card=replace(plan.card, free_bytes=size, total_bytes=size)).verdict

    assert verdict(round(plan.needed.high)) is Verdict.FITS
    assert verdict(round(plan.needed.best)) is Verdict.TIGHT
    assert verdict(round(plan.needed.best) - 1) is Verdict.TOO_BIG
    assert verdict(None) is Verdict.UNKNOWN


def trained_by_its_program(folder: Path, setup: TrainingSetup, here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the program of a setup for one step on the processor, in a directory of its own; return its names."""
    program = code.training_program(f'MODEL = "{folder}"\n\n', setup, "bfloat16", "AutoModelForCausalLM", 0)
    for card, other in (('{"": 0}', '{"": "cpu"}'), ("bf16=True", "bf16=True, use_cpu=True, max_steps=1, report_to=[]")):
        assert program.count(card) == 1
        program = program.replace(card, other)
    monkeypatch.chdir(here)
    (here / "train.txt").write_text("and so on " * 20, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(program, names)
    return names


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft and Trainer call it
@pytest.mark.parametrize("method", ["full", *(pytest.param(method, marks=WITHOUT) for method in ("lora", "qlora"))])
def test_the_printed_program_trains(
    spec: ModelSpec, folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = memory.settled(spec, CARD, setup_of(method, checkpointing=True))
    names = trained_by_its_program(folder, setup, tmp_path, monkeypatch)
    assert names["trainer"].state.global_step == 1
    assert list((tmp_path / "trained").glob("*.safetensors"))
    packed = [module for module in names["model"].modules() if type(module).__name__ == "Linear4bit"]
    assert bool(packed) == (method == "qlora")
    assert memory.left_out(spec.skeleton, setup) is None


@WITHOUT
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_routed_experts_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence of the plan against what peft and bitsandbytes really do with stacked experts."""
    made = tmp_path / "experts"
    skeleton = small_models.save("qwen3_moe", made)
    small_models.write_letters(made, skeleton.vocab_size)
    setup = memory.settled(model_spec.read_spec(resolve.resolve(str(made))), CARD, setup_of("qlora"))
    assert memory.left_out(skeleton, setup) == (
        "Routed experts get no adapters and stay in 16 bits: they are stacked parameters, and peft stands beside Linears."
    )
    assert "16 bits" not in str(memory.left_out(skeleton, replace(setup, method="lora")))
    assert memory.left_out(skeleton, replace(setup, method="full")) is None
    model = trained_by_its_program(made, setup, tmp_path, monkeypatch)["model"]
    experts = {name: one for name, one in model.named_parameters() if ".experts." in name}
    assert experts
    assert not [name for name in experts if "lora" in name]
    assert {(str(one.dtype), one.requires_grad) for one in experts.values()} == {("torch.bfloat16", False)}


def test_the_largest_card_is_taken() -> None:
    two: Machine = machine(gpu(0, free_bytes=4 * GIB), gpu(1, free_bytes=11 * GIB))
    assert memory.largest_card(two).name == "gpu:1"
