"""Where a model's skeleton comes from: shipped with the package, kept in a cache, or built once by a worker.

The reference is transformers on the meta device (`harness.worker.build_skeleton`). Skeletons of the catalog are shipped in
`data/skeletons.jsonl`, one line each under the fingerprint of its config; those of other models are built once and kept in a cache
directory. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec

from harness.architecture.ask_worker import NotMeasured, RefusedConfig, UnknownType, ask_worker
from harness.architecture.skeleton import Skeleton
from harness.catalog.shipped import catalog, hub_id
from harness.checkpoint.formats.files import OWN_CONFIG, quote
from harness.checkpoint.reader import CONFIG, Checkpoint
from harness.core.errors import CheckpointError, UsageError
from harness.core.families import is_native
from harness.core.text import as_written
from harness.data import DATA
from harness.machine.cache import cache_dir, keep, kept

BUILD_S = 120.0
# What skeletons in the cache are called; another number when they hold more than those of an earlier version did.
_KEPT = "skeleton4"

# fmt: off
# What never changes a name, a shape or the KV cache, and what it is: most configs of one architecture differ in these alone. Of a
# value of another kind transformers may make no model.
_SHAPELESS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((
        "groupsize", "initializer_range", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "pretraining_tp",
        "quantization_bit", "rms_norm_eps", "rope_local_base_freq", "rope_theta", "rotary_emb_base", "router_aux_loss_coef",
        "wbits",
    ), (int, float)),
    **dict.fromkeys((
        "bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id", "unk_token_id",
    ), (int, list, NoneType)),
    **dict.fromkeys(("_name_or_path", "dtype", "tokenizer_class", "torch_dtype", "transformers_version"), (str, NoneType)),
    **dict.fromkeys(("output_router_logits", "use_cache"), (bool,)),
    "architectures": (list, NoneType),
    "auto_map": (dict, NoneType),
    "quantization_config": (dict, NoneType),
}
# Nor do these, from 0 to 1: of others torch makes no dropout.
_PROBABILITIES = frozenset(("attention_dropout", "attn_pdrop", "embd_pdrop", "hidden_dropout", "resid_pdrop"))
# Nor does which of these functions an activation is.
ACTIVATIONS = frozenset(("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish", "tanh"))
# Where positions are computed, the context length has no tensor.
_ROTARY = frozenset((
    "deepseek_v2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "internlm2", "internlm3", "llama",
    "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
))
# fmt: on
# How the names of classes end that continue a text.
_DECODERS = ("ForCausalLM", "LMHeadModel")
# What transformers reads of a GGUF's metadata beside the keys of its architecture. A name decides between Llama and Mistral.
_SHAPING = frozenset(("general.architecture", "general.name", "general.alignment", "tokenizer.ggml.tokens"))


def fingerprint(config: Mapping[str, Any]) -> str:
    """Hash what a config says about names, shapes and the KV cache; 16 hex digits."""
    ignored = {key for key, value in config.items() if isinstance(value, _SHAPELESS.get(key, ()))}
    ignored |= {key for key in _PROBABILITIES if isinstance(share := config.get(key), int | float) and 0 <= share <= 1}
    ignored |= {key for key in ("hidden_act", "hidden_activation") if str(config.get(key)) in ACTIVATIONS}
    if str(config.get("model_type")) in _ROTARY:
        ignored.add("max_position_embeddings")
    if config.get("use_sliding_window") is False:
        ignored |= {"sliding_window", "max_window_layers"}
    rope = config.get("rope_parameters")
    if rope is None or (isinstance(rope, Mapping) and "partial_rotary_factor" not in rope):
        ignored.add("rope_parameters")
    if _has_default_heads(config):
        ignored.add("head_dim")
    if is_integer_chatglm2(config):
        ignored.discard("quantization_bit")
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def is_integer_chatglm2(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is that of ChatGLM2's or ChatGLM3's own integer files: its class is the one to say that it has none."""
    return bool(config.get("quantization_bit")) and "padded_vocab_size" in config


