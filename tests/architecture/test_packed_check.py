"""Parts that a packed weight cannot do without, by method."""

from __future__ import annotations

import pytest

from harness.architecture.stored.packed_check import lacking_part
from harness.checkpoint.quantization import packed

WHOLE = {".qweight", ".qzeros", ".scales", ".g_idx"}


@pytest.mark.parametrize(
    ("settings", "parts", "lacked"),
    [
        ({"quant_method": "gptq"}, WHOLE, None),
        ({"quant_method": "gptq"}, WHOLE - {".g_idx"}, ".g_idx"),
        ({"quant_method": "gptq"}, WHOLE - {".scales"}, ".scales"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, WHOLE - {".g_idx"}, None),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, WHOLE - {".g_idx", ".qzeros"}, ".qzeros"),
        ({"quant_method": "awq", "version": "gemm", "zero_point": True}, WHOLE - {".g_idx"}, None),
        ({"quant_method": "awq", "version": "gemm", "zero_point": True}, WHOLE - {".qzeros"}, ".qzeros"),
    ],
)
def test_what_a_weight_lacks_follows_from_its_method(settings: dict[str, object], parts: set[str], lacked: str | None) -> None:
    found = packed({"model_type": "llama", "quantization_config": {"bits": 4, "group_size": 128, **settings}})
    assert found is not None
    assert found.layout is not None
    assert lacking_part(found, found.layout, parts) == lacked
