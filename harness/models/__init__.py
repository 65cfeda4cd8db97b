"""Architectures of published models that transformers lacks. Importing this registers them with its Auto classes.

    import harness.models
    model = AutoModelForCausalLM.from_pretrained(DIR)     # a published directory, as it is; none of its code runs

`chatglm` is ChatGLM-6B and, through transformers' Glm, ChatGLM2-6B and ChatGLM3-6B; `moss` is MOSS.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from harness.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel
from harness.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM, ChatGLM2Model, register_names
from harness.models.moss import MossConfig, MossForCausalLM, MossModel, MossTokenizer
from harness.models.tokenization_chatglm import ChatGLM2Tokenizer, ChatGLMTokenizer

__all__ = [
    "ChatGLM2Config",
    "ChatGLM2ForCausalLM",
    "ChatGLM2Model",
    "ChatGLM2Tokenizer",
    "ChatGLMConfig",
    "ChatGLMForCausalLM",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "MossConfig",
    "MossForCausalLM",
    "MossModel",
    "MossTokenizer",
]


def _register() -> None:
    for config, model, base in (
        (ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel),
        (ChatGLM2Config, ChatGLM2ForCausalLM, ChatGLM2Model),
        (MossConfig, MossForCausalLM, MossModel),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)
    AutoTokenizer.register(MossConfig, MossTokenizer, exist_ok=True)
    register_names()


_register()
