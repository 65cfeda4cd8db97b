"""MOSS (`fnlp/moss-moon-003-*`): transformers' CodeGen under another name, its tokenizer too, and its int8 and int4 files."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.codegen.configuration_codegen import CodeGenConfig
from transformers.models.codegen.modeling_codegen import CodeGenForCausalLM, CodeGenModel, CodeGenPreTrainedModel
from transformers.models.codegen.tokenization_codegen import CodeGenTokenizer

from harness.checkpoint import quantization, reader
from harness.core.families import MOSS
from harness.models.packed import GroupScaledLinear, replace_linears

_QUANTIZED = ("qkv_proj", "out_proj", "fc_in", "fc_out")
_LOG = logging.getLogger(__name__)
_UNPACKED = 16  # wbits from here on, such as 32 in the float16 files, mean that nothing is packed


@strict
class MossConfig(CodeGenConfig):
    """CodeGen's configuration, with the bits and the group size of packed weights (`wbits` 32: not packed)."""

    model_type = "moss"

    wbits: int = 32
    groupsize: int = MOSS.group


class MossPreTrainedModel(CodeGenPreTrainedModel):
    """What MOSS has beyond CodeGen: attention and MLP weights stay packed where they are stored so."""

    config: MossConfig
    config_class = MossConfig
    _keys_to_ignore_on_load_unexpected = [r"attn\.causal_mask"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.wbits < _UNPACKED:
            base: Any = self.base_model
            replace_linears(base.h, _QUANTIZED, partial(GroupScaledLinear, bits=config.wbits, group=config.groupsize))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load as any model of transformers. Of a directory the tensors' shapes decide how many bits are packed, not its config.

        One published repository says 4 bits of weights that have 8.
        """
        if isinstance(config, MossConfig) and Path(pretrained_model_name_or_path).is_dir():
            bits = quantization.first_packed(reader.read(Path(pretrained_model_name_or_path)).tensors)[1]
            if bits != (config.wbits if config.wbits < _UNPACKED else 0):
                _LOG.warning(
                    "the config says wbits %d, the weights have %s: loading what they have", config.wbits, bits or "no packing"
                )
                config = copy.deepcopy(config)
                config.wbits = bits or MossConfig.wbits
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


class MossModel(MossPreTrainedModel, CodeGenModel):
    """MOSS without its head, which is never packed."""


class MossForCausalLM(MossPreTrainedModel, CodeGenForCausalLM):
    """MOSS, loaded from its float16, int8 or int4 files."""


class MossTokenizer(CodeGenTokenizer):
    """CodeGen's byte pairs over MOSS's own vocabulary; <eoh>, <eom> and the like end the parts of its dialogues."""
