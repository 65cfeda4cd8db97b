"""Trace every text model type of the installed transformers that has a causal language model, from a small config of its own.

    pytest -s -o python_files=oracle_*.py tests/oracle

Nothing here knows an architecture: sizes that a config's own defaults give are made small by the names that configs share.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES

from harness.core.records import Workload
from harness.worker.trace.direct import Traced, trace
from tests.support.reporting import Figure, Section, table

LEAST_SHARE = 0.95
LOAD = Workload(prompt_tokens=33, new_tokens=3, batch=2)
LAYERS, FEW = ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What some classes leave open, or leave out, and every published config says; filled in alike for all.
OPEN: dict[str, Any] = {
    "num_hidden_layers": FEW,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "num_experts": 8,
    "n_shared_experts": 1,
    "attn_layer_indices": [1],
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,  # no narrower than what is rotated of a head
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "clip_qkv": 8.0,
    "default_language": "en_XX",
    "rope_theta": 10000.0,
}


def few_layers(kind: str) -> dict[str, Any]:
    """Return the default config of a model type with few layers; what a config lists by layer is cut alike."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    said: dict[str, Any] = config.to_dict()
    inner = [part for part in said.values() if isinstance(part, dict) and "hidden_size" in part]
    inside = inner[0] if inner and text is not config else said
    for name, value in list(inside.items()):
        if name in LAYERS and isinstance(value, int):
            inside[name] = min(value, FEW)
        elif isinstance(value, list) and len(value) == count and count > FEW:
            inside[name] = value[:FEW]
    return said


def all_layers(kind: str) -> dict[str, Any]:
    """Return the default config of a model type: its class may refuse fewer layers."""
    said: dict[str, Any] = CONFIG_MAPPING[kind]().to_dict()
    return said


def filled(kind: str) -> dict[str, Any]:
    """Return the default config of a model type with what it leaves open filled in, in the configs within it as well."""
    return _filled(all_layers(kind))


def _filled(said: dict[str, Any]) -> dict[str, Any]:
    """Fill in sizes, a decoder where one is asked for, a layer of attention among those without, RoPE for each kind of layer."""
    inner = {name: _filled(part) for name, part in said.items() if isinstance(part, dict) and "model_type" in part}
    made = said | inner | {name: value for name, value in OPEN.items() if name in said and said[name] is None}
    if "is_decoder" in said:
        made |= {"is_decoder": True, "is_encoder_decoder": False}
    kinds = said.get("layer_types", ())
    if kinds is None or (kinds and "attention" not in {kind.removeprefix("full_") for kind in kinds}):
        count = said["num_hidden_layers"]
        made["layer_types"] = [*(kinds or ["full_attention"] * count)[: count - 1], "full_attention"]
    if kinds and said.get("rope_parameters") == {}:
        made["rope_parameters"] = dict.fromkeys(made["layer_types"], ROPE)
    return made


def completed(config: dict[str, Any], error: AttributeError) -> dict[str, Any]:
    """Return a config with what the model's code asked it for in vain; the error again if that is nothing that is known."""
    asked, name = error.obj, error.name
    key = getattr(asked, "base_config_key", "")
    part = config.get(key, config)
    if not isinstance(asked, PreTrainedConfig) or name not in OPEN or name in part:
        raise error
    more = part | {name: OPEN[name]}
    return more if part is config else config | {key: more}


def kinds() -> Iterator[str]:
    """Yield the model types that have a causal language model: text in, text out."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in CONFIG_MAPPING and kind not in MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES:
            yield kind


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"


def apart(kind: str) -> str | None:
    """Do `failure` in a process of its own, as code of torch's that gets a fake tensor for a real one may end all."""
    from_child, to_parent = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: to_parent.send(failure(kind)))
    child.start()
    to_parent.close()
    try:
        why: str | None = from_child.recv()
    except EOFError:
        child.join()
        return f"its process ended with status {child.exitcode}"
    child.join()
    return why


def failure(kind: str) -> str | None:
    """Trace a model type from the first of its small configs that can be; say why none can."""
    why = None
    # Some code mixes in float32 whatever the dtype of the weights, and runs in no other.
    for precision, derive in product(("bf16", "fp32"), (few_layers, all_layers, filled)):
        try:
            traced = _traced(derive(kind), precision)
        except Exception as error:  # noqa: BLE001 every kind of failure is what is counted here
            why = _told(error)
        else:
            return None if traced.peak_bytes > traced.weights_bytes > 0 else "nothing was counted"
    return why


def _traced(config: dict[str, Any], precision: str) -> Traced:
    while True:
        try:
            (traced,) = trace(config, precision, [LOAD])
        except AttributeError as error:
            config = completed(config, error)
        else:
            return traced


def test_nearly_every_text_architecture_is_traced(capsys: pytest.CaptureFixture[str], section: Section) -> None:
    """Count what is traced from a small config, and print why the others are not."""
    names = list(kinds())
    failed = dict[str, str]()
    with capsys.disabled():
        for number, kind in enumerate(names, start=1):
            why = apart(kind)
            if why is not None:
                failed[kind] = why
            print(f"{number} of {len(names)}, {kind}: {why or 'traced'}", flush=True)
        print(f"\ntransformers {transformers.__version__}: {len(names) - len(failed)} of {len(names)} model types traced")
        for kind, why in failed.items():
            print(f"  {kind}: {why}")
    what = f"text model types of transformers {transformers.__version__} that are traced from a small config"
    found = f"{len(names) - len(failed)}, {1 - len(failed) / len(names):.1%}"
    section.figures.append(Figure(what=what, found=found, wanted=f"{LEAST_SHARE:.0%}", rows=len(names)))
    section.notes.append(
        "\n".join(table(["not traced", "why"], [(f"`{kind}`", why.replace("|", "/")) for kind, why in failed.items()]))
    )
    assert len(names) - len(failed) >= LEAST_SHARE * len(names)
