"""What people download: planned by its headers, then loaded by the code of the plan, and held against what it then takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec, skeleton_source
from harness.architecture.inspection import inspect
from harness.architecture.model_spec import ModelSpec
from harness.checkpoint import quantization, reader
from harness.core.errors import CheckpointError
from harness.core.methods.packages import lacking
from harness.core.methods.table import FOREIGN, METHODS
from harness.core.precisions import PRECISIONS, Config, defaults
from harness.core.records import Machine, Plan, Verdict
from harness.core.units import GIB
from harness.machine import probe
from harness.machine.gpus import profile
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.cost import estimate
from harness.planning.device_map import tiers
from harness.planning.device_map.infer import infer
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.strangers import made_by_packages
from tests.strangers.stored_forms import FORMS, MXFP4, SMALL_GPT_OSS, save_form, save_hollow
from tests.support import packed_files
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

NEAR = 0.005
FOREIGN_FORMS = ("modelopt-nvfp4", "modelopt-fp8", "mlx", "mlx-in-its-new-place", "no-method", "exl2")
OF_BITSANDBYTES = ("bnb-nf4", "bnb-int8")  # whose values its own package makes, in tests/planning/test_stored.py
LOADED = (*(name for name in FORMS if name not in (*FOREIGN_FORMS, *OF_BITSANDBYTES, "hqq")), "mxfp4")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def spec(folder: Path) -> ModelSpec:
    return model_spec.of_checkpoint("stranger", "stranger", reader.read(folder), folder)


def planned(one: ModelSpec, precision: str, placement: str, on: Machine, *, here: bool = False) -> Plan:
    return Planner(one, on, here=here).plan(case(precision, placement))


def weights(one: Plan) -> int:
    assert one.estimate is not None, one.why
    return sum(tier.weights_bytes for tier in one.estimate.tiers.values())


# ---- loaded for real -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", LOADED)
def test_what_is_planned_on_a_processor_is_what_loading_takes(form: str, tmp_path: Path) -> None:
    one = spec(save_form(tmp_path, form))
    assert one.packed is not None
    assert one.packed.method is not None
    absent = lacking(one.packed.method.needs)
    plan = planned(one, "bf16", "cpu", machine(), here=True)
    if absent:
        assert plan.verdict is Verdict.UNAVAILABLE
        assert "pip install" in (plan.why or "")
        pytest.skip(f"{absent[0]} is not installed")
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.code is not None
    model = work.load(Load(model=str(tmp_path), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
    assert set(verify.checks(plan, work.loaded_facts(model)).values()) == {verify.OK}
    model.module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert weights(plan) == pytest.approx(held_bytes(model.module), rel=NEAR)


@pytest.mark.parametrize("form", LOADED)
def test_the_parameters_that_are_counted_are_those_of_the_model(form: str, tmp_path: Path) -> None:
    one = spec(save_form(tmp_path, form))
    seen = inspect(reader.read(tmp_path), name="stranger", kind="directory", source="stranger")
    assert seen.parameters == pytest.approx(one.skeleton.parameters, rel=NEAR)


# ---- planned for cards -----------------------------------------------------------------------------------------------------

# form -> card, precision, GiB of weights; None: that precision is refused.
ON_CARDS = [
    ("ct-w4a16", "RTX 3060 12GB", "bf16", 14.96),
    ("ct-fp8", "RTX 4090", "bf16", 14.96),
    ("fp8-blocks", "RTX 3090", "bf16", 14.96),
    ("fp8-blocks", "RTX 4090", "fp8", 8.46),
    ("fp8-blocks", "RTX 3090", "fp8", None),
    ("mxfp8", "RTX 4090", "mxfp8", 8.7),
    ("mxfp4", "RTX 5080", "mxfp4", 12.82),
    ("mxfp4", "RTX 5080", "bf16", 38.96),
    ("mxfp4", "GTX 1080", "mxfp4", None),
    ("bnb-nf4", "RTX 3060 12GB", "int4", 5.61),
    ("bnb-int8", "RTX 3060 12GB", "int8", 8.46),
]


@pytest.mark.parametrize(("form", "card", "precision", "gib"), ON_CARDS)
def test_what_lies_on_a_card_is_what_transformers_makes_there(
    form: str, card: str, precision: str, gib: float | None, tmp_path: Path
) -> None:
    one = spec(save_hollow(tmp_path, form))
    plan = planned(one, precision, "direct", profile([card], ram=64 * GIB))
    if gib is None:
        assert plan.verdict is Verdict.UNAVAILABLE
        assert "compute capability" in (plan.why or "")
    else:
        assert weights(plan) / GIB == pytest.approx(gib, rel=0.01)


def test_what_mxfp4_lacks_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    plan = planned(spec(save_hollow(tmp_path, "mxfp4")), "mxfp4", "direct", profile(["RTX 5080"], ram=64 * GIB), here=True)
    absent = lacking(("kernels", "triton"))
    if not absent:
        assert plan.verdict is Verdict.FITS
    else:
        assert plan.verdict is Verdict.UNAVAILABLE
        assert all(name in (plan.why or "").partition("pip install")[2] for name in absent)


# ---- what transformers does not know ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FOREIGN_FORMS)
def test_what_transformers_does_not_know_cannot_work_anywhere(form: str, tmp_path: Path) -> None:
    one = spec(save_form(tmp_path, form))
    assert one.packed is not None
    for precision in ("bf16", "int4"):
        plan = planned(one, precision, "cpu", machine(), here=True)
        assert plan.verdict is Verdict.INVALID
        assert "transformers does not know" in (plan.why or "")
    known = FOREIGN.get(one.packed.name)
    assert known is None or known.readers in (plan.why or "")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FOREIGN_FORMS)
def test_transformers_does_not_load_it_right_either(form: str, tmp_path: Path) -> None:
    """It raises, or leaves out the scales without which the weights are wrong, or fills what is missing with random numbers."""
    save_form(tmp_path, form)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    except (RuntimeError, ValueError):
        return
    assert loaded[1]["unexpected_keys"] or loaded[1]["missing_keys"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_of_hqq_transformers_leaves_out_what_the_files_hold(tmp_path: Path) -> None:
    """It would run with random numbers for weights, after a warning, so nothing that is stored so may run here."""
    one = spec(save_form(tmp_path, "hqq"))
    plan = planned(one, "bf16", "direct", profile(["RTX 4090"], ram=64 * GIB))
    assert plan.verdict is Verdict.INVALID
    assert "it leaves out their W_q" in (plan.why or "")
    pytest.importorskip("hqq")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    assert "model.layers.0.mlp.up_proj.W_q" in loaded[1]["unexpected_keys"]
    assert "model.layers.0.mlp.up_proj.weight" in loaded[1]["missing_keys"]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_without_groups_runs_on_a_processor_in_8_bits_alone(bits: int, tmp_path: Path) -> None:
    """The kernel that gptqmodel takes for 4 bits asks torch for a product of groups that it has not (gptqmodel 7.7 raises so)."""
    packed_files.save_gptq(tmp_path, bits, -1)
    one, card = spec(tmp_path), profile(["RTX 4090"], ram=64 * GIB)
    on_card, in_ram = planned(one, f"gptq-int{bits}", "direct", card), planned(one, f"gptq-int{bits}", "cpu", card)
    assert on_card.verdict is Verdict.FITS
    assert (in_ram.verdict is Verdict.INVALID) == (bits == 4)
    assert ("no product of 4-bit whole columns on this processor" in (in_ram.why or "")) == (bits == 4)


# method, bits, group, and whether gptqmodel runs it on a processor without AVX512_BF16, and with it
ON_PROCESSORS = [
    ("gptq", 4, 128, True, True),
    ("gptq", 4, 16, False, True),
    ("gptq", 4, -1, False, False),
    ("gptq", 4, 512, True, False),
    ("gptq", 2, 64, True, True),
    ("gptq", 8, 16, True, True),
    ("awq", 4, 128, True, True),
    ("awq", 4, 16, False, True),
    ("awq", 4, -1, False, False),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("method", "bits", "group", "plain", "fast"), ON_PROCESSORS)
def test_which_groups_a_processor_runs_is_what_gptqmodel_does(
    method: str, bits: int, group: int, plain: bool, fast: bool, tmp_path: Path
) -> None:
    """Whatever kernel the processor that is here takes; without gptqmodel what was found of both kinds is held alone."""
    if method == "gptq":
        packed_files.save_gptq(tmp_path, bits, group)
    else:
        packed_files.save_awq(tmp_path, group)
    one = spec(tmp_path)
    name = one.packed.precision if one.packed is not None else None
    ways = [name] if name else ["bf16", "fp16", "fp32"]  # of 2 bits there is no row, and the rest may be in any dtype
    kinds = [replace(machine(), avx512_bf16=found) for found in (False, True)]
    for way in ways:
        verdicts = [planned(one, way, "cpu", on).verdict for on in kinds]
        assert verdicts == [Verdict.FITS if runs else Verdict.INVALID for runs in (plain, fast)]
    if lacking(("gptqmodel", "optimum")):
        return
    plan = planned(one, ways[0], "cpu", replace(machine(), avx512_bf16=probe.probe(scratch=tmp_path).avx512_bf16))
    if plan.verdict is Verdict.FITS:
        assert plan.code is not None
        model = work.load(Load(model=str(tmp_path), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
        model.module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        assert model.module.dtype is torch.bfloat16
    else:
        assert "error" in made_by_packages.loaded(tmp_path, "bfloat16")


# method, group, and the bytes that gptqmodel 7.7.0 held after a forward pass in bfloat16, on a processor with AVX512_BF16
HELD = [("gptq", 16, 2_782_272), ("gptq", 32, 2_546_752), ("gptq", 128, 2_370_112), ("awq", 16, 2_763_392), ("awq", 128, 2_351_232)]


@pytest.mark.parametrize(("method", "group", "held"), HELD)
def test_scales_count_on_a_processor_as_its_kernel_keeps_them(method: str, group: int, held: int, tmp_path: Path) -> None:
    packed_files.save_gptq(tmp_path, 4, group) if method == "gptq" else packed_files.save_awq(tmp_path, group)
    plan = planned(spec(tmp_path), f"{method}-int4", "cpu", replace(machine(), avx512_bf16=True))
    assert weights(plan) == pytest.approx(held, rel=0.0005)


def test_packed_weights_are_multiplied_in_bfloat16_on_a_processor_and_in_float16_on_a_card(tmp_path: Path) -> None:
    """In float16 gptqmodel unpacks a weight for every product; and beside a GPU transformers makes AWQ's rest float16."""
    packed_files.save_gptq(tmp_path / "gptq", 4, 128)
    packed_files.save_awq(tmp_path / "awq", 128)
    card = profile(["RTX 4090"], ram=64 * GIB)
    asked = {
        (method, placement, bool(on.gpus)): (planned(spec(tmp_path / method), f"{method}-int4", placement, on).code or "")
        for method in ("gptq", "awq")
        for placement, on in (("cpu", machine()), ("auto", machine()), ("cpu", card), ("direct", card))
    }
    narrow = {("gptq", "direct", True), ("awq", "direct", True), ("awq", "cpu", True)}
    assert {way for way, code in asked.items() if 'dtype="float16"' in code} == narrow
    assert {way for way, code in asked.items() if 'dtype="bfloat16"' in code} == set(asked) - narrow


