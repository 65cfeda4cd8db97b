"""What is said of a quantization_config against transformers' own classes, value by value; and where a config keeps it."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, integrations
from transformers.utils import quantization_config

from harness.checkpoint.settings_check import fault, loading_fault
from harness.core.dtypes import DTYPE_BITS, FLOAT_NAMES
from harness.core.methods.table import METHODS

SETTINGS = {name: row.settings for name, row in METHODS.items() if row.settings}
NEEDS = {name: row.tables for name, row in METHODS.items() if row.tables}

# Values that people write, right and wrong, for every key that is checked.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 128, -1, -2, 6.0, "4", "128", "", "dynamic", "STATIC", "float", "ue8m0",
    "fp8", "fp4", "nf4", "gemm", "GEMV", "marlin", "bitlinear", "offline", "sinq", [], [128, 128], [0, 128], [128], [1, 32], {},
)  # fmt: skip
# What rows ask for.
NEEDED: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
    "vptq": {"shared_layer_config": {"q_proj": {"vector_lens": [-1, 8]}}},
    "spqr": {"shapes": {"model.layers.0.self_attn.q_proj.dense_weights.shape": 8}},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
}
BASE: dict[str, dict[str, Any]] = {
    "spqr": NEEDED["spqr"],
    "gptq": {"bits": 4},
    "bitsandbytes_4bit": {"load_in_4bit": True},
    "bitsandbytes_8bit": {"load_in_8bit": True},
    "higgs": {"hadamard_size": 1024},
}


def settings_of_method(method: str) -> dict[str, Any]:
    return {"quant_method": method.removesuffix("_4bit").removesuffix("_8bit"), **BASE.get(method, {})}


def is_taken(settings: dict[str, Any]) -> bool:
    """Say whether transformers makes its config of the settings."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(settings))
    except (ValueError, TypeError, AttributeError):
        return False
    return True


@pytest.mark.parametrize(("method", "key"), [(method, one.key) for method, rows in SETTINGS.items() for one in rows])
def test_what_is_taken_of_a_key_is_what_transformers_takes(method: str, key: str) -> None:
    asked = [{**settings_of_method(method), key: value} for value in VALUES]
    # A flag that takes the other's place names another method, or none.
    asked = [one for one in asked if not method.startswith("bitsandbytes") or one.get("load_in_4bit") or one.get("load_in_8bit")]
    told = {str(one): fault({"quantization_config": one}) is None for one in asked}
    assert told == {str(one): is_taken(one) for one in asked}
    assert set(told.values()) == {True, False}


@pytest.mark.parametrize("method", SETTINGS)
def test_settings_without_a_word_are_taken_unless_one_is_required(method: str) -> None:
    bare = {"quant_method": settings_of_method(method)["quant_method"], **(BASE[method] if "bits" in method else {})}
    bare |= NEEDED.get(method, {})
    assert (fault({"quantization_config": bare}) is None) == is_taken(bare)


@pytest.mark.parametrize("method", NEEDS)
@pytest.mark.parametrize("empty", [None, {}, "left out"])
def test_what_is_packed_must_be_said(method: str, empty: Any) -> None:
    given = {"quant_method": method, **NEEDED[method]}
    assert fault({"quantization_config": given}) is None
    bare = {key: value for key, value in given.items() if key == "quant_method" or empty != "left out"}
    bare |= dict.fromkeys(bare.keys() - {"quant_method"}, empty)
    assert f"gives no quantization_config.{NEEDS[method].keys[0]}" in str(fault({"quantization_config": bare}))


