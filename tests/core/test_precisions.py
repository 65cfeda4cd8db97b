"""The table of precisions: consistent with itself, with the placements and with the libraries."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Config, Precision
from harness.core.quantizers import SCHEMES

ROWS = pytest.mark.parametrize("row", PRECISIONS.values(), ids=PRECISIONS)


def test_names_are_keys_and_the_widest_comes_first() -> None:
    assert [row.name for row in PRECISIONS.values()] == list(PRECISIONS)
    assert all(wider.bits >= narrower.bits for wider, narrower in pairwise(PRECISIONS.values()))


@ROWS
def test_dtypes_are_torch_s(row: Precision) -> None:
    for name in (row.dtype, row.dtype_before_cc80):
        assert name is None or isinstance(getattr(torch, name), torch.dtype)


@ROWS
def test_every_row_is_made_on_loading_or_stored_or_plain(row: Precision) -> None:
    assert (row.quantization is None or row.unsupported is not None or row.requires_checkpoint is not None) == (row.scheme is None)
    assert row.scheme is None or row.scheme in SCHEMES
    assert row.requires_checkpoint is None or row.stored is not None


@ROWS
def test_what_is_not_quantized_holds_what_it_asks_for(row: Precision) -> None:
    if row.quantization is None and row.requires_checkpoint is None:
        assert row.linear_dtype == row.dtype
        assert row.bits == torch.finfo(getattr(torch, row.dtype)).bits


@ROWS
def test_transformers_takes_the_quantization_as_it_is_and_fully(row: Precision) -> None:
    if row.quantization is None or isinstance(row.quantization, Config) or row.unsupported:
        return
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict(dict(row.quantization))
    assert row.quantization.items() <= config.to_dict().items()
    packages = {"bitsandbytes": ("bitsandbytes",), "gguf": ("kernels",), "quanto": ("optimum.quanto",), "fp8": ()}
    assert row.needs == packages[str(getattr(config.quant_method, "value", config.quant_method))]


@ROWS
def test_a_refusal_is_of_a_trait_that_a_placement_has_and_gives_a_reason(row: Precision) -> None:
    traits = {trait for placement in PLACEMENTS.values() for trait in placement.traits}
    assert row.incompatible.keys() <= traits
    assert all(row.incompatible.values())


@pytest.mark.parametrize(
    ("precision", "capability", "dtype"),
    [
        ("int4", None, "bfloat16"),
        ("int4", "8.0", "bfloat16"),
        ("int4", "12.0", "bfloat16"),
        ("int4", "7.5", "float16"),
        ("int4", "6.1", "float16"),
        ("int8", "6.1", "float16"),
        ("int8", "9.0", "float16"),
        ("bf16", "6.1", "bfloat16"),
        ("fp32", "6.1", "float32"),
    ],
)
def test_4_bit_computes_in_float16_on_gpus_without_bfloat16(precision: str, capability: str | None, dtype: str) -> None:
    assert PRECISIONS[precision].dtype_on(capability) == dtype
