"""Siblings of what strangers brought: the same kinds in other architectures, dtypes, nestings and layouts of files.

What plan, inspect and verify say of each is held against what loading it by the code of the plan takes, or against how
transformers fails with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from harness.architecture import model_spec, skeleton_source
from harness.architecture.inspection import inspect
from harness.architecture.stored.packed_check import leaves_rest
from harness.catalog import resolve, shipped
from harness.checkpoint import quantization_words, reader
from harness.core.errors import HarnessError
from harness.core.methods import compressed as compressed_tensors
from harness.core.methods.packages import lacking
from harness.core.precisions import PRECISIONS
from harness.core.records import Machine, Verdict
from harness.machine import probe
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.strangers import architectures
from tests.strangers.stored_forms import (
    BF16,
    F8,
    F32,
    FORMS,
    I8,
    I32,
    I64,
    SMALL,
    U8,
    Form,
    Tensors,
    save_form,
    save_tensors,
    tensors_of,
)
from tests.support import packed_files, strangers
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

NEAR = 0.01
MAIN = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, torch.Tensor]
Make = Callable[[Path], object]
Parts = Callable[[int, int], Tensors]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def here() -> Machine:
    return replace(machine(), avx512_bf16=probe.probe().avx512_bf16)


# ---- makers ----------------------------------------------------------------------------------------------------------------


def llama(change: Callable[[Weights], Weights] = dict, **config: Any) -> Make:
    """Make a small Llama whose weights and config are changed; a value of ... takes the key away."""

    def make(folder: Path) -> None:
        strangers.save_llama(folder)
        save_file(change(load_file(folder / MAIN)), folder / MAIN, metadata={"format": "pt"})
        rewrite(folder / "config.json", **config)

    return make


def rewrite(file: Path, **changed: Any) -> None:
    config = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def seeing(name: str, top: Any, text: Any) -> Make:
    """Make a vision-language model with a head of its own that its two configs tie, or not."""

    def make(folder: Path) -> None:
        architectures.save(name, folder)
        config = json.loads((folder / "config.json").read_text())
        rewrite(folder / "config.json", tie_word_embeddings=top, text_config={**config["text_config"], "tie_word_embeddings": text})

    return make


def bitsandbytes(name: str, *, below: bool = False, **settings: Any) -> Make:
    """Quantize an architecture by bitsandbytes and save it; `below` leaves what is said of that to the config of the text model."""

    def make(folder: Path) -> None:
        plain = folder.parent / "plain"
        architectures.save(name, plain)
        asked = BitsAndBytesConfig(**settings)
        auto = architectures.auto_class(name)
        auto.from_pretrained(plain, dtype="bfloat16", quantization_config=asked, device_map={"": "cpu"}).save_pretrained(folder)
        if below:
            config = json.loads((folder / "config.json").read_text())
            text = {**config["text_config"], "quantization_config": config["quantization_config"]}
            rewrite(folder / "config.json", quantization_config=..., text_config=text)

    return make


def packed(rule: Callable[[str], Parts], settings: Mapping[str, Any], inspected: Mapping[str, Any] = SMALL) -> Make:
    """Make a small Llama each of whose Linear modules lies in the parts that a rule gives for its path."""

    def make(folder: Path) -> None:
        tensors, linears = tensors_of(inspected, Form(lambda *_: {}, {}))
        for module, (outputs, inputs) in linears.items():
            tensors |= {f"{module}{part}": kind for part, kind in rule(module)(outputs, inputs).items()}
        save_tensors(folder, {**inspected, "quantization_config": dict(settings)}, tensors, linears)

    return make


def plain(outputs: int, inputs: int) -> Tensors:
    return {".weight": (BF16, (outputs, inputs))}


def words(bits: int, group: int) -> Parts:
    return lambda o, i: {
        ".weight_packed": (I32, (o, i * bits // 32)),
        ".weight_scale": (BF16, (o, i // group if group else 1)),
        ".weight_shape": (I64, (2,)),
    }


def zeros(bits: int, size: int) -> Parts:
    """Return packed words of groups beside packed zero points."""
    return lambda o, i: {**words(bits, size)(o, i), ".weight_zero_point": (I32, (o * bits // 32, i // size))}


def zeros_for_all(o: int, i: int) -> Tensors:
    return {**words(4, 0)(o, i), ".weight_scale": (BF16, (1,)), ".weight_zero_point": (I8, (1,))}


def nvfp4(o: int, i: int) -> Tensors:
    scales: Tensors = {".weight_scale": (F8, (o, i // 16)), ".weight_global_scale": (F32, (1,))}
    return {".weight_packed": (U8, (o, i // 2)), **scales}


def compressed(kind: str, *groups: Mapping[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    numbered = {f"group_{number}": group for number, group in enumerate(groups)}
    said = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return {**said, "ignore": list(ignore), "config_groups": numbered}


def group(*targets: str, form: str | None = None, **weights: Any) -> dict[str, Any]:
    said = {"symmetric": True, "dynamic": False, "type": "int", **weights}
    given = {"targets": list(targets), "weights": said, "input_activations": None, "output_activations": None}
    return given | ({"format": form} if form else {})


def in_attention(module: str) -> bool:
    return "self_attn" in module


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NF4: Mapping[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
W4: Mapping[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 128}
W8: Mapping[str, Any] = {"num_bits": 8, "strategy": "channel"}
NVFP4: Mapping[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
INPUTS: Mapping[str, Any] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


# Sides that blocks of 128 do not divide, as the 576 outputs of DeepSeek's kv_a_proj_with_mqa: 192 = 2 parts of 96, 320 no 3.
ODD: Mapping[str, Any] = {**SMALL, "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6}
EVEN: Mapping[str, Any] = {**ODD, "intermediate_size": 384}


def blocks(rows: int, columns: int, dtype: torch.dtype = F32) -> Parts:
    return lambda o, i: {".weight": (F8, (o, i)), ".weight_scale_inv": (dtype, (-(-o // rows), -(-i // columns)))}


def static(o: int, i: int) -> Tensors:
    return {".weight": (F8, (o, i)), ".weight_scale_inv": (BF16, ()), ".activation_scale": (BF16, ())}


# What the files hold before a checkpoint is compressed, and after it was taken apart again.
PLAIN = ("initialized", "calibration", "frozen", "decompressed")


def plain_with_scales(o: int, i: int) -> Tensors:
    return {".weight": (BF16, (o, i)), ".weight_scale": (BF16, (o, i // 128)), ".weight_zero_point": (I8, (o, i // 128))}


def unpacked(status: str) -> dict[str, Any]:
    said = group("Linear", **{**W4, "symmetric": False})
    return {**compressed("pack-quantized", said), "quantization_status": status}


def in_bins(metadata: bool) -> Make:
    def make(folder: Path) -> None:
        weights = load_file(strangers.save_llama(folder) / MAIN)
        (folder / MAIN).unlink()
        files = {name: f"pytorch_model-{1 + (name > 'model.layers.1'):05}-of-00002.bin" for name in weights}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in weights if files[name] == file}, folder / file)
        index = {"weight_map": files, **({"metadata": {"total_size": 1}} if metadata else {})}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return make


def beside(file: str, text: str = "{}") -> Make:
    def make(folder: Path) -> None:
        strangers.save_llama(folder)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return make


def renamed(file: str) -> Make:
    return lambda folder: (strangers.save_llama(folder) / MAIN).rename(folder / file)


def below(where: str) -> Make:
    return lambda folder: strangers.save_llama(folder / where)


def quantized_with(folder: Path, **said: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder / "config.json", quantization_config={**settings, **said})


def gptq(plain_ones: str = "", /, **said: Any) -> Make:
    """Make a Llama in GPTQ with settings, and with some of its modules in 16 bits."""
    return mixed(lambda folder: packed_files.save_gptq(folder, 4, 128), plain_ones, **said)


def awq_but(plain_ones: str, *named: str) -> Make:
    """Make a Llama in AWQ with some of its modules in 16 bits, and with what its config says of them."""
    return mixed(lambda folder: packed_files.save_awq(folder, 128), plain_ones, modules_to_not_convert=list(named))


def mixed(save: Callable[[Path], dict[str, Any]], plain_ones: str, **said: Any) -> Make:
    def make(folder: Path) -> None:
        meant, weights = save(folder), load_file(folder / MAIN)
        for name, weight in meant.items() if plain_ones else ():
            if re.search(plain_ones, name):
                base = name.removesuffix("weight")
                weights = {key: tensor for key, tensor in weights.items() if not key.startswith(base)} | {name: weight.half()}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / MAIN, {"format": "pt"})
        quantized_with(folder, **said)

    return make


def gptq_of_two_widths(folder: Path) -> None:
    other = folder.parent / "other"
    packed_files.save_gptq(folder, 4, 128)
    packed_files.save_gptq(other, 8, 128)
    narrow, wide = load_file(folder / MAIN), load_file(other / MAIN)
    save_file({name: (wide if ".1." in name else narrow)[name] for name in narrow}, folder / MAIN, {"format": "pt"})
    quantized_with(folder, dynamic={r"+:.*layers\.1\..*": {"bits": 8}})


def awq(version: str | None, **said: Any) -> Make:
    def make(folder: Path) -> None:
        packed_files.save_awq(folder, 128)
        quantized_with(folder, version=version, **said)

    return make


def without_part(save: Callable[..., Any], bits: int | None, part: str) -> Make:
    """Make a Llama without a part of its packed weights."""

    def make(folder: Path) -> None:
        save(folder, *(() if bits is None else (bits,)), 128)
        kept = {name: tensor for name, tensor in load_file(folder / MAIN).items() if not name.endswith(part)}
        save_file(kept, folder / MAIN, {"format": "pt"})

    return make


# ---- what runs -------------------------------------------------------------------------------------------------------------

RUNS: Mapping[str, Make] = {
    # a head of its own, whatever the config ties
    "head in float32": llama(lambda w: {**w, HEAD: torch.randn(96, 64)}, tie_word_embeddings=True),
    "head in float32, the same": llama(lambda w: {**w, HEAD: w[EMBEDDING].float()}, tie_word_embeddings=True),
    "head in float16": llama(lambda w: {**w, HEAD: torch.randn(96, 64).half()}, tie_word_embeddings=True),
    "head alone": llama(lambda w: {name: w[name] for name in w if name != EMBEDDING}, tie_word_embeddings=True),
    "tied in the text config alone": seeing("llava", False, True),
    "tied at the top alone": seeing("qwen2_vl", True, False),
    "tied in the text config, nothing at the top": seeing("qwen2_5_vl", ..., True),
    # bitsandbytes
    "nf4 but for paths": bitsandbytes("llama", **NF4, llm_int8_skip_modules=["model.layers.0.mlp", "lm_head"]),
    "nf4 but for last names": bitsandbytes("llama", **NF4, llm_int8_skip_modules=["down_proj"]),
    "nf4 of the head as well": bitsandbytes("llama", **NF4, llm_int8_skip_modules=[]),
    "nf4 stored as bfloat16": bitsandbytes("llama", **NF4, bnb_4bit_quant_storage=torch.bfloat16),
    "fp4 nested": bitsandbytes("llama", load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "nf4 said in the text config": bitsandbytes("llava", below=True, **NF4, llm_int8_skip_modules=["vision_tower", "lm_head"]),
    "int8 of Conv1D": bitsandbytes("short context", load_in_8bit=True),
    "int8 with biases": bitsandbytes("opt", load_in_8bit=True),
    "int8 of states": bitsandbytes("rwkv", load_in_8bit=True),
    "int8 of a hybrid": bitsandbytes("jamba", load_in_8bit=True),
    # FP8
    "fp8 static, a scale for all": packed(lambda _: static, {**FP8, "weight_block_size": None, "activation_scheme": "static"}),
    "fp8 but for a pattern": packed(
        lambda m: plain if in_attention(m) else FORMS["fp8-blocks"].parts,
        {**FP8, "modules_to_not_convert": [r"model.layers.\d+.self_attn", "lm_head"]},
    ),
    "fp8 but for a layer": packed(
        lambda m: plain if ".1." in m else FORMS["fp8-blocks"].parts,
        {**FP8, "modules_to_not_convert": ["model.layers.1", "lm_head"]},
    ),
    "fp8 in blocks larger than a side": packed(lambda _: blocks(256, 512), {**FP8, "weight_block_size": [256, 512]}),
    "fp8 in blocks of whole rows": packed(lambda _: blocks(1, 64), {**FP8, "weight_block_size": [1, 64]}, ODD),
    "fp8 in oblong blocks": packed(lambda _: blocks(32, 64, BF16), {**FP8, "weight_block_size": [32, 64]}, ODD),
    # compressed-tensors, where its package is installed
    "4 bits but for a pattern": packed(
        lambda m: plain if in_attention(m) else words(4, 128),
        compressed("pack-quantized", group("Linear", **W4), ignore=("lm_head", "re:.*self_attn.*")),
    ),
    "4 and 8 bits": packed(
        lambda m: words(8, 0) if in_attention(m) else words(4, 128),
        compressed("pack-quantized", group("re:.*self_attn.*", **W8), group("re:.*mlp.*", **W4)),
    ),
    "4 bits and fp8": packed(
        lambda m: FORMS["ct-fp8"].parts if in_attention(m) else words(4, 128),
        compressed(
            "mixed-precision",
            group("re:.*mlp.*", form="pack-quantized", **W4),
            group("re:.*self_attn.*", form="float-quantized", **{**W8, "type": "float"}),
        ),
    ),
    "4 bits and nvfp4, whose scales grow": packed(
        lambda m: nvfp4 if in_attention(m) else words(4, 128),
        compressed(
            "mixed-precision",
            group("re:.*mlp.*", form="pack-quantized", **W4),
            group("re:.*self_attn.*", form="nvfp4-pack-quantized", **NVFP4),
        ),
    ),
    "8 bits in two formats": packed(
        lambda m: FORMS["ct-int8"].parts if in_attention(m) else words(8, 0),
        compressed(
            "mixed-precision",
            group("re:.*mlp.*", form="pack-quantized", **W8),
            {**group("re:.*self_attn.*", form="int-quantized", **W8), "input_activations": INPUTS},
        ),
    ),
    "4 bits, some about a zero point": packed(
        lambda m: zeros_for_all if in_attention(m) else words(4, 128),
        compressed(
            "pack-quantized",
            group("re:.*mlp.*", **W4),
            group("re:.*self_attn.*", num_bits=4, strategy="tensor", symmetric=False),
        ),
    ),
    "4 bits about zero points of groups": packed(
        lambda _: zeros(4, 128), compressed("pack-quantized", group("Linear", **W4, symmetric=False))
    ),
    **{
        f"4 bits, {said} at the top, {form} in the group": packed(
            lambda _: words(4, 128), compressed(said, group("Linear", form=form, **W4))
        )
        for said in ("int-quantized", "marlin-24", "dense")
        for form in ("pack-quantized", None)
    },
    **{f"4 bits, {status}": packed(lambda _: plain_with_scales, unpacked(status)) for status in PLAIN},
    "4 bits of a format that nobody knows": packed(
        lambda _: words(4, 32), compressed("my-own", group("Linear", num_bits=4, strategy="group", group_size=32))
    ),
    "4 bits by the name of a scheme": packed(
        lambda _: words(4, 128), {**compressed("pack-quantized"), "config_groups": {"W4A16": ["Linear"]}}
    ),
    "4 bits without a status": packed(
        lambda _: words(4, 128),
        {key: value for key, value in compressed("pack-quantized", group("Linear", **W4)).items() if key != "quantization_status"},
    ),
    "4 bits of an order that is not kept": packed(
        lambda _: words(4, 128), compressed("pack-quantized", group("Linear", **W4, actorder="weight"))
    ),
    # GPTQ, where gptqmodel and optimum are installed
    "GPTQ with rules that change nothing": gptq(dynamic={r"-:.*vision.*": {}, r"+:.*layers\.1\..*": {"desc_act": True}}),
    "GPTQ of named modules": gptq("self_attn", modules_in_block_to_quantize=[["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]]),
    # AWQ, where gptqmodel is installed
    "AWQ, but a block": awq_but(r"layers\.0\.", "model.layers.0"),
    "AWQ, but of a kind": awq_but(r"down_proj", "down_proj"),
    # layouts of files
    "shards of bin": in_bins(metadata=True),
    "weights in two formats": lambda folder: strangers.add_pickle(strangers.save_llama(folder), folder / "never"),
    "a variant beside": lambda folder: shutil.copy(strangers.save_llama(folder) / MAIN, folder / "model.fp16.safetensors"),
    "an index of nothing beside": beside("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'),
    "a mirror in original/": beside("original/params.json"),
    "params.json": beside("params.json", "[]"),
    "a list for a config of data": beside("train_config.json", "[]"),
    "a trainer's state": beside("trainer_state.json", "[]"),
    "float64": llama(lambda w: {name: w[name].double() for name in w}),
    "norms in float32": llama(lambda w: {name: w[name].float() if "norm" in name else w[name] for name in w}),
    "a value head": llama(lambda w: {**w, "v_head.summary.weight": torch.zeros(1, 64)}),
    "no prefix": llama(lambda w: {name.removeprefix("model."): w[name] for name in w}),
    # settings of configs that others' code reads
    "tuples for outputs": llama(return_dict=False),
    "old settings of generation": llama(num_beams=4, do_sample=True, num_return_sequences=2, max_length=5),
    "eager by the config": llama(attn_implementation="eager"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_what_is_said_of_a_sibling_is_what_loading_it_takes(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    RUNS[name](folder)
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    absent = lacking(spec.packed.method.needs) if spec.packed and spec.packed.method else ()
    if absent:
        pytest.skip(f"{absent[0]} is not installed")
    keeps = spec.packed is not None and spec.packed.method is not None and spec.packed.method.unpacked is None
    precision = str(spec.packed.precision) if spec.packed is not None and keeps else "bf16"
    plan = Planner(spec, here(), here=True).plan(case(precision, "cpu", prompt_tokens=3, new_tokens=2))
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.code is not None
    model = work.load(Load(model=str(folder), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
    assert set(verify.checks(plan, work.loaded_facts(model)).values()) == {verify.OK}
    module: Any = model.module
    held = held_bytes(module)
    module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert plan.estimate is not None
    planned = sum(tier.weights_bytes for tier in plan.estimate.tiers.values())
    assert planned == pytest.approx(max(held, held_bytes(module)), rel=NEAR)  # 4 bits lose bytes, others gain them
    seen = inspect(reader.read(folder), name=name, kind="directory", source=name)
    repeated = sum(weight.elements for weight in spec.skeleton.weights if weight.path in spec.repeated)
    extra = 64 if name == "a value head" else 0
    assert seen.parameters == pytest.approx(spec.skeleton.parameters + repeated + extra, rel=0.001)


# ---- what does not ---------------------------------------------------------------------------------------------------------


def own_file_of_modelopt(form: str, algorithm: str) -> Make:
    def make(folder: Path) -> None:
        save_form(folder, form)
        rewrite(folder / "config.json", quantization_config=...)
        said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(said))

    return make


def generating(**settings: Any) -> Make:
    return lambda folder: (strangers.save_llama(folder) / "generation_config.json").write_text(json.dumps(settings))


def judging(named: str) -> Make:
    def make(folder: Path) -> None:
        sizes: Any = strangers.SIZES
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
        rewrite(folder / "config.json", architectures=[named])

    return make


SIDES = "bitsandbytes multiplies 4 bits on this processor by 32 outputs and 64 inputs"
KEPT = {"AWQ": "awq-int4", "GPTQ": "gptq-int4"}
CUT = r"where they do not divide a weight, as 'model\.layers.* keep them as they are, with --precision fp8 on a GPU"
OLD_NAMES = {"quant_method": "fp8", "weight_block_size": None}
# What is made, what is said of it, and of transformers whether it fails as well.
REFUSED: Mapping[str, tuple[Make, str]] = {
    "ModelOpt's own file, nvfp4": (own_file_of_modelopt("modelopt-nvfp4", "NVFP4"), "method 'modelopt' of NVIDIA ModelOpt: vLLM"),
    "ModelOpt's own file, fp8": (own_file_of_modelopt("modelopt-fp8", "FP8"), "method 'modelopt' of NVIDIA ModelOpt: vLLM"),
    "a method in capitals": (packed(lambda _: FORMS["ct-fp8"].parts, {"quant_method": "FP8"}), "does not know .* 'FP8'"),
    "a method of vLLM": (packed(lambda _: FORMS["ct-fp8"].parts, {"quant_method": "ptpc_fp8"}), "does not know .* 'ptpc_fp8'"),
    "fp8 with scales of vLLM": (packed(lambda _: FORMS["ct-fp8"].parts, OLD_NAMES), "without its .*weight_scale_inv"),
    "fp8 in blocks that leave a rest": (packed(lambda _: blocks(128, 128), FP8, ODD), CUT),
    "fp8 in blocks taken for others": (packed(lambda _: blocks(128, 128, BF16), FP8, EVEN), CUT),
    "fp8 in groups that leave a rest": (packed(lambda _: blocks(1, 128), {**FP8, "weight_block_size": [1, 128]}, ODD), CUT),
    "4 bits in the order of their groups": (
        packed(lambda _: words(4, 128), compressed("pack-quantized", group("Linear", **W4, actorder="group"))),
        r"compressed-tensors 0\.20 does not take config_groups\.group_0\.weights\.actorder = \"group\"",
    ),
    "4 bits of no group": (
        packed(lambda _: words(4, 128), compressed("pack-quantized", group("Linear", num_bits=4, strategy="group"))),
        "strategy group requires group_size to be set to a positive value",
    ),
    "4 bits at a status of no one": (
        packed(lambda _: words(4, 128), {**compressed("pack-quantized", group("Linear", **W4)), "quantization_status": "done"}),
        r"does not take quantization_status = \"done\"",
    ),
    "inputs scaled by channels": (
        packed(
            lambda _: FORMS["ct-int8"].parts,
            compressed("int-quantized", {**group("Linear", **W8), "input_activations": {"num_bits": 8, "strategy": "channel"}}),
        ),
        "Using channel strategy is not supported for activation quantization",
    ),
    "zero points of two schemes": (
        packed(
            lambda m: words(8, 0) if in_attention(m) else zeros(4, 128),
            compressed(
                "pack-quantized", group("re:.*mlp.*", **W4, symmetric=False), group("re:.*self_attn.*", **W8)
            ),
        ),
        "makes modules for other zero points than pack-quantized stores",
    ),
    "a group without its zero points": (
        packed(
            lambda m: words(4, 128) if "layers.1.mlp.up" in m else zeros(4, 128),
            compressed("pack-quantized", group("re:.*mlp.*", **W4, symmetric=False), group("re:.*attn.*", **W4, symmetric=False)),
        ),
        r"without its 'model\.layers\.1\.mlp\.up_proj\.weight_zero_point'",
    ),
    "4 bits in a group of another format": (
        packed(lambda _: words(4, 128), compressed("pack-quantized", group("Linear", form="int-quantized", **W4))),
        r"no tensor of the files is packed so \(\.weight\)",
    ),
    "4 bits in a group of no format": (
        packed(lambda _: words(4, 128), compressed("pack-quantized", group("Linear", form="dense", **W4))),
        'unpacks no weights of the format "dense"',
    ),
    "a scheme of no one": (
        packed(lambda _: words(4, 128), {**compressed("pack-quantized"), "config_groups": {"W4A17": ["Linear"]}}),
        "no scheme that is known by its name",
    ),
    "GPTQ that leaves modules out": (
        gptq(r"layers\.0\.self_attn", dynamic={r"-:.*layers\.0\.self_attn.*": {}}),
        "is float16, and optimum packs every Linear of the blocks, whatever 'dynamic' says",
    ),
    "AWQ that leaves modules out by the middle of their names": (
        awq_but(r"layers\.0\.self_attn", "layers.0"),
        "is float16, and transformers packs all that 'modules_to_not_convert' names by no beginning or end",
    ),
    "GPTQ of two widths": (gptq_of_two_widths, "which means 8 bits, and the config says 4"),
    "GPTQ without its order": (without_part(packed_files.save_gptq, 4, ".g_idx"), r"without its 'model\.layers.*g_idx'"),
    "AWQ without its zeros": (without_part(packed_files.save_awq, None, ".qzeros"), r"without its 'model\.layers.*qzeros'"),
    "AWQ, gemv by its new key": (awq(None, format="gemv"), "no layer for AWQ's gemv packing"),
    **{
        f"GPTQ, {form} as {key}": (
            gptq("", **{"checkpoint_format": None, key: form}),
            f"no layer for GPTQ's {form.lower()} packing",
        )
        for form, key in (("marlin", "checkpoint_format"), ("bitblas", "format"), ("MARLIN", "checkpoint_format"))
    },
    **{f"AWQ, {version}": (awq(version), f"no layer for AWQ's {version} packing") for version in ("gemv", "gemv_fast", "llm-awq")},
    "a variant alone": (renamed("model.fp16.safetensors"), "a variant .*finds it by variant='fp16'; here rename"),
    "a variant in bin alone": (renamed("pytorch_model.fp16.bin"), "a variant .*finds it by variant='fp16'; here rename"),
    "the makers' file alone": (renamed("consolidated.safetensors"), "as its makers' own code keeps it"),
    "shards of bin without metadata": (in_bins(metadata=False), 'has no "metadata"'),
    "a trainer's folder": (below("checkpoint-500"), "no config.json: give the model inside: 'checkpoint-500'"),
    "sentence-transformers": (below("0_Transformer"), "no config.json: give the model inside: '0_Transformer'"),
    "a hub's cache": (below("models--org--tiny/snapshots/0123"), "give the model inside: 'models--org--tiny'"),
    "a compiled model's names": (llama(lambda w: {f"_orig_mod.{name}": w[name] for name in w}), "none of them, but '_orig_mod"),
    "a larger head than vocabulary": (llama(lambda w: {**w, HEAD: torch.zeros(128, 64)}), "is 128 x 64, the config asks for 96"),
    "a judge that says it writes": (judging("LlamaForCausalLM"), "and 'score.weight' instead, as models that judge texts do"),
    "a judge of a name of its own": (judging("LlamaForRewardModel"), "and 'score.weight' instead, as models that judge texts do"),
    "a judge": (judging("LlamaForSequenceClassification"), "sequence classification, which AutoModelForSequenceClassification"),
    "answers without beams": (generating(num_return_sequences=3), "asks for 3 answers of one beam without do_sample"),
    "a word that ends a text": (generating(eos_token_id="</s>"), "gives eos_token_id as '</s>', which is no number"),
    "two tokens to pad with": (generating(pad_token_id=[0, 1]), "gives pad_token_id as a list, which is no number"),
    "flash attention by the config": (llama(attn_implementation="flash_attention_2"), "config.json asks for flash_attention_2"),
    "4 bits of odd sides": (bitsandbytes("jamba", **NF4), SIDES),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_sibling_that_transformers_cannot_run_is_told(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    if said == SIDES and not here().avx512_bf16:
        pytest.skip("the processor has no AVX512_BF16")
    make(tmp_path / "model")
    try:
        plan = Planner(model_spec.read_spec(resolve.resolve(str(tmp_path / "model"))), here(), here=True).plan(
            case("int4" if said == SIDES else KEPT.get(name.partition(",")[0], "bf16"), "cpu")
        )
    except HarnessError as error:
        told = str(error)
    else:
        assert plan.verdict in (Verdict.INVALID, Verdict.UNAVAILABLE), plan.verdict
        told = plan.why or ""
    assert re.search(said, told), told
    assert not runs(tmp_path / "model") or name == "fp8 in blocks taken for others"  # which answers wrongly


def runs(folder: Path) -> bool:
    """Say whether transformers loads all that the files hold, nothing else, and writes with it."""
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", output_loading_info=True)
        loaded[0].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, OSError, ImportError):
        return False
    return not any(loaded[1].values())


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (1, 128), (32, 64)])
@pytest.mark.parametrize("rows", [64, 128, 192, 256, 576])
@pytest.mark.parametrize("columns", [64, 192, 256, 320, 384])
def test_blocks_that_are_refused_are_those_that_transformers_unpacks_wrongly(
    block: tuple[int, int], rows: int, columns: int
) -> None:
    """Each element is to be multiplied by the scale of its block, the last of which may be smaller."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scales = torch.arange(1.0, 1 + -(-rows // block[0]) * -(-columns // block[1])).reshape(-(-rows // block[0]), -1)
    meant = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    read: Any = Fp8Dequantize(None)
    try:
        right = torch.equal(read._dequantize_one(torch.ones(rows, columns).to(F8), scales), meant)
    except ValueError:
        right = False
    assert leaves_rest((rows, columns), block) != right


