"""PRECISIONS: how weights can be held, widest first. One entry gives the option, the gate, the loader's arguments and the check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.case import Record


class Precision(Record, frozen=True, kw_only=True):
    """One row of the table.

    `dtype` is what transformers is asked for, `dtype_before_cc80` the same on GPUs without bfloat16; `quantization` is its
    `quantization_config` as a dict. `holds` names the dtype that the weights of the Linear modules must have after loading
    (`Loaded.linear_dtype_bytes`), else the precision did not take effect. `refuses` maps a trait of a placement to the reason
    why this precision cannot be loaded that way. `stored` is the format that a checkpoint must have to be held this way.
    """

    name: str
    title: str
    bits: float
    dtype: str
    holds: str
    dtype_before_cc80: str | None = None
    quantization: Mapping[str, Any] | None = None
    needs: tuple[str, ...] = ()
    min_compute_capability: float = 0.0
    refuses: Mapping[str, str] = {}
    stored: str | None = None

    def holds_format(self, stored: str) -> bool:
        """Say whether a checkpoint of this format ("safetensors", "bin", "gguf") can be held this way."""
        return self.stored is None or self.stored == stored

    def dtype_on(self, compute_capability: str | None) -> str:
        """Return the dtype to ask for on a GPU of this compute capability (None: no GPU)."""
        old = compute_capability is not None and float(compute_capability) < 8.0
        return self.dtype_before_cc80 if old and self.dtype_before_cc80 else self.dtype


# GGUF's names of the architectures whose blocks transformers 5.23 can keep (its `integrations.gguf`, GGUF_ARCHS).
PACKED_ARCHITECTURES = frozenset(("lfm2", "qwen35", "qwen35moe"))

_BNB_REFUSES = {
    "spills": "transformers refuses bitsandbytes weights on the CPU or the disk beside a GPU, or on the disk at all "
    '("Some modules are dispatched on the CPU or the disk")',
    "dispatches": "load_checkpoint_and_dispatch places weights as they are stored and does not quantise them",
}

_ROWS = (
    Precision(name="fp32", title="32-bit float", bits=32, dtype="float32", holds="float32"),
    Precision(name="bf16", title="bfloat16", bits=16, dtype="bfloat16", holds="bfloat16"),
    Precision(name="fp16", title="16-bit float", bits=16, dtype="float16", holds="float16"),
    Precision(
        name="int8",
        title="8-bit, bitsandbytes LLM.int8",
        bits=8,
        # LLM.int8 computes in float16 and casts anything else at every layer, with a warning each.
        dtype="float16",
        holds="int8",
        quantization={"quant_method": "bitsandbytes", "load_in_8bit": True},
        needs=("bitsandbytes",),
        min_compute_capability=7.5,
        refuses=_BNB_REFUSES,
    ),
    Precision(
        name="int4",
        title="4-bit, bitsandbytes nf4",
        bits=4.5,
        dtype="bfloat16",
        dtype_before_cc80="float16",
        holds="uint8",
        quantization={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        needs=("bitsandbytes",),
        min_compute_capability=6.0,
        refuses=_BNB_REFUSES,
    ),
    Precision(
        name="gguf",
        title="GGUF, in its blocks",
        bits=4.5,  # of a file of Q4; each says its own
        # ggml's kernels compute in float32 and would cast anything else at every Linear.
        dtype="float32",
        holds="uint8",
        quantization={"quant_method": "gguf"},
        needs=("kernels",),
        min_compute_capability=7.5,
        refuses={
            "ram": "transformers has kernels for packed GGUF on GPUs alone and unpacks it for the processor: load it with "
            "--precision bf16, fp16 or fp32",
        },
        stored="gguf",
    ),
)

PRECISIONS: Mapping[str, Precision] = {row.name: row for row in _ROWS}
