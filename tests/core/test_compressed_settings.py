"""What is said of a quantization_config of compressed-tensors against the library's own classes."""

from __future__ import annotations

import json
import math
import random
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from harness.checkpoint import settings_check
from harness.checkpoint.quantization import packed
from harness.core.methods import compressed
from harness.core.methods.table import METHODS
from tests.support import compressed_settings

KEPT: dict[str, Any] = json.loads(compressed_settings.RECORDED.read_text())
installed = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
# What people write in each place, right and wrong.
VALUES: dict[str, tuple[Any, ...]] = {
    "num_bits": (1, 2, 4, 6, 8, 12),
    "type": ("int", "float", "INT", "Float", "fp", None, True),
    "strategy": (None, "tensor", "channel", "group", "Group", "block", "token", "tensor_group", "attn_head", "row", True),
    "group_size": (None, -1, 0, 16, 128, -2),
    "block_structure": (None, [128, 128]),
    "dynamic": (False, True, "local", "LOCAL", None, "no"),
    "actorder": (None, False, True, "weight", "static", "group", "GROUP", "dynamic", "act"),
    "zp_dtype": (None, "torch.int8"),
    "reorder": (1,),
}
GROUPS = (
    {"targets": ["Linear"]},
    {"targets": ["Linear"], "format": "pack-quantized"},
    {"targets": ["Linear"], "format": "mixed-precision"},
    {"targets": ["Linear"], "format": "own"},
    {"targets": ["Linear"], "name": "a"},
)


def asked(seed: int) -> dict[str, Any]:
    """Make settings of a few keys, most of them right, so that each is refused by one thing or by none."""
    draw = random.Random(seed)
    given = {key: draw.choice(VALUES[key]) for key in draw.sample(sorted(VALUES), k=draw.randint(1, 4))}
    group: dict[str, Any] = {**draw.choice(GROUPS[:2] if seed % 4 else GROUPS), "weights": {"num_bits": 4, **given}}
    if seed % 3 == 0:
        group["input_activations"] = {key: value for key, value in given.items() if key in ("strategy", "dynamic", "group_size")}
    status = draw.choice(("compressed", "frozen")) if seed % 5 else draw.choice(("COMPRESSED", "done", None))
    return {"quant_method": "compressed-tensors", "quantization_status": status, "config_groups": {"group_0": group}}


@installed
def test_what_is_kept_is_what_the_library_answers() -> None:
    """`python -m tests.support.compressed_settings` asks a new release."""
    assert compressed_settings.answers() == KEPT


@installed
def test_what_is_refused_is_what_the_library_refuses() -> None:
    made = import_module("compressed_tensors.quantization").QuantizationConfig.model_validate
    told, found = {}, {}
    for seed in range(3000):
        settings = asked(seed)
        told[seed] = compressed.settings_refusal(settings) is None
        found[seed] = compressed_settings.reason(made, settings) is None
    wrong = {seed: asked(seed)["config_groups"]["group_0"] for seed in told if told[seed] != found[seed]}
    assert not wrong, next(iter(wrong.items()))
    assert 300 < sum(told.values()) < 2700