@pytest.mark.parametrize("name", [".weight_scale_inv", ".scale", ".qscale_weight", ".weight_scale"])
def test_scales_of_fp8_are_no_parameters_by_any_name(name: str, tmp_path: Path) -> None:
    many = packed(lambda _: lambda o, i: {".weight": (F8, (o, i)), name: (F32, (o, i // 4))}, {**FP8, "weight_block_size": [1, 4]})
    many(tmp_path)
    asked = sum(math.prod(shape) for _, shape in tensors_of(SMALL, Form(plain, {}))[0].values())
    assert reader.read(tmp_path).parameters == asked


def test_blocks_are_looked_at_where_no_file_is_here_as_well() -> None:
    """Of the catalog, which has the shapes of what transformers makes."""
    stored = {
        name: model_spec.read_spec(resolve.resolve(name))
        for name, one in shipped.catalog().items()
        if "quantization_config" in one.config
    }
    cut = {name for name, one in stored.items() if one.packed is not None and one.packed.undivided is not None}
    assert cut == {"deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3"}
    assert "kv_a_proj_with_mqa.weight' of 576 x 7168" in str(stored["deepseek-ai/DeepSeek-V3"].packed)


# ---- settings in their own words -------------------------------------------------------------------------------------------


def test_bits_of_a_module_are_those_of_the_group_that_names_it() -> None:
    settings = compressed("pack-quantized", group("re:.*self_attn.*", **W8), group("Linear", **W4), group("re:(", **W4))
    assert quantization_words.bits_of(settings, "model.layers.0.self_attn.q_proj") == 8
    assert quantization_words.bits_of(settings, "model.layers.0.mlp.up_proj") == 8  # by class: as the first group says
    assert compressed_tensors.differ(compressed_tensors.schemes_in(settings))


@pytest.mark.parametrize(("targets", "apart"), [(["re:.*experts.*"], False), (["re:.*mlp.*"], True)])
def test_what_is_unpacked_in_one_way_is_what_the_library_says(targets: list[str], apart: bool) -> None:
    """Of several groups transformers takes the first that singles out no experts, for all modules outside of them."""
    source = Path(transformers.__file__).parent / "integrations" / "compressed_tensors.py"
    assert 'target.startswith("re:") and "experts" in target' in source.read_text(encoding="utf-8")
    from harness.checkpoint.quantization import packed as read

    found = read({"quantization_config": compressed("mixed-precision", group("Linear", **W8), group(*targets, **W4))})
    assert found is not None
    assert (found.varies, found.apart) == (True, apart)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_what_is_unpacked_at_the_first_pass_has_one_dtype_and_scales_of_it(precision: str, tmp_path: Path) -> None:
    """FP4 is unpacked to bfloat16 whatever the model is in, other formats to the dtype of their scales, which the model decides."""
    for name, only in (("4 bits and nvfp4, whose scales grow", "bf16"), ("4 and 8 bits", precision)):
        folder = tmp_path / name
        RUNS[name](folder)
        spec = model_spec.read_spec(resolve.resolve(str(folder)))
        assert spec.packed is not None
        refused = spec.packed.refusal(PRECISIONS[precision])
        assert (refused is None) == (precision == only), refused
        scales = sum(tensor.bytes for tensor in reader.read(folder).tensors if tensor.name.endswith(".weight_scale"))
        grown = spec.packed.beside_bytes(PRECISIONS[precision].dtype) - spec.packed.beside_bytes("bfloat16")
        assert grown == (scales if precision == "fp32" and only == precision else 0) or refused


@pytest.mark.parametrize("name", ["bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_what_keeps_its_dtype_is_what_the_library_collects(name: str) -> None:
    """What goes through the library's own operation is not cast, and that collects all that is called a weight."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from harness.core.methods.table import METHODS

    kind: Any = AUTO_QUANTIZER_MAPPING[name]
    assert METHODS[name].keeps_dtype == (
        "weight" in kind.serialized_names["weight"] and "deserialize" in kind.get_load_operations(kind)
    )


@pytest.mark.parametrize("answers", [1, 2, 4])
@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("samples", [True, False])
def test_settings_of_generation_that_are_refused_are_those_of_the_library(answers: int, beams: int, samples: bool) -> None:
    from harness.checkpoint.settings_check import generation_fault

    settings = {"num_return_sequences": answers, "num_beams": beams, "do_sample": samples}
    with (
        contextlib.nullcontext() if generation_fault(settings) is None else pytest.raises(ValueError, match="num_return_sequences")
    ):
        transformers.GenerationConfig(**settings)
