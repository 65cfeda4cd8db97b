"""A model in other forms: what it would take stored so, where that is published, and which forms pack a mixture's experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from msgspec.structs import replace

from harness.architecture import skeleton
from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import is_stacked
from harness.architecture.stored.packed_check import with_experts
from harness.catalog import shipped
from harness.checkpoint import quantization
from harness.checkpoint.quantization import Packed
from harness.core.methods.table import METHODS
from harness.core.precisions import PRECISIONS, Precision
from harness.core.quantizers import SCHEMES
from harness.core.units import format_count, significant

# Below this share of the weights nobody would wonder.
_WORTH_A_WORD = 0.1
_PACKED_NAME = r"([-_.](gptq|awq|int[48]|[48]bit|fp8|mxfp4))+"


def stored_for(spec: ModelSpec, precision: Precision) -> ModelSpec | None:
    """Return the spec of the same model as a precision reads it; None if it is stored packed already, or any form will do."""
    if spec.stored_as is not None or precision.requires_checkpoint is None:
        return None
    form = quantization.form_for(precision, spec.config or {"model_type": spec.skeleton.model_type})
    return in_form(spec, with_experts(form, spec.skeleton)) if form is not None else None


@lru_cache(maxsize=16)
def in_form(spec: ModelSpec, form: Packed) -> ModelSpec:
    """Return the spec of the same model as it would be if it were stored in another form."""
    size = skeleton.packed_model_bytes(spec.skeleton, form)
    dtype = form.method.held if form.method else spec.stored_dtype
    return replace(spec, packed=form, tensor_bytes=None, checkpoint_bytes=size, stored={dtype: size}, repeated=frozenset())


def published_in(spec: ModelSpec, precision: Precision) -> list[str]:
    """Return the hub ids of the catalog that hold a model in the form that a precision reads, by their names."""
    name = spec.source.rpartition("/")[2]
    alike = re.compile(rf"(.*/)?{re.escape(name)}{_PACKED_NAME}", re.IGNORECASE)
    named = (hub_id for hub_id in shipped.catalog() if alike.fullmatch(hub_id))
    found = ((hub_id, quantization.packed(shipped.catalog()[hub_id].config)) for hub_id in named)
    return [hub_id for hub_id, packed in found if packed is not None and packed.precision == precision.name]


def published_wide(spec: ModelSpec) -> str | None:
    """Return the hub id of the catalog that holds a model unpacked which is stored packed, by their names; None if none does."""
    name = spec.source.rpartition("/")[2]
    wide = re.sub(rf"{_PACKED_NAME}$", "", name, flags=re.IGNORECASE).casefold()
    if spec.stored_as is None or wide == name.casefold():
        return None
    named = (hub_id for hub_id in shipped.catalog() if hub_id.rpartition("/")[2].casefold() == wide)
    return next((hub_id for hub_id in named if quantization.packed(shipped.catalog()[hub_id].config) is None), None)


def left_wide(spec: ModelSpec, precisions: Iterable[str]) -> str | None:
    """Say why the quantizing ones of these precisions take more than their bits of a mixture of experts; None if they do not.

    transformers 5 stacks the experts of a layer in one tensor that is no Linear, which most quantizers pass over.
    """
    rows = [PRECISIONS[name] for name in dict.fromkeys(precisions)]
    wide = [row for row in rows if row.scheme is not None and not SCHEMES[row.scheme].experts]
    counted = [(weight, weight.elements * count) for weight, count in spec.skeleton.tally if not weight.tied_to]
    experts = sum(elements for weight, elements in counted if is_stacked(weight))
    total = sum(elements for _, elements in counted)
    if not wide or spec.stored_as is not None or experts < _WORTH_A_WORD * total:
        return None
    libraries = list(dict.fromkeys(SCHEMES[row.scheme].library for row in wide if row.scheme))
    leave = "leaves in 16 bits under transformers 5" if len(libraries) == 1 else "leave in 16 bits under transformers 5"
    said = ", ".join(f"{row.name} {significant(_mean_bits(row, experts, total))}" for row in wide)
    what = f"{format_count(experts)} of {format_count(total)} parameters are experts, which {' and '.join(libraries)} {leave}"
    return f"{what}; bits a weight: {said}. {packing_experts()}"


def _mean_bits(row: Precision, experts: int, total: int) -> float:
    """Return how many bits a weight takes in the mean, if all but the experts were packed."""
    return (16 * experts + row.bits * (total - experts)) / total


def packing_experts() -> str:
    """Say which forms pack experts, and where."""
    made = next(row for row in PRECISIONS.values() if row.scheme is not None and SCHEMES[row.scheme].experts)
    own = next(row for row in METHODS.values() if row.packs_experts and row.only_of is not None)
    return (
        f"Experts are packed by --precision {made.name} (GPUs of compute capability {made.min_compute_capability} or higher), "
        f"and in checkpoints that are stored as {made.name.upper()} or, of GPT-OSS, as {own.title} ({own.packs_from} or higher)."
    )
