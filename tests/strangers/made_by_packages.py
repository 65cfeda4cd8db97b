"""Checkpoints that the packages of quantization methods make themselves, and what loading them takes: kept as data.

`python -m tests.strangers.made_by_packages [NAME ...]` makes those whose package is installed anew, loads them on the processor and
rewrites their rows of `tests/data/package_checkpoints.json`: settings, tensors, and figures with the versions that gave them. What
a package gives no way to quantize with (AQLM and VPTQ only run what their projects' scripts made) is saved from its layers, with
random codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.small_models import held_bytes

ROWS = Path(__file__).parent.parent / "data" / "package_checkpoints.json"
CONFIG: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_INT4 = vars(torch)["int4"]  # which torch's own types leave out
_EVERY = ("float32", "bfloat16", "float16")
_PARTS = {"int8": "Int8PerTensorSpec", "int4": "Int4PerGroupSpec", "fp8": "FP8E4M3PerTensorSpec", "mxfp4": "OCP_MXFP4Spec"}


class Maker(NamedTuple):
    """What makes a checkpoint in a folder, with which package, and the dtypes that it is loaded in."""

    make: Callable[[Path, Path], None]  # (the 16-bit model, where to)
    package: str
    dtypes: tuple[str, ...] = ("bfloat16", "float16")


def plain(folder: Path) -> Path:
    """Save the 16-bit model that all are made of."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).bfloat16().save_pretrained(folder)
    return folder


def budgets(total: int) -> Iterator[dict[Any, int]]:
    """Make ten budgets, from a tenth of the weights on a card to all of them, on one card and on two."""
    for share in (0.1, 0.3, 0.5, 0.8, 1.2):
        yield {0: int(total * share), "cpu": total * 2}
        yield {0: int(total * share / 2), 1: int(total * share / 2), "cpu": total * 2}


def _torchao(kind: Callable[[Any], Any], **more: Any) -> Callable[[Path, Path], None]:
    def make(source: Path, to: Path) -> None:
        asked = transformers.TorchAoConfig(kind(import_module("torchao.quantization")), **more)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16", quantization_config=asked)
        model.save_pretrained(to)

    return make


def _quark(kind: str, **more: Any) -> Callable[[Path, Path], None]:
    def make(source: Path, to: Path) -> None:
        torch_part, quark = import_module("quark.torch"), import_module("quark.torch.quantization.config.config")
        how = quark.QLayerConfig(weight=getattr(quark, _PARTS[kind])(is_dynamic=False, **more).to_quantization_spec())
        quantizer = torch_part.ModelQuantizer(quark.QConfig(global_quant_config=how, exclude=["lm_head"]))
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
        with torch.no_grad():
            torch_part.export_safetensors(model=quantizer.freeze(quantizer.quantize_model(model, None)), output_dir=str(to))

    return make


def _auto_round(form: str) -> Callable[[Path, Path], None]:
    def make(source: Path, to: Path) -> None:
        from tokenizers import Tokenizer, models

        words = models.WordLevel({f"w{number}": number for number in range(CONFIG["vocab_size"])}, unk_token="w0")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
        import_module("auto_round").AutoRound(
            model, tokenizer, bits=4, group_size=128, sym=True, iters=0, disable_opt_rtn=True, device_map="cpu"
        ).quantize_and_save(str(to), format=form)

    return make


