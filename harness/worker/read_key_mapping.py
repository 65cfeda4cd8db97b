"""Read from a model of transformers how it brings the names in files to its own (`harness.architecture.key_mapping`)."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from harness.architecture.key_mapping import Conversion, Naming, Renaming

_RENAMINGS = (WeightRenaming, PrefixChange)


def naming(model: Any) -> Naming | None:
    """Return the naming of a model on the meta device; None if transformers renames by rules that are not known here."""
    steps = get_model_conversion_mapping(model)
    if any(type(step) not in (*_RENAMINGS, WeightConverter) for step in steps):
        return None
    buffers = [name for name, _ in model.named_buffers()]
    moved = {r"rotary_emb\.inv_freq": "rotary_emb.inv_freq", r"(^|\.)position_ids$": "position_ids"}
    old = [pattern for pattern, end in moved.items() if any(name.endswith(end) for name in buffers)]
    return Naming(
        prefix=model.base_model_prefix,
        renamings=tuple(_renaming(step) for step in steps if isinstance(step, WeightRenaming)),
        conversions=tuple(_conversion(step) for step in steps if isinstance(step, WeightConverter)),
        may_miss=tuple(sorted(model._keys_to_ignore_on_load_missing or ())),
        may_have=tuple(sorted({*(model._keys_to_ignore_on_load_unexpected or ()), *old})),
    )


def _renaming(step: Any) -> Renaming:
    return Renaming(**_match(step))


def _conversion(step: Any) -> Conversion:
    return Conversion(
        **_match(step),
        sources=tuple(step.source_patterns),
        targets=tuple(step.target_patterns),
        steps=tuple((type(one).__name__, int(getattr(one, "dim", 0))) for one in step.operations),
    )


def _match(step: Any) -> dict[str, Any]:
    scopes: tuple[str, ...] = ()
    if step.scope_prefix is not None:
        scope, base = (f"{prefix}." if prefix else "" for prefix in (step.scope_prefix, step.base_model_prefix))
        scopes = (base + scope, scope)
    return {"pattern": step.compiled_sources.pattern, "target": step.target_patterns[0], "scopes": scopes}
