"""ChatGLM2-6B and ChatGLM3-6B: the same network as transformers' Glm, with other names for fields and tensors."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.glm.configuration_glm import GlmConfig
from transformers.models.glm.modeling_glm import GlmForCausalLM, GlmModel

from harness.core.text import as_written

# Fields that stand for what Glm always does; a config that says otherwise describes another network.
_FIXED = {
    "rmsnorm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
}
_RENAMED = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
}
_KEPT = (
    "hidden_size",
    "num_attention_heads",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "quantization_config",
)
_ROPE_BASE = 10000.0


@strict
class ChatGLM2Config(GlmConfig):
    """Glm's configuration, under a model_type of its own because the tensors of its checkpoints have other names."""

    model_type = "chatglm2"

    @classmethod
    def from_published(cls, published: dict[str, Any], **kwargs: Any) -> Any:
        """Translate a config.json of ChatGLM2 or ChatGLM3.

        Raises:
            ValueError: it describes a network that Glm is not.
        """
        for key, value in _FIXED.items():
            if (found := published.get(key, value)) != value:
                wrong = f"{key} is {as_written(found)}: only {as_written(value)}"
                raise ValueError(f"{wrong}, as ChatGLM2-6B and ChatGLM3-6B have it, is supported")
        if published.get("quantization_bit"):
            raise ValueError(
                f"quantization_bit is {published['quantization_bit']}: ChatGLM2's own integer files are not supported; "
                "load the 16-bit checkpoint and quantize it with --precision int8 or int4"
            )
        given = {ours: published[theirs] for theirs, ours in _RENAMED.items() if theirs in published}
        given |= {key: published[key] for key in _KEPT if key in published}
        heads = published["num_attention_heads"]
        grouped = published.get("multi_query_attention", True)
        given["num_key_value_heads"] = published["multi_query_group_num"] if grouped else heads
        given["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": _ROPE_BASE * published.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        }
        given.setdefault("eos_token_id", 2)
        given.setdefault("pad_token_id", 0)
        return cls.from_dict(given | {"architectures": ["ChatGLM2ForCausalLM"]}, **kwargs)


class ChatGLM2Model(GlmModel):
    """Glm without its head, loaded from the files of ChatGLM2-6B or ChatGLM3-6B."""

    config: ChatGLM2Config
    config_class = ChatGLM2Config
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]


class ChatGLM2ForCausalLM(GlmForCausalLM):
    """Glm, loaded from the files of ChatGLM2-6B or ChatGLM3-6B."""

    config: ChatGLM2Config
    config_class = ChatGLM2Config
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]


def register_names() -> None:
    """Tell transformers what the tensors of the published files are called in Glm."""
    inner = "layers"
    renamed = {
        r"transformer\.embedding\.word_embeddings": "model.embed_tokens",
        r"transformer\.encoder\.final_layernorm": "model.norm",
        r"transformer\.output_layer": "lm_head",
        r"self_attention\.dense\.": "self_attn.o_proj.",
        r"mlp\.dense_h_to_4h": "mlp.gate_up_proj",
        r"mlp\.dense_4h_to_h": "mlp.down_proj",
        rf"transformer\.encoder\.{inner}": f"model.{inner}",
    }
    register_checkpoint_conversion_mapping(
        ChatGLM2Config.model_type,
        [
            *(WeightRenaming(source_patterns=theirs, target_patterns=ours) for theirs, ours in renamed.items()),
            WeightConverter(
                source_patterns="self_attention.query_key_value",
                target_patterns=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                operations=[Split(dim=0)],
            ),
        ],
        overwrite=True,
    )