# ---- auto: transformers' own map -------------------------------------------------------------------------------------------


def as_auto_sees_it(folder: Path, asked: Any) -> tuple[Any, Any]:
    """Build a model and its quantizer in the state in which `from_pretrained` infers the device map, without its weights."""
    from transformers.quantizers.auto import get_hf_quantizer

    config = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    quantizer, config, _ = get_hf_quantizer(config, asked, "auto", True, {})
    quantizer.validate_environment = lambda **_: None  # it is asked only which map it would refuse
    with ExitStack() as stack:
        for context in kind.get_init_context(torch.bfloat16, True, False, None):
            stack.enter_context(context)
        model = kind(config)
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map="auto", checkpoint_files=None)
    return model, quantizer


def budgets(total: float) -> Iterator[dict[Any, int]]:
    """Make ten budgets, from a tenth of the weights on a card to all of them, on one card and on two."""
    for share in (0.1, 0.3, 0.5, 0.8, 1.2):
        yield {0: int(total * share), "cpu": int(total * 2)}
        yield {0: int(total * share / 2), 1: int(total * share / 2), "cpu": int(total * 2)}


@pytest.mark.parametrize(
    "form", ["ct-w4a16", "ct-fp8", "fp8-blocks", "fp8-small-blocks", "mxfp8", "metal", "bitnet", "bnb-nf4", "mxfp4"]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch, for BitNet
def test_auto_s_map_is_transformers_own(form: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.accelerate import _get_device_map
    from transformers.quantizers import quantizer_mxfp4

    one = spec(save_form(tmp_path, form))
    assert one.packed is not None
    assert one.packed.method is not None
    name = one.packed.precision or "bf16" if packed else "bf16"
    row = one.adapted(PRECISIONS[name])
    if packed and one.packed.unpacks(PRECISIONS[name]):
        pytest.skip(f"{one.packed.method.title} is never kept packed")
    if not packed and one.keeps_packed(PRECISIONS[name]):
        pytest.skip(f"{one.packed.method.title} is never unpacked")
    if absent := lacking(one.packed.method.needs):
        pytest.skip(f"{absent[0]} is not installed")
    if packed and one.packed.method.packs_from:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(quantizer_mxfp4, "get_current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(quantizer_mxfp4, "is_triton_available", lambda *_: True)
        monkeypatch.setattr(quantizer_mxfp4, "is_kernels_available", lambda: True)
        monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: None)
    asks = row.quantization
    asked = getattr(transformers, asks.expression.partition("(")[0])(dequantize=True) if isinstance(asks, Config) else None
    model, quantizer = as_auto_sees_it(tmp_path, asked)
    monkeypatch.undo()
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    counted = tiers.widths_of(one.skeleton, estimate.weight_format(PRECISIONS[name], "bfloat16", one))
    for memory in budgets(one.skeleton.parameters * 2):
        expected = _get_device_map(model, "auto", dict(memory), quantizer)
        assert infer(one.skeleton, counted, max_memory=memory) == expected, str(memory)


# ---- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "scales"),
    [
        ("fp8-blocks", ".weight_scale_inv"),
        ("ct-w4a16", ".weight_scale"),
        ("ct-fp8", ".weight_scale"),
        ("bnb-nf4", ".weight.absmax"),
        ("bnb-int8", ".SCB"),
        ("mxfp4", "_scales"),
    ],
)
def test_packed_weights_without_scales_are_refused_before_loading(form: str, scales: str, tmp_path: Path) -> None:
    save_form(tmp_path, form)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(scales)}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"without its .*{scales.removeprefix('.')}"):
        spec(tmp_path)


