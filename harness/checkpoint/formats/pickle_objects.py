"""What the pickle of a `.bin` may mention, and how it is described: storages, views of them, and tensors that wrap others.

Sources: torch/_weights_only_unpickler.py for the names that torch lets through, torch/_utils.py for the calls that rebuild tensors;
what packages register by themselves is in the table of their row.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from harness.core.dtypes import DTYPE_BITS
from harness.core.methods import torchao

STORAGE_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class Storage(msgspec.Struct, frozen=True):
    """A run of bytes that tensors view; `dtype` is None if the tensor says it."""

    key: str
    dtype: str | None
    bytes: int


class View(msgspec.Struct, frozen=True):
    """A tensor as torch._utils rebuilds it."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    bytes: int


class Whole(msgspec.Struct, frozen=True):
    """A tensor of a package's own class, by its path, and the tensors that it wraps, by their names in it."""

    path: str
    parts: dict[str, View]


class Name(msgspec.Struct, frozen=True):
    """A global that a checkpoint may mention, as an inert name."""

    path: str


class Inert(msgspec.Struct, frozen=True):
    """An object that holds no tensor: a layout, a device, what a tensor keeps beside its parts."""

    path: str


ORDERED_DICT = Name("collections.OrderedDict")
REBUILD_V2 = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
REBUILD_V3 = "torch._utils._rebuild_tensor_v3"
REBUILD_PARAMETER = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
REBUILD_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
INERT = frozenset({"torch.serialization._get_layout", "torch.device", "torch.Size"})
_NARROW = (f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
ALLOWED = frozenset(
    {
        ORDERED_DICT.path,
        *REBUILD_V2,
        REBUILD_V3,
        *REBUILD_PARAMETER,
        REBUILD_WRAPPER,
        REBUILD_FROM_TYPE,
        *INERT,
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
        *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in STORAGE_DTYPES),
        *(f"torch.{name}" for name in (*DTYPE_BITS, *_NARROW)),
    }
)


def tensor_classes() -> frozenset[str]:
    """Return the names that packages register with torch: of classes of tensors, and of what these keep beside their parts."""
    return torchao.registered()