def test_compressed_tensors_without_groups_replace_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So says transformers' config class, whatever its package makes of groups."""
    monkeypatch.setattr(quantization_config, "is_compressed_tensors_available", lambda: True)
    monkeypatch.setitem(sys.modules, "compressed_tensors", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", SimpleNamespace(QuantizationConfig=object))
    config = quantization_config.CompressedTensorsConfig(format="pack-quantized", quantization_status="compressed")
    assert (config.quantization_config, config.is_quantized) == (None, False)


@pytest.mark.parametrize(("method", "raised"), [("vptq", TypeError), ("spqr", KeyError)])
def test_layers_without_a_word_end_in_an_error(method: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers' own replacement of modules; of the package only the class of a layer is asked for."""
    layer = SimpleNamespace(create_placeholder=None)
    monkeypatch.setitem(sys.modules, "vptq", SimpleNamespace(VQuantLinear=layer))
    monkeypatch.setitem(sys.modules, "spqr_quant", SimpleNamespace(QuantizedLinear=layer))
    monkeypatch.setattr(integrations.spqr, "is_spqr_available", lambda: True)
    replace = {"vptq": integrations.vptq.replace_with_vptq_linear, "spqr": integrations.spqr.replace_with_spqr_linear}[method]
    made = {"vptq": quantization_config.VptqConfig, "spqr": quantization_config.SpQRConfig}[method]()
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})})
    with pytest.raises(raised):
        replace(model, quantization_config=made)


def test_torchao_without_a_type_makes_no_config() -> None:
    asked = inspect.signature(quantization_config.TorchAoConfig.__init__).parameters
    assert asked["quant_type"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": "int4"}, "gives quantization_config as 'int4', which is no table"),
        ({"quantization_config": ["int4"]}, "as a list, which is no table"),
        ({"quantization_config": 4}, "as 4, which is no table"),
        ({"quantization_config": False}, "as false, which is no table"),
        ({"quantization_config": ""}, "as '', which is no table"),
        ({"quantization_config": {}}, "an empty table"),
        ({"text_config": {"quantization_config": {}}}, "an empty table"),
        ({"text_config": {"quantization_config": "int4"}}, "as 'int4', which is no table"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "both load_in_4bit and load_in_8bit"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "quant_method as a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"gives no quantization_config.bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "bits as '4'"),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}, "text_config": {"model_type": "llama"}}, None),
        ({"text_config": {"quantization_config": None}}, None),
        ({}, None),
    ],
)
def test_settings_are_found_where_transformers_looks(config: dict[str, Any], said: str | None) -> None:
    found = fault(config)
    assert found == said if said is None else said in str(found)


def test_the_floats_are_those_of_torch() -> None:
    named = {name: one for name, one in vars(torch).items() if isinstance(one, torch.dtype) and one.is_floating_point}
    assert set(FLOAT_NAMES) == set(named)
    assert [name for name, one in named.items() if "_x2" not in name and str(one) != f"torch.{FLOAT_NAMES[name]}"] == []
    assert not set(FLOAT_NAMES.values()) - set(DTYPE_BITS)


DTYPES = (
    "bfloat16",
    "half",
    "float",
    "float64",
    None,
    "bfloat17",
    "int",
    "int8",
    "torch.float16",
    "auto",
    "",
    "nn",
    7,
    True,
    ["x"],
)
CLASSES: tuple[Any, ...] = (
    {}, {"AutoModelForCausalLM": "a.B"}, {"AutoModelForCausalLM": {"a": "b"}}, {"AutoModelForCausalLM": ["a.B", None]}, [], "x",
    {"AutoModelForCausalLM": 7},
    {"AutoModelForCausalLM": None}, {"AutoConfig": 7}, ["AutoConfig"],
)  # fmt: skip
LOADED = (
    [("dtype", value) for value in DTYPES] + [("torch_dtype", value) for value in DTYPES] + [("auto_map", one) for one in CLASSES]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    sizes: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
    AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("key", "value"), LOADED, ids=str)
def test_a_dtype_or_a_class_is_told_where_transformers_loads_no_model(key: str, value: Any, small: Path) -> None:
    file = small / "config.json"
    config = {name: one for name, one in json.loads(file.read_text()).items() if name not in ("dtype", "torch_dtype", "auto_map")}
    changed = {**config, key: value}
    file.write_text(json.dumps(changed))
    try:
        AutoModelForCausalLM.from_pretrained(small)
    except (AttributeError, IndexError, TypeError, ValueError):
        said = loading_fault(changed)
        assert said is not None
        assert said.startswith(f"gives {key}")
    else:
        assert loading_fault(changed) is None