@pytest.mark.parametrize(
    ("form", "changed", "said"),
    [
        ("fp8-blocks", {"quant_method": "gptq", "bits": 4, "group_size": 128}, "no tensor of the files is packed so"),
        ("ct-w4a16", {"quant_method": "fp8"}, "no tensor of the files is packed so"),
        ("ct-fp8", {"quant_method": "awq", "bits": 4, "group_size": 128}, "no tensor of the files is packed so"),
    ],
)
def test_a_method_that_the_tensors_contradict_is_refused(form: str, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = json.loads((save_form(tmp_path, form) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
    with pytest.raises(CheckpointError, match=said):
        spec(tmp_path)


@pytest.mark.parametrize(("bits", "group", "said"), [(8, 128, "means 4 bits"), (4, 64, "means groups of 128|the config asks for")])
def test_bits_and_groups_that_the_tensors_contradict_are_refused(bits: int, group: int, said: str, tmp_path: Path) -> None:
    config = json.loads((save_form(tmp_path, "ct-w4a16") / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"num_bits": bits, "group_size": group}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        spec(tmp_path)


def test_a_method_of_the_text_model_is_found_there() -> None:
    config = {"model_type": "x", "text_config": {**SMALL_GPT_OSS, "quantization_config": MXFP4}}
    found = quantization.packed(config)
    assert found is not None
    assert found.method is METHODS["mxfp4"]


def test_by_default_what_can_be_unpacked_is_shown_both_ways(tmp_path: Path) -> None:
    assert defaults(spec(save_form(tmp_path, "fp8-blocks")).stored_as)[-3:] == ["bf16", "fp16", "fp8"]
