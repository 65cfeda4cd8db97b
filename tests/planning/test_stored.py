"""Checkpoints that are quantized already run as what they are: one row of the table, the others say which."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from harness.architecture import model_spec, skeleton_source
from harness.architecture.model_spec import ModelSpec
from harness.catalog.download import stored_as
from harness.catalog.resolve import resolve
from harness.checkpoint import quantization
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS, defaults, row_of
from harness.core.records import Plan, Verdict
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.cost import estimate
from harness.planning.cost.memory import module_bytes
from harness.planning.device_map.infer import Widths
from harness.planning.device_map.tiers import widths_of
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.support import small_models
from tests.support.builders import case, gpu, machine, weight_bytes
from tests.support.packed_files import save_awq, save_gptq, spec, write_packed
from tests.support.small_models import held_bytes


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def planned(one: ModelSpec, precision: str, placement: str = "cpu") -> Plan:
    return Planner(one, machine(), here=False).plan(case(precision, placement))


def loaded(folder: Path, plan: Plan, *imports: str) -> work.Model:
    """Load by the code of the plan, as a worker does."""
    assert plan.code is not None
    request = Load(model=str(folder), code=plan.code, imports=imports, tokenizer=False)
    return work.load(request, lambda _: contextlib.nullcontext())[0]


def estimated(one: ModelSpec, precision: str) -> int:
    row = PRECISIONS[precision]
    return sum(weight_bytes(one.skeleton, estimate.weight_format(row, row.dtype, one)).values())


# ---- which row -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "row"),
    [
        ("gptq 4-bit, groups of 128", "gptq-int4"),
        ("gptq 8-bit", "gptq-int8"),
        ("awq 4-bit, groups of 64", "awq-int4"),
        ("bitsandbytes 8-bit", "int8"),
        ("bitsandbytes 4-bit nf4", "int4"),
        ("bitsandbytes 4-bit nf4, nested", "nf4-dq"),
        ("bitsandbytes 4-bit fp4, nested", "fp4"),
        ("torchao Int8WeightOnlyConfig", "torchao-int8"),
        ("chatglm 8-bit", "chatglm-int8"),
        ("gguf Q4_K", "gguf"),
    ],
)
def test_a_quantized_checkpoint_is_one_row(stored: str, row: str) -> None:
    found = row_of(stored)
    assert found is not None
    assert found.name == row
    assert defaults(stored)[-1] == row


@pytest.mark.parametrize(("flag", "title", "row"), [("4bit", "4-bit nf4", "int4"), ("8bit", "8-bit", "int8")])
def test_a_flag_without_a_quant_method_means_bitsandbytes(flag: str, title: str, row: str) -> None:
    """As AutoQuantizationConfig takes it."""
    said = {f"load_in_{flag}": True, "bnb_4bit_quant_type": "nf4"}
    found = quantization.packed({"quantization_config": said})
    assert found is not None
    assert (found.title, found.precision) == (f"bitsandbytes {title}", row)
    assert AutoQuantizationConfig.from_dict(dict(said)).quant_method == "bitsandbytes"


@pytest.mark.parametrize("stored", ["gptq 3-bit", "compressed-tensors 4-bit", "aqlm"])
def test_what_has_no_row_runs_in_the_plain_ones(stored: str) -> None:
    assert row_of(stored) is None
    assert defaults(stored) == ["fp32", "bf16", "fp16"]


def test_a_plain_checkpoint_has_the_usual_matrix_and_no_more() -> None:
    assert defaults(None) == list(DEFAULT_PRECISIONS) == ["fp32", "bf16", "fp16", "int8", "int4"]


# Blocks of 128 x 128 divide none of its Linears.
BLOCKS_LEAVE_A_REST: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("scales", "asked", "filled"),
    [("bfloat16", "bf16", True), ("bfloat16", "fp16", False), ("float32", "bf16", False), ("float32", "fp32", True)],
)
def test_weights_scaled_in_blocks_fill_whole_ones_where_nothing_casts_them(
    scales: str, asked: str, filled: bool, tmp_path: Path
) -> None:
    """What compressed-tensors unpacks is a view of them (tests/core/test_compressed_settings.py); a device map goes by shapes."""
    made = LlamaForCausalLM(LlamaConfig(**BLOCKS_LEAVE_A_REST)).bfloat16().state_dict()
    tensors = {name: one.clone() for name, one in made.items() if "proj" not in name}
    for name, one in made.items():
        if "proj" in name:
            tensors[name] = one.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.ones([-(-side // 128) for side in one.shape], dtype=getattr(torch, scales))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    said = {"format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": blocks}}
    quantized = {"quant_method": "compressed-tensors", **said, "config_groups": groups}
    config = {**LlamaConfig(**BLOCKS_LEAVE_A_REST).to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    one = model_spec.read_spec(resolve(str(tmp_path)))
    row = PRECISIONS[asked]
    fmt = estimate.weight_format(row, row.dtype, one)
    sizes = {path: size for kind in one.skeleton.kinds for path, size in module_bytes(kind, fmt).items()}
    plain = {weight.path: weight.elements * fmt.element_bytes for weight, _ in one.skeleton.tally if weight.quantizes}
    whole = {
        weight.path: math.prod(-(-side // 128) * 128 for side in weight.tensor.shape) * fmt.element_bytes
        for weight, _ in one.skeleton.tally
        if weight.quantizes
    }
    assert {path: sizes[path] for path in plain} == (whole if filled else plain)
    assert widths_of(one.skeleton, fmt) == Widths(fmt.dtype)  # shapes alone
    assert sum(whole.values()) > 1.5 * sum(plain.values())


# The published files that are quantized, one .bin each, and what is known of them: GB, how near, the row.
PACKED_BINS = {
    "moss-moon-003-sft-int4": (10.783, 0.0005, "gptq-int4"),
    "moss-moon-003-sft-int8": (18.54, 0.0005, "gptq-int8"),
    "moss-moon-003-sft-plugin-int4": (10.783, 0.0005, "gptq-int4"),
    "moss-moon-003-sft-plugin-int8": (18.54, 0.0005, "gptq-int8"),
    "chatglm-6b-int4": (3.89, 0.005, "chatglm-int4"),
    "chatglm-6b-int8": (6.71, 0.005, "chatglm-int8"),
}


@pytest.mark.parametrize("name", PACKED_BINS)
def test_the_catalog_tells_what_is_quantized_without_files(name: str) -> None:
    assert defaults(stored_as(resolve(name))) == [PACKED_BINS[name][2]]


@pytest.mark.parametrize("name", PACKED_BINS)
def test_a_published_quantized_file_has_its_bytes_before_it_is_here(name: str) -> None:
    gigabytes, near, _ = PACKED_BINS[name]
    spec = model_spec.read_spec(resolve(name))
    assert spec.checkpoint_bytes == pytest.approx(gigabytes * 1e9, rel=near)
    assert sum(spec.stored.values()) == pytest.approx(gigabytes * 1e9, rel=0.015)  # without masks


@pytest.mark.parametrize("name", PACKED_BINS)
def test_a_published_quantized_file_is_mapped_whole_or_not_at_all(name: str) -> None:
    spec = model_spec.read_spec(resolve(name))
    small = replace(machine(ram_bytes=64 * GIB), mapping_bytes=3 * GIB)
    plan = Planner(spec, small, here=False).plan(case(PACKED_BINS[name][2], "cpu"))
    assert plan.verdict is Verdict.TOO_BIG
    assert "its only file, a .bin, has" in (plan.why or "")
    large = replace(small, mapping_bytes=20 * GIB)
    assert Planner(spec, large, here=False).plan(case(PACKED_BINS[name][2], "cpu")).verdict is Verdict.FITS


@pytest.mark.parametrize("name", PACKED_BINS)
def test_a_published_quantized_file_is_written_again_to_offload_it(name: str) -> None:
    """transformers reads safetensors where they lie, and writes the weights of a .bin that it offloads."""
    row = PACKED_BINS[name][2]
    spec = model_spec.read_spec(resolve(name))
    tight = machine(ram_bytes=int(0.8 * spec.checkpoint_bytes))
    in_bin, in_safetensors = (
        Planner(one, tight, here=False).plan(case(row, "disk")) for one in (spec, replace(spec, file_format="safetensors"))
    )
    assert in_bin.estimate is not None, in_bin.why
    assert in_safetensors.estimate is not None
    assert in_bin.estimate.tiers["disk"].needed_bytes > 0.05 * spec.checkpoint_bytes
    assert in_safetensors.estimate.tiers["disk"].needed_bytes == 0


def test_a_directory_tells_what_it_is(tmp_path: Path) -> None:
    save_gptq(tmp_path, 4, 128)
    assert stored_as(resolve(str(tmp_path))) == "gptq 4-bit, groups of 128"


# ---- plans ---------------------------------------------------------------------------------------------------------------


def test_other_rows_name_the_one_that_it_is(tmp_path: Path) -> None:
    save_gptq(tmp_path, 4, 128)
    one = spec(tmp_path)
    for precision in PRECISIONS:
        plan = planned(one, precision)
        if precision != "gptq-int4":
            assert plan.verdict is Verdict.INVALID, precision
            assert "--precision gptq-int4" in (plan.why or "") or PRECISIONS[precision].unsupported
    plan = planned(one, "gptq-int4")
    assert plan.verdict is Verdict.FITS
    assert "quantization_config" not in (plan.code or "")


@pytest.mark.parametrize(("precision", "what"), [("gptq-int4", "a GPTQ"), ("awq-int4", "an AWQ"), ("mxfp8", "an MXFP8")])
def test_a_plain_checkpoint_shows_what_it_would_take_in_another_form(precision: str, what: str, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path)
    one = spec(tmp_path)
    plan = Planner(one, profile(["RTX 4090"], ram=16 * GIB), here=False).plan(case(precision, "direct"))
    assert plan.verdict is Verdict.UNAVAILABLE
    assert (plan.why or "").startswith(f"needs {what} checkpoint, and this one is bfloat16: ")
    assert (plan.needs_checkpoint, plan.code) == (f"{what} checkpoint", None)
    assert plan.estimate is not None
    plain = sum(weight_bytes(one.skeleton, estimate.weight_format(PRECISIONS["bf16"], "bfloat16", one)).values())
    assert 0 < plan.estimate.tiers["gpu:0"].weights_bytes < plain


@pytest.mark.parametrize(("precision", "what"), [("chatglm-int8", "a ChatGLM-6B int8"), ("mxfp4", "an MXFP4"), ("gguf", "a GGUF")])
def test_a_form_that_its_architecture_has_not_is_refused(precision: str, what: str, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path)
    plan = Planner(spec(tmp_path), profile(["RTX 4090"], ram=16 * GIB), here=False).plan(case(precision, "direct"))
    assert (plan.verdict, plan.why) == (Verdict.INVALID, f"needs {what} checkpoint, and this one is bfloat16")


def test_of_moss_the_published_int4_is_named_with_the_bytes_that_it_takes() -> None:
    plain, packed = (model_spec.read_spec(resolve(f"moss-moon-003-sft{form}")) for form in ("", "-int4"))
    on = profile(["RTX 4090"], ram=64 * GIB)
    plan = Planner(plain, on, here=False).plan(case("gptq-int4", "direct"))
    assert "published as fnlp/moss-moon-003-sft-int4;" in f"{plan.why};"
    real = Planner(packed, on, here=False).plan(case("gptq-int4", "direct"))
    assert plan.estimate is not None
    assert real.estimate is not None
    found = plan.estimate.tiers["gpu:0"].weights_bytes
    assert found == pytest.approx(real.estimate.tiers["gpu:0"].weights_bytes, rel=0.005)


@pytest.mark.parametrize("precision", ["torchao-int4", "quanto-int4"])
def test_what_cannot_be_packed_for_a_processor_is_said_before_loading(precision: str, tmp_path: Path) -> None:
    small_models.save("qwen2_moe", tmp_path)
    plan = planned(spec(tmp_path), precision)
    assert plan.verdict is Verdict.INVALID
    assert "in 16 outputs, and model.layers.0.mlp.shared_expert" in (plan.why or "")


# ---- loaded --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # optimum 2.3 asks for it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel 7.6 leaves a temporary folder
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 128), (4, 32)])
def test_gptq_is_loaded_as_it_is_and_checked(bits: int, group: int, tmp_path: Path) -> None:
    for module in PRECISIONS["gptq-int4"].needs:
        pytest.importorskip(module)
    meant, name = save_gptq(tmp_path, bits, group), f"gptq-int{bits}"
    one = spec(tmp_path)
    plan = planned(one, name)
    found = loaded(tmp_path, plan)
    assert set(verify.checks(plan, work.loaded_facts(found)).values()) == {verify.OK}
    assert estimated(one, name) == pytest.approx(held_bytes(found.module), rel=0.005)
    layer: Any = found.module.get_submodule("model.layers.0.mlp.up_proj")
    assert found.module.dtype is torch.bfloat16
    got = layer(torch.eye(256, dtype=torch.bfloat16)).float().T
    assert (got - meant["model.layers.0.mlp.up_proj.weight"]).abs().max() < 2e-3
    assert found.module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel 7.6 leaves a temporary folder
@pytest.mark.parametrize("group", [128, 32])
def test_awq_is_loaded_as_it_is_and_checked(group: int, tmp_path: Path) -> None:
    for module in PRECISIONS["awq-int4"].needs:
        pytest.importorskip(module)
    meant = save_awq(tmp_path, group)
    one = spec(tmp_path)
    plan = planned(one, "awq-int4")
    found = loaded(tmp_path, plan)
    assert set(verify.checks(plan, work.loaded_facts(found)).values()) == {verify.OK}
    assert estimated(one, "awq-int4") == pytest.approx(held_bytes(found.module), rel=0.005)
    layer: Any = found.module.get_submodule("model.layers.0.mlp.up_proj")
    assert found.module.dtype is torch.bfloat16
    got = layer(torch.eye(256, dtype=torch.bfloat16)).float().T
    assert (got - meant["model.layers.0.mlp.up_proj.weight"]).abs().max() < 2e-3


def test_awq_on_a_processor_beside_a_card_unpacks_its_weights_for_each_token(tmp_path: Path) -> None:
    """There transformers makes float16 of bfloat16, in which gptqmodel's kernels for processors have no fast product."""
    write_packed(tmp_path, "qwen2.5-0.5b-instruct", 4, 128, "awq")
    alone, beside = (Planner(spec(tmp_path), one, here=False).plan(case("awq-int4", "cpu")) for one in (machine(), machine(gpu())))
    assert alone.estimate is not None
    assert beside.estimate is not None
    assert "unpacks" not in str(alone.estimate.bound_by)
    assert "unpacks" in str(beside.estimate.bound_by)
    assert alone.estimate.decode_tok_s.best > 4 * beside.estimate.decode_tok_s.best


