"""What is said of a quantization_config against transformers' own classes, value by value; and where a config keeps it."""

from __future__ import annotations

from typing import Any

import pytest

from harness.checkpoint.settings_check import SETTINGS, fault

# Values that people write, right and wrong, for every key that is checked.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 128, -1, -2, 6.0, "4", "128", "", "dynamic", "STATIC", "float", "ue8m0",
    "fp8", "fp4", "nf4", "gemm", "GEMV", "marlin", "bitlinear", "offline", "sinq", [], [128, 128], [0, 128], [128], [1, 32], {},
)  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
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
    assert (fault({"quantization_config": bare}) is None) == is_taken(bare)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": "int4"}, "gives quantization_config as 'int4', which is no table"),
        ({"quantization_config": ["int4"]}, "as a list, which is no table"),
        ({"quantization_config": 4}, "as 4, which is no table"),
        ({"quantization_config": False}, "as False, which is no table"),
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
