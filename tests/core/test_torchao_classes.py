"""What is kept of torchao's answers against the library, and against what its checkpoints did when they were loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from harness.checkpoint import quantization
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.core.methods import torchao
from tests.strangers.made_by_packages import ROWS
from tests.support import torchao_classes

KEPT: dict[str, Any] = json.loads(torchao_classes.RECORDED.read_text())
LOADED: dict[str, Any] = {name: row for name, row in json.loads(ROWS.read_text()).items() if name.startswith("torchao")}


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_is_what_the_library_answers() -> None:
    """`python -m tests.support.torchao_classes` asks a new release."""
    assert torchao_classes.answers() == KEPT


@pytest.mark.parametrize("name", LOADED)
def test_who_binds_the_rest_to_a_dtype_did_so_when_loaded(name: str) -> None:
    row = LOADED[name]
    others = [found for dtype, found in row["loaded"].items() if dtype != row["config"]["dtype"]]
    fails = {"error" in found for found in others}
    assert fails <= {torchao.binds(row["config"]["quantization_config"], ())}


def test_a_kind_that_nobody_asked_binds() -> None:
    settings = {"quant_type": {"default": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {}}}}
    assert torchao.binds(settings, ())
    assert torchao.binds({}, {"torchao.quantization.Float8Tensor"})
    assert not torchao.binds({}, {"torchao.quantization.IntxUnpackedToInt8Tensor"})


@pytest.mark.parametrize(("kind", "grows"), [("IntxUnpackedToInt8Tensor", True), ("Int8Tensor", False)])
def test_scales_of_a_pickled_tensor_take_the_dtype_of_the_model_where_transformers_casts_them(kind: str, grows: bool) -> None:
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}}
    common: dict[str, Any] = {
        "file": "pytorch_model.bin",
        "offset": 0,
        "whole": "up.weight",
        "whole_class": f"torchao.quantization.{kind}",
    }
    tensors = [
        StoredTensor(name="up._weight_qdata", dtype="int8", shape=(8, 4), bytes=32, **common),
        StoredTensor(name="up._weight_scale", dtype="bfloat16", shape=(8, 1), bytes=16, **common),
    ]
    found = quantization.packed(config, tensors)
    assert found is not None
    assert found.float_growth("float32") == (16 if grows else 0)
