"""Build skeletons from configs, on the meta device with transformers' own classes.

    python -m harness.worker.build_skeleton < config.json > skeleton.json
    python -m harness.worker.build_skeleton < {"header": {"metadata": ..., "tensors": [[name, shape, dtype], ...]}}
    python -m harness.worker.build_skeleton --catalog        # rewrites harness/data/skeletons.jsonl from harness/data/configs.json

The model is built as `from_pretrained` builds it, in bfloat16, so a tensor of any other dtype is one whose dtype the model fixes.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture import skeleton_source
from harness.architecture.ask_worker import CONFIG_REFUSED, NO_DECODER, UNKNOWN_TYPE, NotMeasured, RefusedConfig, UnknownType
from harness.architecture.key_mapping import Naming
from harness.architecture.skeleton import Attention, Block, Child, ParameterSpec, Skeleton
from harness.catalog import shipped
from harness.checkpoint.auxiliary_files import KERNEL_KEYS
from harness.data import DATA
from harness.models.cache_argument import kv_cache_of
from harness.worker.auto_class import auto_class_of
from harness.worker.config.refusal import CONTRADICTIONS, is_of_the_pass, sentence_of
from harness.worker.extra_architectures import WRITTEN, ExtraModel
from harness.worker.read_key_mapping import naming

MOST_GROWTH_BYTES = 4 << 30
_WAY_OUT = "correct 'model_type' in config.json, or try a newer transformers"
_STATUSES = {UnknownType: UNKNOWN_TYPE, NotMeasured: NO_DECODER, RefusedConfig: CONFIG_REFUSED}
T = TypeVar("T")
# How transformers can compute attention and experts, some by packages that are not here.
_IMPLEMENTATIONS = frozenset(("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys(), *ALL_EXPERTS_FUNCTIONS.valid_keys()))
_NOT_OF_THE_SHAPE = frozenset(("architectures", "quantization_config", "quantization_bit", "wbits"))


def build_skeleton(config: Mapping[str, Any], naming: Callable[[Any], Naming | None] = naming) -> Skeleton:
    """Build the skeleton of a causal language model; `naming` says how the names in its files become those of the model.

    Raises:
        UnknownType: transformers has no class for this config, nor is it described in `harness.worker.extra_architectures`.
        NotMeasured: it is no decoder.
        RefusedConfig: transformers makes no model of it, or one that multiplies nothing.
    """
    native = _translate(config)
    kind = str(native.get("model_type"))
    if kind in transformers.CONFIG_MAPPING:
        same = kind == config.get("model_type")  # else the model's own class loads the files, by names of its own
        read = _attempt(_read, native)
        auto = auto_class_of(read, _named(config) if same else None)
        model, attention = _attempt(lambda one: _with_attention(construct(auto, _read(one))), native)
        return _of_model(model, auto.__name__, naming if same else lambda _: None, attention)
    if kind not in WRITTEN:
        raise UnknownType(f"transformers {transformers.__version__} has no class for it{_nearest(kind)}: {_WAY_OUT}")
    with torch.device("meta"):
        model = WRITTEN[kind](native)
    return _of_written(model.to(torch.bfloat16))


def build_gguf_skeleton(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> Skeleton:
    """Build the skeleton of a GGUF file from its metadata and its tensors (name, shape, dtype).

    Raises:
        ValueError: transformers does not load this architecture, or one of the block types.
    """
    from harness.worker.gguf import metadata as gguf_metadata  # the gguf package is not needed for anything else here

    architecture = str(metadata.get("general.architecture"))
    return build_skeleton(gguf_metadata.config_of(metadata, tensors), partial(gguf_metadata.gguf_naming, architecture=architecture))


def _attempt(step: Callable[[Mapping[str, Any]], T], config: Mapping[str, Any]) -> T:
    """Return what a step of transformers' own makes of a config. Raises RefusedConfig, which says in a sentence why it does not."""
    try:
        return step(config)
    except CONTRADICTIONS as error:
        raise RefusedConfig(sentence_of(error, config, step)) from error


