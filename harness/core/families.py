"""GGUF, CHATGLM and MOSS: the file format and the two families of models that differ from all others, a record each.

Whoever treats one of them in its own way asks its record; `harness.models` has the architectures of the two families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.records import Record


class SelfContained(Record, frozen=True, kw_only=True):
    """A file format that holds config, tokenizer and weights in one file, which a loader is given by name."""

    name: str  #: `FileInfo.format`, the row of PRECISIONS that keeps its blocks, and the package that reads it
    title: str  #: `Precision.requires_checkpoint` of that row
    suffix: str
    argument: str  #: the keyword that `from_pretrained` takes the name of the file by
    packed_architectures: frozenset[str]  #: by the format's names, those whose blocks transformers can keep


class Family(Record, frozen=True, kw_only=True):
    """Models of one `model_type` that transformers lacks."""

    model_type: str
    bits_key: str  #: where a config says in how many bits its weights are packed, outside of a quantization_config
    method: str  #: how they are packed: a row of `checkpoint.quantization.LAYOUTS`
    group_key: str = ""  #: where a config says the group size, if there are groups
    group: int = 0  #: the group size of a config that says none
    shapes_decide_bits: bool = False  #: published configs are wrong about bits, and the shapes of the tensors are right
    ties_by_default: bool = False  #: output and embedding are one without a word in the config
    plain_gelu: bool = False  #: the activation is a chain of operations that each keep a result
    fp32_scores: bool = False  #: queries, keys and scores are computed in float32, whatever the dtype
    prefix_mask: bool = False  #: the prompt is read both ways, which takes a mask for every sequence


# transformers 5.24: its `integrations.gguf` (GGUF_ARCHS).
GGUF = SelfContained(
    name="gguf",
    title="GGUF",
    suffix=".gguf",
    argument="gguf_file",
    packed_architectures=frozenset(("lfm2", "qwen35", "qwen35moe")),
)
# ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.
CHATGLM = Family(model_type="chatglm", bits_key="quantization_bit", method="chatglm", ties_by_default=True, prefix_mask=True)
MOSS = Family(
    model_type="moss",
    bits_key="wbits",
    method="gptq",
    group_key="groupsize",
    group=128,
    shapes_decide_bits=True,
    plain_gelu=True,
    fp32_scores=True,
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (CHATGLM, MOSS)}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config is of, None for all that transformers has."""
    return FAMILIES.get(str(config.get("model_type")))


def is_native(config: Mapping[str, Any]) -> bool:
    """Say whether `harness.models` has the architecture of a config, and transformers has not."""
    return family_of(config) is not None
