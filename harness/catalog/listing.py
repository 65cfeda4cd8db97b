"""What is known of models without a network: a row for each, as `fitmatrix models` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.catalog import shipped
from harness.catalog.names import near_misses
from harness.catalog.resolve import Source, known_sources, shipped_id
from harness.checkpoint.quantization import packed
from harness.checkpoint.reader import context_length, stated_dtype
from harness.core.errors import UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Record


class KnownModel(Record, frozen=True, kw_only=True):
    """A model that can be planned and inspected offline; `form` is how its files hold the weights: "bf16", "gptq-int4"."""

    name: str
    hub_id: str | None  #: None for what is made here
    parameters: int
    context_length: int | None
    form: str


def known_models(wanted: str = "") -> list[KnownModel]:
    """List the models whose names, hub ids or forms hold every word of `wanted`, by name.

    Raises:
        UsageError: there is none.
    """
    rows = sorted(map(_row, known_sources()), key=lambda row: row.name)
    parts = wanted.casefold().split()
    found = [row for row in rows if all(part in f"{row.name} {row.hub_id} {row.form}".casefold() for part in parts)]
    if not found:
        near = near_misses(wanted, [row.name for row in rows])
        raise UsageError(f"no model that is known offline has {wanted!r} in its name, its hub id or its form: {near}")
    return found


def _row(source: Source) -> KnownModel:
    full = shipped_id(source)
    assert full is not None, "known_sources names what is shipped"
    entry = shipped.catalog()[full]
    return KnownModel(
        name=source.name,
        hub_id=source.hub_id,
        parameters=entry.parameters,
        context_length=context_length(entry.config),
        form=_form(entry.config),
    )


def _form(config: Mapping[str, Any]) -> str:
    """Name how weights are stored, by the row of PRECISIONS where there is one."""
    found = packed(config)
    if found is not None:
        return found.precision or found.name
    dtype = stated_dtype(config)
    return next((name for name, row in PRECISIONS.items() if row.linear_dtype == dtype), dtype)