def _with_attention(model: Any) -> tuple[Any, list[Attention]]:
    """Return a model and what its layers keep. Raises TypeError for what is no number, which ends in an error as it generates."""
    attention = _attention(model)
    kept = (getattr(layer, name) for layer in attention for name in Attention.__struct_fields__)
    if wrong := [one for one in kept if not isinstance(one, int | None)]:
        raise TypeError(f"layers keep {wrong[0]!r}")
    return model, attention


def _nearest(kind: str) -> str:
    """Name the model types that are written nearly so."""
    close = difflib.get_close_matches(kind, [*transformers.CONFIG_MAPPING, *WRITTEN], n=3)
    return f", but for {' and '.join(map(repr, close))}" if close else ""


def _translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a published config the names of the native class that holds the same model, with weights that are not packed."""
    kind = config.get("model_type")
    config = _without_code(config)
    dropped = _NOT_OF_THE_SHAPE - {"quantization_bit"} if skeleton_source.is_integer_chatglm2(config) else _NOT_OF_THE_SHAPE
    rest = {key: value for key, value in config.items() if key not in dropped}
    if kind == "internlm3":
        biases = {"attention_bias": config.get("qkv_bias", False), "mlp_bias": config.get("bias", False)}
        return rest | biases | {"model_type": "llama"}
    return rest


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what would have transformers run code that came with the model, at every level, or use what only others have."""
    kept = {
        key: value
        for key, value in config.items()
        if key != "auto_map" and not (KERNEL_KEYS.fullmatch(str(key)) and _is_kernel(value))
    }
    return {key: _without_code(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _is_kernel(value: Any) -> bool:
    """Say whether transformers has such an implementation of attention, or takes it for one of the hub, as does each of a table."""
    choices = value.values() if isinstance(value, dict) else (value,)
    return all(isinstance(one, str) and ("/" in one or one in _IMPLEMENTATIONS) for one in choices)


def limit_memory() -> None:
    """Let this process grow by what no real architecture needs, so that a hostile config ends it and not the machine."""
    if sys.platform == "linux":
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = held + MOST_GROWTH_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def read_model_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' config of a published one, read as a file is read, for the class that holds the same model."""
    return _read(_translate(config))


def _read(native: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(native))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, return_dict=True)  # or layers cannot read each other


def construct(auto: Any, config: Any, dtype: torch.dtype = torch.bfloat16, **chosen: Any) -> Any:
    """Build the model that an Auto class chooses for a config, on meta."""
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=False, **chosen).eval()


