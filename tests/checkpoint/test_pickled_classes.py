"""Tensors of torchao's own classes in a `.bin`: described as torch loads them with `weights_only`, and refused where it refuses."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from harness.checkpoint import reader
from harness.core.errors import CheckpointError

TENSOR: Any = torch.Tensor
WRAPPER, BESIDE = "torchao.quantization.Int8Tensor", "torchao.quantization.granularity.PerRow"


class Wrapper(torch.Tensor):
    """A tensor that wraps others, as torchao's do."""

    def __new__(cls, **_: Any) -> Any:
        return TENSOR._make_wrapper_subclass(cls, (8, 4), dtype=torch.bfloat16)

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> None:
        return None

    __torch_function__: Any = torch._C._disabled_torch_function_impl


class Beside:
    """What a tensor keeps beside its parts."""

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand where torchao's classes are, so that torch writes and reads their names, whether it is installed or not."""
    for module in ("torchao", "torchao.quantization", "torchao.quantization.granularity"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with torch.serialization.safe_globals([stand_in(WRAPPER, Wrapper), stand_in(BESIDE, Beside)]):
        yield


def stand_in(path: str, base: type) -> Any:
    """Put a class where a package has one of that name."""
    module, _, name = path.rpartition(".")
    vars(sys.modules[module])[name] = type(name, (base,), {"__module__": module})
    return vars(sys.modules[module])[name]


def made(path: str, *arguments: Any, **parts: Any) -> Any:
    module, _, name = path.rpartition(".")
    return vars(sys.modules[module])[name](*arguments, **parts)


def weight(**beside: Any) -> Any:
    return made(WRAPPER, qdata=torch.ones(8, 4, dtype=torch.int8), scale=torch.ones(8, 1), **beside)


def written(folder: Path, state: Any) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "beside", [{}, {"block_size": [1, 4], "zero_point": None}, {"target_dtype": torch.bfloat16}, {"granularity": 3}]
)
def test_the_parts_are_those_that_torch_loads(beside: dict[str, Any], tmp_path: Path) -> None:
    beside = {key: made(BESIDE, value) if key == "granularity" else value for key, value in beside.items()}
    written(tmp_path, {"layer.weight": weight(**beside), "norm.weight": torch.ones(4)})
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert isinstance(loaded["layer.weight"], Wrapper)
    parts = {f"layer._weight_{name}": part for name, part in vars(loaded["layer.weight"]).items() if isinstance(part, torch.Tensor)}
    found = {tensor.name: tensor for tensor in reader.read(tmp_path).tensors}
    assert set(found) == {*parts, "norm.weight"}
    for name, part in parts.items():
        assert (found[name].shape, f"torch.{found[name].dtype}") == (tuple(part.shape), str(part.dtype))
        assert (found[name].whole, found[name].whole_class) == ("layer.weight", WRAPPER)


def test_a_weight_that_two_names_share_counts_once(tmp_path: Path) -> None:
    shared = weight()
    read = reader.read(written(tmp_path, {"embed.weight": shared, "head.weight": shared}))
    assert {tensor.whole for tensor in read.tensors} == {"embed.weight", "head.weight"}
    assert read.bytes == 8 * 4 + 8 * 4


# ---- hostile ---------------------------------------------------------------------------------------------------------------


class Call:
    """What pickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def unregistered() -> Any:
    """Make a wrapper whose class its package does not register."""
    stand_in("torchao.quantization.Unregistered", Wrapper)
    return made("torchao.quantization.Unregistered", qdata=torch.ones(8, 4))


HOSTILE: dict[str, Callable[[], Any]] = {
    "a class that is not registered": unregistered,
    "code beside the parts": lambda: weight(block_size=Call(os.system, "true")),
    "code as the class": lambda: Call(
        torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_wrapper_subclass, os.system, (), {}
    ),
    "code as what rebuilds it": lambda: Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, ("true",), {}),
    "code as an argument": lambda: Call(type(made(BESIDE, 1)), Call(os.system, "true")),
    "a builtin": lambda: weight(block_size=Call(getattr, "text", "join")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_torch_refuses_is_refused_and_nothing_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {"layer.weight": HOSTILE[kind](), "norm.weight": torch.ones(4)})
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it ran"))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    with pytest.raises(CheckpointError, match="nothing was executed"):
        reader.read(tmp_path)


def test_no_depth_of_calls_is_left_to_the_file(tmp_path: Path) -> None:
    rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    data = b"\x80\x02}X\x01\x00\x00\x00a" + rebuild + b"(" * 2000 + (rebuild + b"ctorch\nTensor\n)}t") * 2000 + b"Rs."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError):
        reader.read(tmp_path)