def test_awq_without_its_package_is_unavailable_and_other_rows_name_it(tmp_path: Path) -> None:
    write_packed(tmp_path, "qwen2.5-0.5b-instruct", 4, 128, "awq")
    assert defaults(stored_as(resolve(str(tmp_path)))) == ["awq-int4"]
    one = spec(tmp_path)
    here = Planner(one, machine(), here=True).plan(case("awq-int4", "cpu"))
    if not all(importlib.util.find_spec(module) for module in PRECISIONS["awq-int4"].needs):
        assert (here.verdict, here.why) == (Verdict.UNAVAILABLE, "needs the package gptqmodel: pip install fitmatrix[gptq]")
    assert planned(one, "awq-int4").verdict is Verdict.FITS
    assert "load it with --precision awq-int4" in (planned(one, "int4").why or "")


@pytest.mark.parametrize("way", ["int8", "int4", "fp4", "nf4-dq"])
def test_what_bitsandbytes_saved_is_its_row_again(way: str, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "plain")
    model: Any = small_models.load(tmp_path / "plain", PRECISIONS[way])
    model.save_pretrained(tmp_path / "packed")
    plan = planned(spec(tmp_path / "packed"), way)
    assert plan.verdict is Verdict.FITS, plan.why
    assert "quantization_config" not in (plan.code or "")
    found = loaded(tmp_path / "packed", plan)
    assert set(verify.checks(plan, work.loaded_facts(found)).values()) == {verify.OK}


@pytest.mark.parametrize("way", [name for name, row in small_models.WAYS.items() if row.quantizes])
def test_what_quantizes_took_effect(way: str, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path)
    row = PRECISIONS[way]
    found = work.loaded_facts(work.Model(small_models.load(tmp_path, row), None))
    assert set(found.linear_dtype_bytes) == {row.linear_dtype}


def test_moss_is_loaded_as_it_is_and_the_code_says_where_its_class_is_from() -> None:
    one = model_spec.read_spec(resolve("moss-moon-003-sft-int4"))
    plan = planned(one, "gptq-int4")
    assert (plan.code or "").startswith("import harness.models")
    assert json.dumps("float16") in (plan.code or "")


GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_our_own_architectures_read_what_is_packed_without_a_package() -> None:
    folder = GOLDEN / "chatglm_l2_h64_int4"
    plan = Planner(spec(folder), machine()).plan(case("chatglm-int4", "cpu", prompt_tokens=32))
    assert plan.verdict is Verdict.FITS, plan.why
    found = loaded(folder, plan, "harness.models")
    assert set(verify.checks(plan, work.loaded_facts(found)).values()) == {verify.OK}
