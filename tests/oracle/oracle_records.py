"""Hold records against traces of all layers: every small model, precision and family of cards that the default tests leave out.

pytest -s -o python_files=oracle_*.py tests/oracle
"""

from __future__ import annotations

import pytest

from tests.worker.test_trace import MODELS, agrees


@pytest.mark.parametrize(
    ("model", "precision", "capability"),
    [
        *((name, "bf16", "8.0") for name in MODELS if name != "qwen 3, experts"),
        ("llama", "int8", "8.0"),
        ("llama", "fp8", "8.0"),
        ("qwen 3, experts", "fp8", "8.0"),
        ("llama", "int4", "7.5"),
        ("mistral with a window", "fp16", "7.0"),
        ("mistral with a window", "bf16", "9.0"),  # cuDNN takes masks as they are
        ("gemma 3, alternating", "bf16", "12.0"),
    ],
)
def test_a_record_gives_what_a_trace_of_all_layers_gives(model: str, precision: str, capability: str) -> None:
    agrees(MODELS[model], precision, capability)
