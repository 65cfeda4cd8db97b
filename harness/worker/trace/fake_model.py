"""A model on a fake card, from its config alone: built on meta, quantized and placed as transformers' loader leaves it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.quantizers.auto import AutoQuantizationConfig

from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.core.precisions import PRECISIONS
from harness.worker.auto_class import auto_class_of
from harness.worker.build_skeleton import construct, read_model_config
from harness.worker.trace.ledger import CARD
from harness.worker.trace.quantized_kernels import packed_for, packed_to_mxfp4, quantized_to_fp8

_NOT_BY_LAYER = ("architectures", "bos_token_id", "eos_token_id")  # lists that may be as long by chance


class Layers(NamedTuple):
    """The decoder layers of a model: the list that holds them, its path, and the kind of each; layers of a kind are alike."""

    held: nn.ModuleList
    path: str
    kinds: tuple[int, ...]


def build_fake(config: Mapping[str, Any], precision: str, attention: str | None = None, capability: str = WITH_FLASH) -> Any:
    """Build a causal language model on meta, of a config as published, in a precision of the table for such a card.

    `attention` is an implementation as transformers names it: "sdpa", "eager", "flash_attention_2"; None for the model's default.

    Raises:
        ValueError: transformers has no class for this config, or no trace is made in this precision or with this attention.
    """
    row = PRECISIONS[precision]
    if not row.is_traceable:
        raise ValueError(f"no trace in {precision}: what its kernels allocate is not known")
    dtype = row.dtype_on(capability)
    flash = attention if attention and attention.startswith("flash_attention") else None
    chosen = {"attn_implementation": attention} if attention and not flash else {}
    read = read_model_config(config)
    model = construct(auto_class_of(read, None), read, getattr(torch, dtype), **chosen)
    if flash and not model._supports_flash_attn:
        raise ValueError(f"no trace with {flash}: {type(model).__name__} does not support it")
    if flash:  # without the package, which transformers looks for when it is asked for in the beginning
        model.config._attn_implementation = flash
    model.tie_weights()
    _keep_in_float32(model, dtype)
    if row.requires_checkpoint is not None:
        return _packed(model, config, precision, capability)
    if not isinstance(row.quantization, Mapping):
        return model
    compute = {"bnb_4bit_compute_dtype": dtype} if row.quantization.get("load_in_4bit") else {}
    asked = AutoQuantizationConfig.from_dict({**row.quantization, **compute})
    if isinstance(asked, FineGrainedFP8Config):
        return quantized_to_fp8(model, asked, getattr(torch, dtype))
    return _quantized(model, asked, dtype)


def _packed(model: Any, config: Mapping[str, Any], precision: str, capability: str) -> Any:
    """Replace what is stored packed, as it is after loading on a card of this compute capability."""
    if PRECISIONS[precision].requires_checkpoint == "MXFP4":
        return packed_to_mxfp4(model)
    layers = layers_of(model)
    return packed_for(model, config, precision, kernels_of(capability), layers.path if layers is not None else None)


def _keep_in_float32(model: Any, dtype: str) -> None:
    """Widen what the model's class keeps in float32 on loading: some of it in float16 alone, the rest in bfloat16 as well."""
    halves = {"float16": ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"), "bfloat16": ("_keep_in_fp32_modules_strict",)}
    patterns = [pattern for name in halves.get(dtype, ()) for pattern in getattr(model, name, None) or ()]
    for name, parameter in model.named_parameters():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):
            parameter.data = parameter.data.float()


