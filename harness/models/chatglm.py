"""ChatGLM-6B, the first generation (`THUDM/chatglm-6b`), in the idiom of transformers.

What is unlike other decoders: the prompt, up to <sop>, sees itself in both directions; positions are pairs (where in the prompt,
how far into the answer); residuals start from the normalized input, scaled by a constant. Attention goes through transformers'
attention interface, so SDPA, caches, `device_map` and quantizers work as with its own models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward, rotate_half
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from harness.models.cache_argument import CACHE, takes_cache
from harness.models.chatglm2 import ChatGLM2Config
from harness.models.packed import RowScaledLinear, replace_linears

# The published code scales residuals by its own default of 28 layers, whatever the config says.
_RESIDUAL_SCALE = (2 * 28) ** 0.5
_ROPE_BASE = 10000.0
_QUANTIZED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@strict
class ChatGLMConfig(PreTrainedConfig):
    """Configuration of ChatGLM-6B; field names are those of its published config.json.

    The two later generations share the `model_type` "chatglm". They are told apart by their fields: `from_dict` returns a
    `ChatGLM2Config` for them.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
    }

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    quantization_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    hidden_act: str = "gelu_pytorch_tanh"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 150004
    eos_token_id: int | list[int] | None = 150005
    pad_token_id: int | None = 0
    mask_token_id: int = 150000
    gmask_token_id: int = 150001

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pre_seq_len is not None:
            raise ValueError(
                f"pre_seq_len {self.pre_seq_len}: P-Tuning prefixes are not supported; load the model without its prefix"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config.json of any generation; what comes back is the configuration of the generation that it describes."""
        if "padded_vocab_size" in config_dict:
            return ChatGLM2Config.from_published(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


def anchors(config: ChatGLMConfig, input_ids: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Find where each row's answer begins and the place that it fills: int64 [batch, 2], counted from the first visible token.

    The first is the position of <sop>, the second that of [gMASK], or of [MASK] where there is no [gMASK].

    The second is -1 where positions count on through the answer: with one-dimensional positions, unless [MASK] is to be filled.

    Raises:
        ValueError: a row without <sop>, or without either mask.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    sought: tuple[Any, ...] = (config.bos_token_id, config.gmask_token_id, config.mask_token_id)
    start, gmask, mask = (places.masked_fill(input_ids.ne(token), length).amin(dim=1) for token in sought)
    target = gmask.where(gmask < length, mask)
    if bool((start == length).any()) or bool((target == length).any()):
        raise ValueError(
            f"every prompt needs [gMASK] or [MASK] (ids {config.gmask_token_id}, {config.mask_token_id}) and <sop> "
            f"(id {config.bos_token_id}) at its end: append {[config.gmask_token_id, config.bos_token_id]} to its ids"
        )
    padding = _padding(visible, input_ids)
    target = target - padding
    if not config.position_encoding_2d:
        target = target.masked_fill(gmask < length, -1)
    return torch.stack((start - padding, target), dim=1)


def _padding(visible: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """Count the padded tokens on the left of each row: int64 [batch]."""
    if visible is None or visible.ndim != 2:
        return input_ids.new_zeros(len(input_ids))
    return visible.long().argmax(dim=1)


def positions(anchored: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the two positions of each token: int64 [batch, 2, length].

    `tokens` [batch, length] counts from the first visible token of each row; padding, which is negative, gets zeros. In the
    prompt the first position counts and the second is 0; in the answer the first stays where the mask is (`anchors`) and the second
    counts from 1.
    """
    start, target = anchored[:, :1], anchored[:, 1:]
    answering = tokens >= start
    first = tokens.where(~answering | (target < 0), target)
    second = torch.where(answering, tokens - start + 1, 0)
    return torch.stack((first, second), dim=1).clamp(min=0)


class ChatGLMRotaryEmbedding:
    """Tables of cosines and sines for the parts of a head: two halves that turn with a position each, or the whole with one.

    It holds no tensors: frequencies, rounded to float16 as published, are made anew for each call.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        self.parts = 2 if config.position_encoding_2d else 1
        self.part_size = config.hidden_size // config.num_attention_heads // self.parts

    def __call__(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [batch, length, 1, parts, size of a part] in the dtype of `states`."""
        steps = torch.arange(0, self.part_size, 2, device=states.device, dtype=torch.float32) / self.part_size
        frequencies = (_ROPE_BASE**-steps).half().float()
        angles = position_ids[:, : self.parts].transpose(1, 2)[..., None].float() * frequencies
        table = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return table.cos().to(states.dtype), table.sin().to(states.dtype)


def rotated(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn each part of each head by its position; `states` is [batch, length, heads, head size]."""
    parts = states.unflatten(-1, cosines.shape[-2:])
    return (parts * cosines + rotate_half(parts) * sines).flatten(-2)


class ChatGLMAttention(nn.Module):
    """Self-attention; the rows of `query_key_value` hold query, key and value of one head after another."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        heads = self.query_key_value(hidden_states).view(*shape, -1, 3 * self.head_dim)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = rotated(query, *position_embeddings).transpose(1, 2), rotated(key, *position_embeddings).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.dense(output.reshape(*shape, -1).contiguous()), weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)))


class ChatGLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, **kwargs)
        normed = self.post_attention_layernorm(_RESIDUAL_SCALE * normed + attended)
        return _RESIDUAL_SCALE * normed + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq"]


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder without its head. See `ChatGLMForCausalLM.forward` for the arguments."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rotary = ChatGLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        if config.quantization_bit:
            replace_linears(self.layers, _QUANTIZED, partial(RowScaledLinear, bits=config.quantization_bit))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value  # type: ignore[assignment]  # an Embedding, which transformers calls a Module

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, cache, seen)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE: cache},
            or_mask_function=_sees_prompt(position_ids, seen) if inputs_embeds.shape[1] > 1 else None,
        )
        states, tables = inputs_embeds, self.rotary(inputs_embeds, position_ids)
        for layer in self.layers:
            states = layer(states, position_embeddings=tables, attention_mask=mask, cache=cache, use_cache=use_cache, **kwargs)
        kept: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(states), **kept)

    def _positions(
        self, input_ids: torch.Tensor | None, visible: torch.Tensor | None, cache: Cache | None, seen: int
    ) -> torch.Tensor:
        """Work out positions that were not given; a cache remembers where the answers of its rows began."""
        if input_ids is None:
            raise ValueError("inputs_embeds need position_ids: where the prompt ends cannot be seen in them")
        anchored = getattr(cache, "chatglm_anchors", None) if seen else anchors(self.config, input_ids, visible)
        if anchored is None:
            raise ValueError("the cache was filled by another model; give position_ids")
        if cache is not None:
            cache.chatglm_anchors = anchored  # type: ignore[attr-defined]  # ours alone reads it
        places = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        return positions(anchored, places - _padding(visible, input_ids)[:, None])