def _sinq(source: Path, to: Path) -> None:
    asked = transformers.SinqConfig(nbits=4, group_size=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16", device_map="cpu", quantization_config=asked)
    model.save_pretrained(to)


def _aqlm(codebooks: int) -> Callable[[Path, Path], None]:
    def make(source: Path, to: Path) -> None:
        from transformers.integrations.aqlm import replace_with_aqlm_linear

        asked = transformers.AqlmConfig(
            in_group_size=8,
            out_group_size=1,
            num_codebooks=codebooks,
            nbits_per_codebook=8,
            linear_weights_not_to_quantize=["lm_head"],
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
        replace_with_aqlm_linear(model, modules_to_not_convert=["lm_head"], quantization_config=asked)
        _save_random(model, source, to, asked.to_dict(), torch.float16)  # as its project's are published

    return make


def _vptq(source: Path, to: Path) -> None:
    asked = {"vector_lens": [-1, 8], "num_centroids": [-1, 256], "num_res_centroids": [-1, 256], "group_num": 1, "outlier_size": 0}
    asked |= {"indices_as_float": False, "enable_norm": True, "enable_perm": False, "is_indice_packed": True, "bias": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    layers = {}
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            layers[name] = {"in_features": part.in_features, "out_features": part.out_features, "group_size": part.in_features}
            made = import_module("vptq").VQuantLinear(**(layers[name] | asked), enable_proxy_error=False)
            model.set_submodule(name, made)
    settings = {"quant_method": "vptq", "config_for_layers": {name: one | asked for name, one in layers.items()}}
    _save_random(model, source, to, settings | {"modules_to_not_convert": ["lm_head"]}, torch.bfloat16)


def _save_random(model: Any, source: Path, to: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
    to.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    state = {name: _filled(tensor, dtype) if tensor.is_meta else tensor for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def _filled(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return (torch.rand(tensor.shape) * 0.02 + 0.001).to(dtype)
    return torch.randint(0, 100, tensor.shape).to(tensor.dtype)


MAKERS: Mapping[str, Maker] = {
    "torchao-int8": Maker(_torchao(lambda ao: ao.Int8WeightOnlyConfig()), "torchao"),
    "torchao-int8-groups": Maker(
        _torchao(lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64))), "torchao", ("bfloat16",)
    ),
    "torchao-int8-but": Maker(
        _torchao(lambda ao: ao.Int8WeightOnlyConfig(), modules_to_not_convert=["model.layers.0", "lm_head"]),
        "torchao",
        ("bfloat16",),
    ),
    "torchao-int8-dynamic": Maker(_torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()), "torchao", ("bfloat16",)),
    "torchao-fp8": Maker(_torchao(lambda ao: ao.Float8WeightOnlyConfig()), "torchao"),
    "torchao-intx": Maker(_torchao(lambda ao: ao.IntxWeightOnlyConfig(), include_input_output_embeddings=True), "torchao"),
    "torchao-intx4": Maker(
        _torchao(lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=ao.PerGroup(32))), "torchao", _EVERY
    ),
    "torchao-dynamic-intx4": Maker(
        _torchao(lambda ao: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=_INT4, weight_granularity=ao.PerGroup(32))),
        "torchao",
    ),
    "aqlm-1x8": Maker(_aqlm(1), "aqlm", _EVERY),
    "aqlm-2x8": Maker(_aqlm(2), "aqlm", _EVERY),
    "quark-int8": Maker(
        _quark("int8", observer_method="min_max", symmetric=True, scale_type="float", round_method="half_even"), "amd-quark"
    ),
    "quark-int4": Maker(
        _quark("int4", symmetric=True, scale_type="float", round_method="half_even", ch_axis=-1, group_size=32), "amd-quark"
    ),
    "quark-fp8": Maker(_quark("fp8", observer_method="min_max"), "amd-quark"),
    "quark-mxfp4": Maker(_quark("mxfp4", ch_axis=-1), "amd-quark"),
    "auto-round": Maker(_auto_round("auto_round"), "auto-round"),
    "auto-round-awq": Maker(_auto_round("auto_round:auto_awq"), "auto-round"),
    "sinq-int4": Maker(_sinq, "sinq"),
    "vptq": Maker(_vptq, "vptq"),
}


def loaded(folder: Path, dtype: str) -> dict[str, Any]:
    """Load a checkpoint on the processor by transformers alone; return what it holds, or what the libraries say against it."""
    kept: Any = {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
        layer = model.model.layers[0].mlp.up_proj
        kept = {"layer": type(layer).__name__, "held": held_bytes(model)}
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
        return {**kept, "held": held_bytes(model)}
    except Exception as error:  # noqa: BLE001  # whatever a package says is the figure
        return {**kept, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def auto_maps(folder: Path, dtype: str, total: int) -> list[Any]:
    """Return the device maps that transformers infers for ten budgets, as pairs: what may be taken, the map."""
    from transformers.integrations.accelerate import _get_device_map
    from transformers.quantizers.auto import get_hf_quantizer

    config = transformers.AutoConfig.from_pretrained(folder)
    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    quantizer.validate_environment = lambda **_: None  # it is asked only which map it would refuse
    kind, files = transformers.LlamaForCausalLM, sorted(map(str, folder.glob("*.safetensors")))
    with ExitStack() as stack:
        for context in kind.get_init_context(getattr(torch, dtype), True, False, None):
            stack.enter_context(context)
        model = kind(config)
        quantizer.device_map = "cpu"
        quantizer.preprocess_model(model=model, dtype=getattr(torch, dtype), device_map="auto", checkpoint_files=files)
    pairs = []
    for memory in budgets(total):
        found = _get_device_map(model, "auto", dict(memory), quantizer)
        pairs.append([{str(key): value for key, value in memory.items()}, found])
    return pairs


def row(name: str, folder: Path) -> dict[str, Any]:
    """Make a checkpoint, load it, and return all that is kept of it."""
    maker = MAKERS[name]
    maker.make(plain(folder / "plain"), folder / "made")
    made = next(path.parent for path in sorted((folder / "made").rglob("config.json")))
    tensors: dict[str, Any] = {}
    for file in sorted(made.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # it is no mapping
                part = opened.get_slice(key)
                tensors[key] = [part.get_dtype(), part.get_shape()]
    config = json.loads((made / "config.json").read_text())
    packages = {package: version(package) for package in (maker.package, "transformers", "torch")}
    figures = {dtype: loaded(made, dtype) for dtype in maker.dtypes}
    best = next((dtype for dtype in maker.dtypes if "error" not in figures[dtype]), None)
    maps = auto_maps(made, best, figures[best]["held"]) if best else []
    return {"made_with": packages, "config": config, "tensors": tensors, "loaded": figures, "auto": maps}


def main(names: list[str]) -> None:
    """Rewrite rows, one a line."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for name in names or MAKERS:
        with TemporaryDirectory() as folder:
            rows[name] = row(name, Path(folder))
        print(name, rows[name]["made_with"], rows[name]["loaded"])
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in MAKERS if name in rows]
    ROWS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
