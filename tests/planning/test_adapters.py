"""Adapters: planned as their base and the LoRA on top, loaded by the printed code, and told where that cannot be."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import fingerprint, resolve
from harness.checkpoint import reader
from harness.checkpoint.adapter import _UNMERGED, MODULE, ON_OTHERS, read_adapter
from harness.cli import entry
from harness.core.errors import CheckpointError, UsageError
from harness.core.methods.packages import lacking
from harness.core.placements import PLACEMENTS
from harness.core.records import Plan, Verdict
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.planner import Planner
from harness.run.model_set import ModelSet
from harness.worker import model as work
from tests.support import runs, small_models
from tests.support.adapters import SHAPES, write_adapter
from tests.support.builders import case, gpu, machine

ELEMENTS = 2 * sum(8 * (outputs + inputs) for outputs, inputs in SHAPES.values())
WITHOUT = pytest.mark.skipif(bool(lacking((MODULE,))), reason="peft is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    small_models.save("llama", folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora", str(base))


def spec_of(folder: Path) -> ModelSpec:
    return model_spec.read_spec(resolve.resolve(str(folder)))


def planned(folder: Path, precision: str = "bf16", placement: str = "cpu") -> Plan:
    on = machine() if placement == "cpu" else machine(gpu())
    return Planner(spec_of(folder), on, here=False).plan(case(precision, placement))


def weights(one: Plan) -> int:
    assert one.estimate is not None
    return sum(tier.weights_bytes for tier in one.estimate.tiers.values())


@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp16", 2), ("fp32", 4), ("int8", 4), ("int4", 2), ("nf4-dq", 2)])
@pytest.mark.parametrize("placement", ["cpu", "direct", "auto"])
def test_its_matrices_come_on_top_of_the_base_to_the_byte(
    precision: str, width: int, placement: str, base: Path, adapter: Path
) -> None:
    """In the dtype of the model or of its products in 4 bits, and beside 8 bits in float32."""
    alone, on_top = planned(base, precision, placement), planned(adapter, precision, placement)
    assert weights(on_top) - weights(alone) == ELEMENTS * width
    assert (on_top.verdict, on_top.device_map) == (Verdict.FITS, alone.device_map)
    assert "peft>=0.20.0" in on_top.needs
    assert on_top.code is not None
    assert on_top.code.endswith("model.load_adapter(ADAPTER)\n")


def test_the_plan_says_what_is_loaded_onto_what(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["plan", str(adapter), "--ram", "8GiB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["model"]
    assert (told["name"], told["checkpoint_bytes"]) == ("lora", spec_of(base).checkpoint_bytes + ELEMENTS * 4)
    assert told["notes"][0].startswith("LoRA of rank 8, alpha 16 on down_proj, q_proj, v_proj: ")
    assert told["notes"][0].endswith(f"on top of '{base}', loaded by peft")
    assert entry.main(["plan", str(adapter), "--ram", "8GiB", "--code", "bf16/cpu"]) == 0
    program = capsys.readouterr().out
    assert f'MODEL = "{base}"' in program
    assert f'ADAPTER = "{adapter}"' in program


def test_its_base_may_be_a_model_of_the_catalog(tmp_path: Path) -> None:
    """By any name that a model may be given by; nothing of it has to be here."""
    folder = write_adapter(tmp_path / "lora", "Qwen/Qwen3-0.6B")
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": tensor
        for layer in range(28)
        for side, tensor in zip("AB", _pair(1024, 2048), strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    spec, alone = spec_of(folder), model_spec.read_spec(resolve.resolve("Qwen/Qwen3-0.6B"))
    assert spec.adapter is not None
    assert (spec.adapter.elements, spec.skeleton) == (28 * 4 * (1024 + 2048), alone.skeleton)
    assert spec.checkpoint_bytes == alone.checkpoint_bytes + spec.adapter.bytes


def _pair(inputs: int, outputs: int) -> Any:
    import torch

    return torch.zeros(4, inputs), torch.zeros(outputs, 4)


@pytest.mark.parametrize(
    "placement",
    [name for name, row in PLACEMENTS.items() if row.experts_in_ram or {"offloads_to_cpu", "dispatches"} & {*row.traits}],
)
def test_what_leaves_its_matrices_empty_is_refused(placement: str, adapter: Path) -> None:
    one = planned(adapter, "bf16", placement)
    assert one.verdict in (Verdict.INVALID, Verdict.UNAVAILABLE)
    assert "into a copy of its base first" in str(one.why) or "--device-map" in str(one.why)


@pytest.mark.parametrize("precision", ["torchao-int8", "quanto-int8", "fp8"])
def test_quantizers_that_it_was_not_tried_on_are_refused(precision: str, adapter: Path) -> None:
    one = planned(adapter, precision, "direct")
    assert (one.verdict, one.why) == (Verdict.INVALID, ON_OTHERS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "of the type 'IA3', and LORA is what can be planned: merge it"),
        ({"peft_type": "PROMPT_TUNING"}, "of the type 'PROMPT_TUNING', and LORA is what can be planned: peft itself loads it"),
        ({"peft_type": "PREFIX_TUNING"}, "and no copy of the base can hold it"),
        ({"peft_type": "P_TUNING"}, "and no copy of the base can hold it"),
        ({"peft_type": None}, "of the type null"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save, so it is more than LoRA"),
        ({"use_dora": True}, "sets use_dora"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "./gone"}, r"an adapter for './gone', and that is not to be had .* write where it is"),
        ({"base_model_name_or_path": "nobodys-model"}, r"an adapter for 'nobodys-model', and that is not to be had"),
    ],
)
def test_what_is_more_than_lora_or_has_no_base_is_told(settings: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", **{"base": str(base), **settings})
    with pytest.raises(CheckpointError, match=said):
        resolve.resolve(str(folder))


def test_a_base_that_the_hub_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = write_adapter(tmp_path / "lora", "nobody/has-it")
    with pytest.raises(CheckpointError, match="an adapter for 'nobody/has-it', and that is not to be had"):
        spec_of(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "holds no pair of matrices for 'model.layers.9"),
        ("base_model.model.lm_head.weight", "holds 'base_model.model.lm_head.weight', which is no LoRA matrix"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "which is no LoRA matrix of a Linear"),
    ],
)
def test_other_tensors_are_told(name: str, said: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), name: _pair(256, 256)[0]}, file)
    with pytest.raises(CheckpointError, match=said):
        read_adapter(adapter)


def test_what_is_cut_or_missing_is_told(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: .*download it again"):
        spec_of(adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_model.safetensors: download the adapter again"):
        spec_of(adapter)


def test_an_adapter_of_another_model_is_told(base: Path, tmp_path: Path) -> None:
    """Of more layers, or of another width."""
    deeper = write_adapter(tmp_path / "deeper", str(base), layers=3)
    with pytest.raises(CheckpointError, match=r"is an adapter for 'model.layers.2.mlp.down_proj' of 256 x 704, which .* has not"):
        spec_of(deeper)
    small_models.save("llama", tmp_path / "wide", hidden_size=512)
    with pytest.raises(CheckpointError, match="give the base that it was trained on"):
        spec_of(write_adapter(tmp_path / "narrow", str(tmp_path / "wide")))


def test_inspect_shows_rank_targets_and_base(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["inspect", str(adapter), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {"base": str(base), "rank": 8, "alpha": 16, "targets": ["down_proj", "q_proj", "v_proj"], "modules": 6}
    assert (told["adapter"], told["kind"], told["parameters"]) == (wanted, "adapter", ELEMENTS)
    assert entry.main(["inspect", str(adapter)]) == 0
    assert "LoRA of rank 8, alpha 16 on 6 modules: down_proj, q_proj, v_proj" in capsys.readouterr().out


def test_the_files_of_both_count_for_whether_it_is_the_same(base: Path, adapter: Path) -> None:
    read = reader.read(base)
    before = fingerprint.of_model(base, read, adapter=adapter)
    assert before != fingerprint.of_model(base, read)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    assert fingerprint.of_model(base, read, adapter=adapter) != before


def test_synthetic_weights_are_written_for_no_adapter(adapter: Path) -> None:
    models = ModelSet([str(adapter)], synthetic=True, trust=False)
    with pytest.raises(UsageError, match="--weights synthetic writes none for the adapter lora"):
        models.fetch(["lora"], lambda _: None)


def test_without_peft_a_case_says_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.planning.feasibility.lacking", lambda modules: tuple(modules))
    one = Planner(spec_of(adapter), machine()).plan(case("bf16", "cpu"))
    assert one.verdict is Verdict.UNAVAILABLE
    assert "peft: pip install 'peft>=0.20.0'" in str(one.why)


@WITHOUT
@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_is_what_was_planned(precision: str, dtype: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", str(base), dtype=dtype)
    one = planned(folder, precision)
    request = Load(model=str(base), adapter=str(folder), code=str(one.code), tokenizer=False)
    model = work.load(request, lambda _: contextlib.nullcontext())[0]
    facts = work.loaded_facts(model)
    matrices = [parameter for name, parameter in model.module.named_parameters() if ".lora_" in name]
    assert sum(matrix.nbytes for matrix in matrices) == weights(one) - weights(planned(base, precision))
    assert verify.checks(one, facts) == {"precision": "ok", "max_memory": "ok", "placement": "ok"}
    plain = model.module.get_parameter("model.layers.0.self_attn.q_proj.lora_B.default.weight").abs().sum()
    assert float(plain) > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of transformers, asked by peft
def test_what_peft_saves_is_read(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", rank_pattern={"q_proj": 16}, task_type="CAUSAL_LM", use_rslora=True)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "lora")
    one = planned(tmp_path / "lora")
    request = Load(model=str(base), adapter=str(tmp_path / "lora"), code=str(one.code), tokenizer=False)
    model = work.load(request, lambda _: contextlib.nullcontext())[0]
    assert sum(work.loaded_facts(model).tier_bytes.values()) == pytest.approx(weights(one), rel=1e-4)  # but a buffer of rotations


@WITHOUT
def test_an_adapter_is_measured(base: Path, tmp_path: Path) -> None:
    """The case ends well, its planned weights are what was loaded, and no directory is in the result."""
    where = runs.folder(tmp_path / "run", [], scripted=False)
    write_adapter(where / "lora", str(base))
    run = runs.start(where, ["lora"])
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    (line,) = (where / "fitmatrix-results" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found["outcome"] == "ok"
    predicted = found["estimate"]["tiers"]["cpu"]["weights_bytes"]
    assert sum(found["loaded"]["tier_bytes"].values()) == pytest.approx(predicted, rel=1e-4)
    assert 'ADAPTER = "lora"' in found["code"]
    assert str(tmp_path) not in line


@WITHOUT
def test_what_cannot_be_merged_is_what_peft_has_no_method_for() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    assert {kind.value for kind, one in PEFT_TYPE_TO_TUNER_MAPPING.items() if not hasattr(one, "merge_and_unload")} == {*_UNMERGED}