def _sees_prompt(position_ids: torch.Tensor, seen: int) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """Return a mask function that adds to the causal mask: every token sees the whole prompt before <sop>."""
    starts = seen + position_ids.shape[-1] - position_ids[:, 1, -1]

    def sees(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:  # noqa: ARG001 transformers' interface
        return key < starts[batch]

    return sees


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def prompt_ending(self) -> list[int]:
        """The tokens that ask for an answer, at the end of a prompt."""
        begin = self.config.bos_token_id
        return [self.config.gmask_token_id] + ([begin] if begin is not None else [])

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        `input_ids` [batch, length]: text, then [gMASK] and <sop>, then the answer so far. `attention_mask` [batch, length seen
        so far] is 0 for padding, which stands on the left. `position_ids` [batch, 2, length] are worked out from `input_ids` where
        they are not given. `logits_to_keep`: how many of the last tokens get logits, 0 for all.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
        """Give the decoder the positions of the tokens that it is about to see; they follow from the whole sequence."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        visible = kwargs.get("attention_mask")
        anchored = anchors(self.config, input_ids, visible)
        places = torch.arange(input_ids.shape[1], device=input_ids.device) - _padding(visible, input_ids)[:, None]
        new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        inputs["position_ids"] = positions(anchored, places)[..., -new.shape[1] :]
        return inputs
