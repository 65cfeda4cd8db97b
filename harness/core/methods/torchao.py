"""What torch unpickles of torchao's tensors, and which dtypes they multiply in, as both answered: `data/torchao_classes.json`.

`python -m tests.support.torchao_classes` asks a new release; a test holds the file against the one that is installed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

from harness.core.records import Record
from harness.data import DATA

_CONTAINERS = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")  # of configs, by the names of modules
UNDIVIDED: str = (
    "transformers 5.24 infers no device_map that divides weights which torchao quantized by the names of modules (a ValueError): "
    "take a map that is written out, --placement recommended"
)


class _Answers(Record, frozen=True, kw_only=True):
    """Names of classes as torch.save writes them, and kinds of configs."""

    version: str
    registered: frozenset[str]  #: that torch.load lets through with `weights_only`, once transformers has imported torchao
    kinds: frozenset[str]  #: of configs that a processor quantizes by: those that were asked
    any_dtype: frozenset[str]  #: of these, the ones whose weights multiply activations in other dtypes than they were made in
    any_dtype_once_cast: frozenset[str]  #: classes whose weights do, once they are cast
    cast: frozenset[str]  #: classes whose scales are cast with them


@cache
def _answers() -> _Answers:
    return msgspec.json.decode((DATA / "torchao_classes.json").read_bytes(), type=_Answers)


def registered() -> frozenset[str]:
    """Return the names that torch.load lets through with `weights_only`, once transformers has imported torchao."""
    return _answers().registered


def casts(path: str) -> bool:
    """Say whether transformers casts the scales of a tensor of this class, which a pickle holds as one object."""
    return path in _answers().cast


def binds(settings: Mapping[str, Any], classes: Collection[str]) -> bool:
    """Say whether weights leave the rest of the model no dtype but the one that they were quantized from.

    `classes` are those of the tensors that a pickle holds as one object, which transformers casts as a whole; it builds all others
    of their parts, in the dtype that was written.
    """
    if classes:
        return not _answers().any_dtype_once_cast.issuperset(classes)
    return not _answers().any_dtype.issuperset(_kinds(settings.get("quant_type")))


def undivided(settings: Mapping[str, Any]) -> str | None:
    """Say why transformers infers no map that puts parts of a model on several devices; None if it does.

    It splits the name of every buffer at its last dot, and there is none in a buffer of a module that is placed by itself
    (`quantizer_torchao.py`, `param_needs_quantization`).
    """
    given = settings.get("quant_type")
    inner = given.get("default") if isinstance(given, Mapping) else None
    by_name = isinstance(inner, Mapping) and inner.get("_type") in _CONTAINERS
    return UNDIVIDED if by_name else None


def config_class(settings: Mapping[str, Any]) -> str:
    """Name the class of torchao's config, as `TorchAoConfig.to_dict` writes it."""
    given = settings.get("quant_type")
    inner = given.get("default") if isinstance(given, dict) else None
    kind = inner.get("_type") if isinstance(inner, dict) else None
    return kind if isinstance(kind, str) and kind.isidentifier() and len(kind) <= 60 else "of unknown type"


def _kinds(said: Any) -> Iterator[str]:
    """Yield the kinds of configs in what `TorchAoConfig.to_dict` wrote."""
    if isinstance(said, Mapping):
        kind = said.get("_type")
        if isinstance(kind, str) and kind.endswith("Config") and kind not in _CONTAINERS:
            yield kind
        for inner in said.values():
            yield from _kinds(inner)