def test_what_was_removed_is_told_with_the_library_s_reason() -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 128, "actorder": "group"}
    said = compressed.settings_refusal({"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    assert said is not None
    assert "Consider using actorder='weight'" in said
    assert said.startswith(f"compressed-tensors {KEPT['version'].rpartition('.')[0]} does not take")


def test_every_status_means_16_bit_weights_or_packed_ones() -> None:
    statuses = {json.loads(word) for word, why in KEPT["statuses"].items() if why is None}
    assert {*METHODS["compressed-tensors"].plain_when["quantization_status"]} == (statuses - {"compressed"}) | {None}


def scheme(form: str | None = None, **said: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, **said}
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}


def settings_of(top: str | None, *schemes: dict[str, Any]) -> dict[str, Any]:
    return {"format": top, "config_groups": {f"group_{number}": one for number, one in enumerate(schemes)}}


@pytest.mark.parametrize("top", [*KEPT["unpacked"], "dense", "marlin-24", "my-own", None])
@pytest.mark.parametrize("own", ["pack-quantized", None])
def test_the_format_at_the_top_counts_only_where_groups_have_none_and_files_are_in_it(top: str | None, own: str | None) -> None:
    found = compressed.loading(settings_of(top, scheme(own)), lambda form: form == "pack-quantized")
    assert (found.stored, found.fault, found.apart) == ("pack-quantized", None, False)
    assert found.whole == (own is not None or top == "pack-quantized")


def test_formats_that_one_function_unpacks_are_one() -> None:
    whole = {"num_bits": 8, "strategy": "channel", "group_size": None}
    for top in ("int-quantized", "naive-quantized", "float-quantized"):
        assert compressed.loading(settings_of(top, scheme(None, **whole)), lambda form: form != "pack-quantized").whole


@pytest.mark.parametrize(
    "other",
    [
        scheme("pack-quantized", symmetric=False),
        scheme("pack-quantized", num_bits=8),
        scheme("int-quantized"),
        scheme("pack-quantized", strategy="block", group_size=None, block_structure=[64, 64]),
    ],
)
def test_what_is_unpacked_otherwise_is_not_unpacked_while_loading(other: dict[str, Any]) -> None:
    assert compressed.loading(settings_of("pack-quantized", scheme(), scheme("pack-quantized"))).whole
    found = compressed.loading(settings_of("pack-quantized", scheme(), other))
    assert (found.apart, found.whole) == (True, False)


@installed
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(160, 200), (256, 384), (64, 128)])
def test_what_blocks_leave_of_a_weight_is_a_view_that_fills_whole_blocks(shape: tuple[int, int], scales: torch.dtype) -> None:
    """Only a cast to another dtype copies what is used of it."""
    blocks = scheme("float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 128])
    filled = compressed.loading(settings_of("float-quantized", blocks)).filled
    assert filled == (128, 128)
    given = import_module("compressed_tensors.quantization").QuantizationArgs(**blocks["weights"])
    sides = [-(-side // by) for side, by in zip(shape, filled, strict=True)]
    unpack = import_module("compressed_tensors.quantization.lifecycle.forward").dequantize
    weight = unpack(torch.ones(shape).to(torch.float8_e4m3fn), torch.ones(sides, dtype=scales), args=given)
    assert (weight.shape, weight.dtype) == (shape, scales)
    whole = math.prod(side * by for side, by in zip(sides, filled, strict=True))
    assert weight.untyped_storage().nbytes() == whole * weight.element_size()
    cast = weight.to(torch.float16)
    assert cast.untyped_storage().nbytes() == math.prod(shape) * cast.element_size()


def test_other_strategies_fill_nothing_up() -> None:
    assert compressed.loading(settings_of("pack-quantized", scheme())).filled is None
    blocks = scheme("float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 0])
    assert compressed.loading(settings_of("float-quantized", blocks)).filled is None


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_zero_points_that_find_no_room_are_those_of_the_library(strategy: str) -> None:
    known: dict[str, dict[str, Any]] = {"group": {"group_size": 128}, "block": {"block_structure": [64, 64]}}
    zeros = scheme("pack-quantized", **{"group_size": None, "strategy": strategy, "symmetric": False, **known.get(strategy, {})})
    assert compressed.loading(settings_of("pack-quantized", zeros)).fault is None
    mixed = compressed.loading(settings_of("pack-quantized", zeros, scheme(num_bits=8)))
    assert (mixed.fault is not None) == (["pack-quantized", strategy] in KEPT["unfilled"])


# ---- sparse weights --------------------------------------------------------------------------------------------------------


@installed
def test_who_reads_a_format_is_said_of_those_that_the_library_names_and_does_not_unpack() -> None:
    named = {one.value for one in import_module("compressed_tensors.config").CompressionFormat}
    known = import_module("compressed_tensors.compressors").BaseCompressor.registered_names()
    assert set(compressed.READERS) == named - {*known, "mixed-precision"}


@pytest.mark.parametrize("form", compressed.READERS)
def test_a_format_of_sparse_weights_is_refused_by_its_name_with_its_reader(form: str) -> None:
    at_the_top = compressed.loading(settings_of(form, scheme(form)), lambda _: True).fault
    beside = compressed.settings_refusal({"format": "dense", "sparsity_config": {"format": form, "targets": ["Linear"]}})
    for said in (at_the_top, beside):
        assert said is not None
        assert f'"{form}"' in said
        assert compressed.READERS[form] in said
    assert compressed.settings_refusal({"format": "dense", "sparsity_config": {"format": "dense"}}) is None
    config = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": form}}
    assert settings_check.fault({"quantization_config": config}) is None  # the plan refuses it, by its format
    assert (packed({"quantization_config": config}) or pytest.fail("not seen")).fault == beside
