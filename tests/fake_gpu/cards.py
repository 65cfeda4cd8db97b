"""Cards for a worker: torch.cuda says that they are there, tensors on them are fake, and real ones on the CPU hold their values.

FAKE_CARDS="8,12" are two cards of 8 and 12 GiB. What goes beyond a card, or beyond what --vram leaves of it, is out of memory. The
modes that make tensors fake belong to a thread, so nothing may be loaded by another: HF_DEACTIVATE_ASYNC_LOAD is set.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate.big_modeling
import accelerate.utils.imports
import pynvml
import safetensors
import torch
import torch._subclasses.fake_tensor as fake_tensor
import transformers.core_model_loading
import transformers.utils.import_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from harness.architecture.card_kernels import kernels_of
from harness.worker.trace import kernels, ledger
from harness.worker.trace.ledger import Ledger

aten = torch.ops.aten
_OWN_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_A100 = kernels_of("8.0")


def _flash(query: Any, key: Any, value: Any, _dropout: float = 0.0, causal: bool = False, _mask: bool = False, **given: Any) -> Any:
    grouped = query.shape[1] != key.shape[1]
    return [_OWN_ATTENTION(query, key, value, is_causal=causal, scale=given.get("scale"), enable_gqa=grouped)]


def _efficient(
    query: Any, key: Any, value: Any, bias: Any, _sums: bool, _dropout: float = 0.0, causal: bool = False, **given: Any
) -> Any:
    return [_OWN_ATTENTION(query, key, value, attn_mask=bias, is_causal=causal, scale=given.get("scale"))]


def _counts(values: Any, *given: Any, **named: Any) -> Any:
    """Count whole numbers as CUDA does; a processor counts floating-point ones alone."""
    return aten.histc.default(values.float(), *given, **named).to(values.dtype)


# Kernels that the processor lacks, for values.
_VALUES: dict[Any, Callable[..., Any]] = {
    aten.histc.default: _counts,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
}


class Cards(Ledger):
    """A ledger of several cards, with the values of everything on them, that refuses what does not fit."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__({})
        self.sizes, self.current = list(sizes), 0
        self.room = dict(enumerate(sizes))

    def on(self, counted: dict[torch.device, int], device: Any = None) -> int:
        """Return what is counted of one card."""
        return counted[torch.device("cuda", self.index(device))]

    def index(self, device: Any = None) -> int:
        """Return the number of the card that torch.cuda's functions mean by `device`."""
        if device is None:
            return self.current
        return device if isinstance(device, int) else torch.device(device).index or 0

    def _note(self, tensor: torch.Tensor, operator: str) -> None:
        device = tensor.device
        before = self.peak[device]
        super()._note(tensor, operator)
        if device.type == "cuda" and self.live[device] > self.room[device.index]:
            self.peak[device] = before
            asked, room = tensor.untyped_storage().nbytes(), self.room[device.index]
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {asked} bytes. GPU {device.index} has {room} bytes."
            )

    def _shadow(self, func: Any, args: Any, kwargs: Any, made: list[FakeTensor]) -> None:
        if not made:
            return
        real_args, real_kwargs = tree_map(self._as_real, (args, kwargs))
        with unset_fake_temporarily(), torch.no_grad():
            got = _VALUES.get(func, func)(*real_args, **real_kwargs)
        for leaf, real in zip(made, [leaf for leaf in tree_leaves(got) if isinstance(leaf, torch.Tensor)], strict=False):
            self._shadows[leaf] = real