def _named(config: Mapping[str, Any]) -> str | None:
    """Return the class that a config.json names first."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def _of_model(
    model: Any,
    auto: str = "AutoModelForCausalLM",
    naming: Callable[[Any], Naming | None] = naming,
    attention: Sequence[Attention] | None = None,
) -> Skeleton:
    config = model.config.get_text_config()
    tied = dict(model.all_tied_weights_keys)
    keep = {"fp16": model._keep_in_fp32_modules or (), "half": model._keep_in_fp32_modules_strict or ()}
    kept = _not_converted(model, tied, model.get_output_embeddings()) | set(keep["fp16"])
    attention = _attention(model) if attention is None else attention
    kinds = tuple(dict.fromkeys(attention))
    return Skeleton(
        model_class=type(model).__name__,
        model_type=model.config.model_type,
        auto_class=auto,
        source=f"transformers {transformers.__version__}",
        blocks=_Packer(tied, kept, keep).pack(model),
        no_split=tuple(sorted(model._no_split_modules or ())),
        tied=tied,
        not_converted=tuple(sorted(kept)),
        attention=kinds,
        layers=tuple(kinds.index(layer) for layer in attention),
        hidden_size=config.hidden_size,
        intermediate_size=_first(config, "intermediate_size", "n_inner") or 4 * config.hidden_size,
        heads=_first(config, "num_attention_heads") or 0,
        vocab_size=config.vocab_size,
        experts=_first(config, "num_local_experts", "num_experts", "n_routed_experts") or 0,
        experts_per_token=_first(config, "num_experts_per_tok") or 0,
        eager=model.config._attn_implementation == "eager",
        naming=naming(model),
    )


def _of_written(model: ExtraModel) -> Skeleton:
    config = model.config
    kept = _not_converted(model, model.tied, None)
    return Skeleton(
        model_class=type(model).__name__,
        model_type=config["model_type"],
        source="description",
        blocks=_Packer(model.tied, kept, {}).pack(model),
        no_split=(model.no_split,),
        tied=model.tied,
        not_converted=tuple(sorted(kept)),
        attention=(Attention(heads=model.kv[0], key_dim=model.kv[1], value_dim=model.kv[2]),),
        layers=(0,) * (config.get("num_layers") or config["num_hidden_layers"]),
        hidden_size=config["hidden_size"],
        intermediate_size=config.get("inner_hidden_size") or config["intermediate_size"],
        heads=config["num_attention_heads"],
        vocab_size=config["vocab_size"],
    )


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        try:
            value: int | None = getattr(config, name, None)
        except RuntimeError:  # a config that varies by layer refuses to name one value
            continue
        if value is not None:
            return value
    return None


def _not_converted(model: nn.Module, tied: Mapping[str, str], head: nn.Module | None) -> set[str]:
    """Name what quantizers leave alone: tied weights, the last parameter, the output embedding."""
    names = {*tied, *tied.values(), [name for name, _ in model.named_parameters(remove_duplicate=False)][-1]}
    names |= {name for name, module in model.named_modules() if module is head}
    return {name.removesuffix(".weight") for name in names}


def _attention(model: Any) -> list[Attention]:
    """Push one token through the empty model and look at the shapes that its KV cache took.

    Raises:
        RuntimeError, TypeError, ValueError: what the config says ends in an error as the model generates.
    """
    config = model.config.get_text_config()
    token, wrong = torch.ones((1, 1), dtype=torch.long, device="meta"), None
    for decoder in (model, model.get_decoder()):
        try:
            with torch.no_grad():
                out = decoder(input_ids=token, use_cache=True)
        except (RuntimeError, TypeError, ValueError) as error:
            wrong = None if is_of_the_pass(error, decoder) else error
            continue
        return [_layer(layer, config) for layer in getattr(kv_cache_of(out), "layers", ())]
    if wrong is not None:
        raise wrong
    return [_of_config(config)] * config.num_hidden_layers


def _of_config(config: Any) -> Attention:
    width = _first(config, "head_dim") or config.hidden_size // config.num_attention_heads
    heads = _first(config, "num_key_value_heads") or config.num_attention_heads
    return Attention(heads=heads, key_dim=width, value_dim=width, window=_first(config, "sliding_window"))


def _layer(layer: Any, config: Any) -> Attention:
    states = [part for name in ("conv_states", "recurrent_states") for part in tensors_in(getattr(layer, name, None))]
    wide = sum(part.numel() for part in states if part.dtype == torch.float32)  # the model is in bfloat16
    state = sum(part.numel() for part in states) - wide
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return Attention(state=state, float32_state=wide)
    return Attention(
        heads=keys.shape[1],
        key_dim=keys.shape[-1],
        value_dim=values.shape[-1],
        window=getattr(layer, "sliding_window", None),
        state=state,
        float32_state=wide,
        expanded=_expanded(config) if keys.shape[1] == 1 else None,
    )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested tables and lists, as caches keep them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def _expanded(config: Any) -> int | None:
    """Width per token of the keys and values that multi-head latent attention computes from its cache."""
    if not _first(config, "kv_lora_rank"):
        return None
    width: int = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return width


class _Packer:
    """Turns a module tree into blocks, equal ones once."""

    def __init__(self, tied: Mapping[str, str], kept: set[str], keep_fp32: Mapping[str, Any]) -> None:
        self.tied = tied
        self.kept = kept
        self.keep_fp32 = keep_fp32
        self.blocks: dict[Block, int] = {}
        self.seen: set[int] = set()

    def pack(self, root: nn.Module) -> tuple[Block, ...]:
        self._block(root, "")
        return tuple(self.blocks)

    def _block(self, module: nn.Module, path: str) -> int:
        prefix = f"{path}." if path else ""
        tensors = tuple(self.tensors_in(module, prefix))
        children = _runs([(name, self._block(child, f"{prefix}{name}")) for name, child in module.named_children()])
        linear = "conv1d" if isinstance(module, Conv1D) else "linear" if type(module) is nn.Linear else None
        exempt = linear is not None and any(_matches(pattern, path) for pattern in self.kept)
        block = Block(class_name=type(module).__name__, tensors=tensors, children=children, linear=linear, exempt=exempt)
        return self.blocks.setdefault(block, len(self.blocks))

    def tensors_in(self, module: nn.Module, prefix: str) -> Iterator[ParameterSpec]:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            # A parameter that two modules share is stored once; a tied one is named twice, and `tied` says so.
            if f"{prefix}{name}" in self.tied:
                yield self._tensor(prefix, name, parameter, "parameter")
            elif id(parameter) not in self.seen:
                self.seen.add(id(parameter))
                yield self._tensor(prefix, name, parameter, "parameter")
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield self._tensor(prefix, name, buffer, "unsaved" if name in module._non_persistent_buffers_set else "buffer")

    def _tensor(self, prefix: str, name: str, tensor: torch.Tensor, kind: str) -> ParameterSpec:
        dtype = None if tensor.dtype == torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")
        patterns = [(when, pattern) for when in ("half", "fp16") for pattern in self.keep_fp32.get(when, ())]
        fp32 = next((when for when, pattern in patterns if re.search(pattern.replace("*", ".*"), f"{prefix}{name}")), None)
        return ParameterSpec(name=name, shape=tuple(tensor.shape), kind=kind, dtype=dtype, fp32=fp32)


def _matches(pattern: str, path: str) -> bool:
    """Say whether a quantizer's exception covers a module: from the start to a dot, or as a suffix."""
    return path.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", path) is not None