def _quantized(model: Any, asked: Any, dtype: str) -> Any:
    """Replace the Linears that bitsandbytes takes, as its quantizer in transformers does before loading."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)
    quantized = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=asked).eval()
    for module in quantized.modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit") and module.bias is not None:
            module.bias.data = module.bias.data.to(getattr(torch, dtype))  # made in float32, loaded in the dtype
    return quantized


def place_on_card(model: Any) -> None:
    """Put every parameter and buffer of a model on meta on the fake card; a tensor that several modules share stays one."""
    placed: dict[int, tuple[Any, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in placed:
                placed[id(parameter)] = parameter, _placed(parameter, module)  # which keeps the number from being given again
            module._parameters[name] = placed[id(parameter)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD)


def _placed(parameter: Any, module: Any) -> nn.Parameter:
    """Return one parameter on the card. bitsandbytes' classes cannot be made of fake tensors: a plain one carries the parts."""
    kind = type(parameter).__name__
    if kind == "Int8Params":
        packed = nn.Parameter(torch.empty(parameter.shape, dtype=torch.int8, device=CARD), requires_grad=False)
        scales = torch.empty(parameter.shape[0], dtype=torch.float32, device=CARD)
        packed.CB, packed.SCB = packed.data, scales  # type: ignore[attr-defined]
        return packed
    if kind == "Params4bit":
        from bitsandbytes.functional import quantize_4bit

        values = torch.empty(parameter.shape, dtype=module.compute_dtype, device=CARD)
        nested, scheme = parameter.compress_statistics, parameter.quant_type
        data, state = quantize_4bit(values, blocksize=parameter.blocksize, compress_statistics=nested, quant_type=scheme)
        held = nn.Parameter(data, requires_grad=False)
        held.quant_state = state  # type: ignore[attr-defined]
        return held
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=CARD)
    return nn.Parameter(empty, requires_grad=False)


def layers_of(model: Any) -> Layers | None:
    """Find the decoder layers: as many modules in a list as the text config says; None where there is no such list."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _is_of_vision(path):
            types = getattr(config, "layer_types", None) or [None] * count
            kinds: dict[Any, int] = {}
            numbers = (kinds.setdefault((kind, _shape(layer)), len(kinds)) for kind, layer in zip(types, module, strict=True))
            return Layers(module, path, tuple(numbers))
    return None


def _is_of_vision(path: str) -> bool:
    return any(word in path for word in ("vision", "visual", "audio", "encoder."))


def _shape(layer: nn.Module) -> tuple[Any, ...]:
    """Say what a layer is made of: classes, and parameters by name and shape."""
    classes = tuple(type(module).__name__ for module in layer.modules())
    return classes, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def representatives(kinds: Sequence[int]) -> list[int]:
    """Choose the layers that stand for all: the first, and the last, of every kind."""
    last = {kind: index for index, kind in enumerate(kinds)}
    return sorted({kinds.index(kind) for kind in last} | set(last.values()))


_NUMBERED_BY = ("layer_idx", "layer_id", "layer_number")  # what layers call their own number in transformers


def keep(model: Any, layers: Layers, chosen: Sequence[int]) -> Layers:
    """Leave only the chosen layers in a model, numbered anew; what its config lists by layer is cut alike."""
    _cut_lists(model.config, len(layers.kinds), chosen)
    kept = [layers.held[index] for index in chosen]
    del layers.held[:]
    layers.held.extend(kept)
    for index, layer in enumerate(kept):
        for module, name in product(layer.modules(), _NUMBERED_BY):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, index)
    return Layers(layers.held, layers.path, tuple(layers.kinds[index] for index in chosen))


def _cut_lists(config: Any, count: int, chosen: Sequence[int]) -> None:
    """Cut every list of a config, and of those within it, that has as many entries as there are layers; their number as well."""
    text = config.get_text_config(decoder=True)
    for part in (config, text) if text is not config else (config,):
        for name, value in list(vars(part).items()):
            if isinstance(value, (list, tuple)) and len(value) == count and name not in _NOT_BY_LAYER:
                setattr(part, name, type(value)(value[index] for index in chosen))
    text.num_hidden_layers = len(chosen)


def linears_in_4_bits(model: Any) -> Counter[tuple[int, int]]:
    """Count the Linears that are held in 4 bits by (outputs, inputs)."""
    found = (module for module in model.modules() if type(module).__name__ == "Linear4bit")
    return Counter((module.out_features, module.in_features) for module in found)