class _Numbered(ledger._Indexed):
    """Takes the bare number of a card for the card, as a torch with CUDA does, in Module.to as well."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn._parse_to:
            args = tuple(map(ledger._indexed, args))
        return super().__torch_function__(func, types, args, kwargs)


def put_in() -> None:
    """Put the cards of FAKE_CARDS into this process, for as long as it lives; once."""
    if _PUT_IN:
        return
    found = Cards(pynvml.SIZES)
    _PUT_IN.append(found)
    stack = contextlib.ExitStack()
    ledger.lend_guard()
    attention = kernels.AttentionCall(found, _A100, whole=False)
    stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
    for owner, name, value in (*_cuda(found), *_libraries()):
        stack.enter_context(mock.patch.object(owner, name, value, create=True))
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # modes belong to a thread
    _forget_what_was_asked()
    stack.enter_context(ledger.taken_for_real())
    for mode in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), found, _Numbered(found)):
        stack.enter_context(mode)
    _PUT_IN.append(stack)


_PUT_IN: list[Any] = []
_PEAKS = ("allocated_bytes.all.peak", "reserved_bytes.all.peak")


def _cuda(cards: Cards) -> Iterator[tuple[Any, str, Any]]:
    """Yield what torch.cuda says of the cards."""

    def facts(device: Any = None) -> SimpleNamespace:
        name, total = pynvml.name(cards.index(device)), cards.sizes[cards.index(device)]
        return SimpleNamespace(name=name, total_memory=total, major=8, minor=0, multi_processor_count=108, is_integrated=False)

    def limit(share: float, device: Any = None) -> None:
        index = cards.index(device)
        cards.room[index] = int(share * cards.sizes[index])

    def free(device: Any = None) -> tuple[int, int]:
        total = cards.sizes[cards.index(device)]
        return total - cards.on(cards.live, device), total

    def reset(device: Any = None) -> None:
        at = torch.device("cuda", cards.index(device))
        cards.peak[at] = cards.live[at]

    @contextlib.contextmanager
    def current(device: Any) -> Iterator[None]:
        before, cards.current = cards.current, cards.index(device)
        try:
            yield
        finally:
            cards.current = before

    live, peak = (lambda device=None: cards.on(cards.live, device)), (lambda device=None: cards.on(cards.peak, device))
    functions: dict[str, Any] = {
        **dict.fromkeys(("is_available", "_is_compiled", "is_initialized"), lambda: True),
        **dict.fromkeys(("init", "_lazy_init", "empty_cache"), lambda: None),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), live),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), peak),
        "device_count": lambda: len(cards.sizes),
        "current_device": lambda: cards.current,
        "synchronize": lambda device=None: None,  # noqa: ARG005 torch's interface
        "get_device_properties": facts,
        "get_device_capability": lambda device=None: (8, 0),  # noqa: ARG005
        "get_device_name": lambda device=None: pynvml.name(cards.index(device)),
        "is_bf16_supported": lambda *_, **__: True,
        "set_device": lambda device: setattr(cards, "current", cards.index(device)),
        "mem_get_info": free,
        "memory_stats": lambda device=None: dict.fromkeys(_PEAKS, peak(device)),  # type: ignore[no-untyped-call]  # torch.cuda types nothing
        "reset_peak_memory_stats": reset,
        "set_per_process_memory_fraction": limit,
        "device": current,
    }
    yield from ((torch.cuda, function, value) for function, value in functions.items())
    yield torch.version, "cuda", "13.0"
    yield torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")  # noqa: ARG005
    yield torch.accelerator, "is_available", lambda: True
    yield torch._C, "_cuda_getDevice", lambda: cards.current
    yield torch._C, "_cuda_getCurrentRawStream", lambda _: 0  # which bitsandbytes looks for when it is imported


def _libraries() -> Iterator[tuple[Any, str, Any]]:
    """Yield what the libraries do differently with fake tensors: files are read outside of the modes, as in another thread."""
    made = fake_tensor.FakeTensor.__new__

    def remade(cls: Any, *given: Any, **named: Any) -> Any:
        """Make a parameter where accelerate makes one anew by the class of the old."""
        if given and isinstance(given[0], torch.Tensor):
            return torch.nn.Parameter(given[0], requires_grad=bool(named.get("requires_grad", False)))
        return made(cls, *given, **named)

    yield fake_tensor.FakeTensor, "__new__", staticmethod(remade)
    yield fake_tensor, "init_gpu_context", lambda _: None
    yield fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda _: True)
    yield torch.nn.Module, "to", _module_to
    yield transformers.core_model_loading, "_materialize_copy", _materialize_copy
    yield accelerate.big_modeling, "init_on_device", _init_on_device
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("accelerate", "transformers", "safetensors") and vars(module).get("safe_open") is _OPEN:
            yield module, "safe_open", File


_OPEN = safetensors.safe_open
_MODULE_TO = torch.nn.Module.to
_INIT_ON_DEVICE = accelerate.big_modeling.init_on_device


def _module_to(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
    """Move only the buffers where all parameters are in place: fake ones torch swaps even then, and cannot."""
    wanted = ledger._indexed(given[0]) if len(given) == 1 and not named else None
    settled = isinstance(wanted, (str, torch.device)) and {one.device for one in module.parameters()} == {torch.device(wanted)}
    if not settled:
        return _MODULE_TO(module, *given, **named)
    for part in module.modules():
        part._buffers = {name: None if buffer is None else buffer.to(wanted) for name, buffer in part._buffers.items()}
    return module


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _materialize_copy(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        with _outside():
            tensor = tensor[...]
    moved: torch.Tensor = tensor.to(device=device, dtype=dtype)
    return moved


@contextlib.contextmanager
def _init_on_device(device: Any, include_buffers: bool | None = None) -> Iterator[None]:
    with _disable_current_modes(), _INIT_ON_DEVICE(device, include_buffers):
        yield


class File:
    """A safetensors file that is read for real and on the CPU; what goes to a card goes there as a fake."""

    def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **given: Any) -> None:
        self._device = device
        self._file: Any  # safetensors' class is not typed
        with _outside():
            self._file = _OPEN(filename, framework=framework, device="cpu", **given)

    def __enter__(self) -> File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def keys(self) -> Sequence[str]:
        """Return the names of the tensors."""
        names: Sequence[str] = self._file.keys()
        return names

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return one tensor on the device that was asked for."""
        with _outside():
            tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor if str(self._device) == "cpu" else tensor.to(self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors on the device that was asked for."""
        return {name: self.get_tensor(name) for name in self.keys()}


def _forget_what_was_asked() -> None:
    """Have the libraries ask again whether there is a card."""
    for module in (transformers.utils.import_utils, accelerate.utils.imports):
        for name in dir(module):
            forget = getattr(getattr(module, name), "cache_clear", None)
            if forget and any(word in name for word in ("cuda", "available", "device")):
                forget()