def _runs(children: list[tuple[str, int]]) -> tuple[Child, ...]:
    """Write equal children with consecutive numbers as one."""
    runs: list[Child] = []
    for name, block in children:
        last = runs[-1] if runs else None
        if last and last.block == block and last.name.isdecimal() and name == str(int(last.name) + last.count):
            runs[-1] = Child(name=last.name, block=block, count=last.count + 1)
        else:
            runs.append(Child(name=name, block=block))
    return tuple(runs)


def write_catalog() -> None:
    """Rebuild every skeleton that is shipped, one line each, in the order of the catalog."""
    lines = {}
    for entry in shipped.catalog().values():
        key = skeleton_source.fingerprint(entry.config)
        if key not in lines:
            lines[key] = msgspec.json.encode([key, build_skeleton(entry.config)])
    (DATA / "skeletons.jsonl").write_bytes(b"".join(line + b"\n" for line in lines.values()))


def main() -> None:
    """Read a config or the header of a GGUF from the standard input, or rebuild the catalog."""
    if sys.argv[1:] == ["--catalog"]:
        write_catalog()
        return
    limit_memory()
    asked = json.load(sys.stdin)
    try:
        built = build_gguf_skeleton(**asked["header"]) if "header" in asked else build_skeleton(asked)
    except tuple(_STATUSES) as error:
        print(error, file=sys.stderr)
        sys.exit(_STATUSES[type(error)])
    sys.stdout.buffer.write(msgspec.json.encode(built))


if __name__ == "__main__":
    main()