def _has_default_heads(config: Mapping[str, Any]) -> bool:
    """Tell whether a written head_dim says no more than its absence: transformers writes it into the configs that it saves."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("model_type") not in ("llama", "mistral") or not isinstance(hidden, int) or not isinstance(heads, int):
        return False
    return heads > 0 and config.get("head_dim") == hidden // heads


def stored_skeleton(read: Checkpoint, *, is_gguf: bool) -> tuple[Skeleton, str | None, UsageError | None]:
    """Return the skeleton of a config: shipped, built by transformers where it is installed, else guessed from the tensors.

    With it a note that says so, and what transformers says against the config where it builds none.

    Raises:
        CheckpointError: it is a model of another kind, which continues no text, or transformers makes none of its config.
    """
    known = shipped(read.config) if read.config and not is_gguf else None
    if known is not None:
        return known, None, None
    missing = _missing("torch", "transformers", *(["gguf"] if is_gguf else []))
    refused: UsageError | None = None if missing or is_gguf else _untyped(read.config)
    if not missing and refused is None:
        try:
            return _built(read, is_gguf), None, None
        except UsageError as error:
            is_coded = is_gguf or any(one.kind == "model" for one in read.remote_code)  # which may read it otherwise
            if isinstance(error, NotMeasured) or (isinstance(error, RefusedConfig) and not is_coded):
                raise _unmade(read.path, error) from None
            refused = error
    from harness.architecture.inferred_skeleton import infer_skeleton

    return infer_skeleton(read), f"planned from its tensors, less surely: {missing or refused}", refused


def of_config(config: Mapping[str, Any], where: str) -> Skeleton:
    """Return the skeleton of a config that lies alone in the folder `where`: shipped, or built by transformers.

    Raises:
        CheckpointError: it is a model of another kind, or transformers makes none of it.
        UsageError: transformers knows no such architecture, or is not installed.
    """
    known = shipped(config)
    if known is not None:
        return known
    if missing := _missing("torch", "transformers"):
        what = f"no model of the catalog has the shape of this {quote(str(config.get('model_type')))}"
        raise UsageError(f"{what}, and {missing} to build it: plan it where they are, by 'fitmatrix plan DIR/config.json'")
    try:
        return build(config, cache_dir())
    except (NotMeasured, RefusedConfig) as error:
        raise _unmade(where, error) from None


def _untyped(config: Mapping[str, Any]) -> UnknownType | None:
    """Say that transformers, of whatever version, knows no class of a config without a model type; None if it has one."""
    lacks = "gives no 'model_type'" if config else "is not there"
    return None if config.get("model_type") else UnknownType(f"{CONFIG} {lacks}, and transformers loads no model without")


def _unmade(where: str, error: UsageError) -> CheckpointError:
    """Return the error of a config of which transformers makes nothing that is measured, with its path."""
    way_out = f": {OWN_CONFIG}" if isinstance(error, RefusedConfig) else ""
    return CheckpointError(f"{where}/{CONFIG}", f"{error}{way_out}")


def _built(read: Checkpoint, is_gguf: bool) -> Skeleton:
    if not is_gguf:
        return build(read.config, cache_dir())
    return build_gguf(read.config, [(tensor.name, tensor.shape, tensor.dtype) for tensor in read.tensors], cache_dir())


def _missing(*packages: str) -> str | None:
    """Say which packages are not installed, None if all are."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def named(name: str) -> Skeleton:
    """Return the skeleton of a model of the catalog, by short name or hub id.

    Raises:
        UsageError: the catalog has no such model.
    """
    full = hub_id(name)
    found = shipped(catalog()[full].config)
    if found is None:
        raise UsageError(f"the skeleton of {full} is not shipped: run python -m harness.worker.build_skeleton --catalog")
    return found


def shipped(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton that is shipped for this config and the class that it names, if any. Decodes one line, nothing else."""
    lines = (DATA / "skeletons.jsonl").read_bytes()
    start = lines.find(b'["%s",' % fingerprint(config).encode())
    if start < 0:
        return None
    line = lines[start : lines.index(b"\n", start)]
    found = msgspec.json.decode(line, type=tuple[str, Skeleton])[1]
    return None if _names_other(config, found) else found


def at_hand(config: Mapping[str, Any], cache: Path) -> Skeleton | None:
    """Return the skeleton of a config where it takes no time: shipped, or built before and put into `cache`."""
    from importlib.metadata import PackageNotFoundError

    try:
        return shipped(config) or kept(cache / f"{_name(config)}.json", Skeleton)
    except PackageNotFoundError:  # without transformers
        return None


def build(config: Mapping[str, Any], cache: Path) -> Skeleton:
    """Return the skeleton of any config: shipped, from `cache`, or built by a worker (seconds) and put there.

    Raises:
        UsageError: transformers knows no such architecture (UnknownType), or cannot build it from this config.
    """
    found = shipped(config)
    if found is not None:
        return found
    return _cached(_name(config), cache, config, f"model_type {as_written(config.get('model_type'))}")


def build_gguf(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]], cache: Path) -> Skeleton:
    """Return the skeleton of a GGUF file from its header: metadata, and tensors as (name, shape, dtype).

    transformers makes a config of the metadata and a model of the config, in a worker; kept in `cache` as `build` does.

    Raises:
        UsageError: transformers does not load GGUF of this architecture or with these block types.
    """
    said = {key: value for key, value in metadata.items() if not key.startswith(("general.", "tokenizer.")) or key in _SHAPING}
    header = {"metadata": said, "tensors": tensors}
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{_KEPT}-{_version()}-gguf-{key}"
    return _cached(name, cache, {"header": header}, f"GGUF of {as_written(metadata.get('general.architecture'))}")


def _name(config: Mapping[str, Any]) -> str:
    named = "" if is_decoder(config) else f"-{hashlib.sha256(repr(config.get('architectures')).encode()).hexdigest()[:8]}"
    return f"{_KEPT}-{_version()}-{fingerprint(config)}{named}"


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Say whether a config names no class, or one that AutoModelForCausalLM would load by its name; the worker knows better."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return is_native(config) or not first or str(first).endswith(_DECODERS)


def _names_other(config: Mapping[str, Any], found: Skeleton) -> bool:
    """Say whether a config names another class than that of the skeleton, of which a shape alone says nothing."""
    return not is_decoder(config) and config["architectures"][0] != found.model_class


def _version() -> str:
    from importlib.metadata import version  # slow to import

    return version("transformers")


def _cached(name: str, cache: Path, asked: Mapping[str, Any], what: str) -> Skeleton:
    """Return what is kept under `name`, else what a worker answers, which is put there."""
    place = cache / f"{name}.json"
    found = kept(place, Skeleton)
    if found is not None:
        return found
    text = ask_worker("build_skeleton", asked, f"no skeleton for {what}", BUILD_S)
    keep(place, text)
    return msgspec.json.decode(text, type=Skeleton)
