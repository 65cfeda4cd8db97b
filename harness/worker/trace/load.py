"""A whole `from_pretrained` on cards that are not there: what each holds at most while loading, and which tensors those are.

transformers' own loader runs, converters and quantizers included; what it loads is fake, and of the files only the headers are
read, so hollow ones do (`fitmatrix synth --hollow`). The loader copies tensors to the cards by four threads, ahead of the one that
stacks and sets them, unless it quantizes or offloads to the disk. How far ahead they are is theirs: `ahead` loads with all tensors
on the cards before the first is set, the most that they can do; without it each is copied when it is set, the least.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate.hooks
import accelerate.utils.imports
import torch
import transformers.core_model_loading as loading
import transformers.integrations.accelerate
import transformers.utils.import_utils
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    modeling_utils,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from harness.architecture.card_kernels import kernels_of
from harness.core.methods.config import method_name, settings_of
from harness.core.methods.table import METHODS
from harness.core.precisions import PRECISIONS, Config
from harness.core.records import Record
from harness.worker.trace import kernels
from harness.worker.trace.ledger import Allocation, Ledger, Rules, fake_card

CARD_BYTES = 1 << 40  # so large that nothing is refused, unless a test of "auto" says otherwise
_LARGEST = 6
_MOST_SIDES = 4  # of a shape that is stored beside what is packed


class LoadPeak(Record, frozen=True, kw_only=True):
    """What loading holds on one card: at the end, and at most.

    `tensors` are the largest that are there at the peak and not at the end: operator, dtype, shape and the tensor of the model that
    was being made, with its bytes.
    """

    device: str
    held_bytes: int
    peak_bytes: int
    tensors: tuple[tuple[str, int], ...]

    @property
    def over_bytes(self) -> int:
        """What the peak has beyond the weights as they stay."""
        return self.peak_bytes - self.held_bytes


class Cards(Record, frozen=True, kw_only=True):
    """The cards to load on: how many, how large each, and of which compute capability."""

    count: int = 1
    total_bytes: int = CARD_BYTES
    capability: str = "8.0"


class Loader(Record, frozen=True, kw_only=True):
    """How the loader goes about it.

    `ahead`: all tensors are copied before the first is set. `warm`: the block counts as well that transformers asks for first, to
    have the memory of all weights from the driver at once; it is gone before the first tensor comes. `dispatches`: modules get
    accelerate's hooks, so that the model can run.
    """

    ahead: bool = False
    warm: bool = False
    dispatches: bool = False


def trace_load(
    directory: Path, precision: str, device_map: Any, cards: Cards | None = None, ahead: bool = False, warm: bool = False
) -> list[LoadPeak]:
    """Load a checkpoint on fake cards and return what each of them held. `device_map` is that of from_pretrained.

    Raises:
        ValueError: no trace is made of loading in this precision.
    """
    cards = cards or Cards()
    with loaded(directory, precision, device_map, cards, Loader(ahead=ahead, warm=warm)) as (ledger, _):
        peaks = [_peak(ledger, torch.device("cuda", number)) for number in range(cards.count)]
    return [peak for peak in peaks if peak.peak_bytes]


@contextlib.contextmanager
def loaded(directory: Path, precision: str, device_map: Any, cards: Cards, loader: Loader) -> Iterator[tuple[Ledger, Any]]:
    """Load a checkpoint on fake cards, which are there as long as the block runs, and give what they hold and the model.

    Raises:
        ValueError: no trace is made of loading in this precision.
    """
    found: list[Ledger] = []
    with contextlib.ExitStack() as stack:
        counting = contextlib.ExitStack()
        for owner, name, value in (*_torch(cards, found), *_transformers(loader), *_counted(cards, found, counting)):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))  # modes belong to a thread
        stack.enter_context(_asked_anew())
        stack.enter_context(counting)
        model = AutoModelForCausalLM.from_pretrained(
            directory, device_map=device_map, **_arguments(directory, precision, device_map)
        )
        gc.collect()
        yield found[0], model
        del model


def _counted(cards: Cards, found: list[Ledger], counting: contextlib.ExitStack) -> Iterator[tuple[Any, str, Any]]:
    """Yield the two stages of from_pretrained that meet the cards: before them a model is shapes alone."""
    card = kernels_of(cards.capability)
    load, place = PreTrainedModel._load_pretrained_model, transformers.integrations.accelerate._get_device_map

    def loads(*given: Any, **named: Any) -> Any:
        """Load the files, and count from here on."""
        ledger = counting.enter_context(fake_card(_written_in_python(), card.capability))
        counting.enter_context(kernels.chosen_as_on(card, ledger, whole=False))
        counting.enter_context(_named(ledger))
        found.append(ledger)
        return load(*given, **named)

    def places(*given: Any, **named: Any) -> Any:
        """Infer a device map, for which accelerate begins on every card to see what is free."""
        with fake_card({}, card.capability):
            return place(*given, **named)

    yield PreTrainedModel, "_load_pretrained_model", staticmethod(loads)
    yield modeling_utils, "_get_device_map", places


def _arguments(directory: Path, precision: str, device_map: Any) -> dict[str, Any]:
    """Return what a row of the table asks from_pretrained for, of a map with parts off the cards what leaves those as they are."""
    row = PRECISIONS[precision]
    is_divided = isinstance(device_map, Mapping) and not {"cpu", "disk"}.isdisjoint(device_map.values())
    dtype = getattr(torch, row.dtype)
    if row.requires_checkpoint:
        return {"dtype": dtype}
    if row.quantization is None:
        return {"dtype": dtype, **_unpacking(directory)}
    if not isinstance(row.quantization, Mapping):
        return {"dtype": dtype, "quantization_config": _evaluated(row.quantization)}
    if row.scheme is None or precision in _NOT_TRACED:
        why = _NOT_TRACED.get(precision, "what its quantizer allocates is not known")
        raise ValueError(f"no trace of loading in {precision}: {why}")
    off_gpu = row.off_gpu if is_divided and row.off_gpu else {}
    compute = {"bnb_4bit_compute_dtype": dtype} if row.quantization.get("load_in_4bit") else {}
    return {"dtype": dtype, "quantization_config": AutoQuantizationConfig.from_dict({**row.quantization, **compute, **off_gpu})}


# Why what a package quantizes cannot be followed with fake tensors.
_NOT_TRACED = {
    "quanto-int4": "optimum-quanto packs tensors of torch's own class alone (tensor/weights/qbits.py), and a fake is none"
}


def _unpacking(directory: Path) -> dict[str, Any]:
    """Return what asks for 16-bit weights of a checkpoint that is stored packed; nothing for others."""
    settings = settings_of(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    method = METHODS.get(method_name(settings)) if settings else None
    if method is None or method.unpacked is None:
        return {}
    return {"quantization_config": _evaluated(method.unpacked)}


def _evaluated(config: Config) -> Any:
    """Return the object that a row of our own tables writes as code."""
    names = dict[str, Any]()
    exec("\n".join(config.imports), names)
    return eval(config.expression, names)


def _peak(ledger: Ledger, device: torch.device) -> LoadPeak:
    """Follow the events of one card to their peak."""
    live: dict[int, int] = {}
    total, most, alive = 0, 0, list[int]()
    for event in ledger.events:
        number = event if event >= 0 else ~event
        made = ledger.allocations[number]
        if made.device != device:
            continue
        if event >= 0:
            live[number] = made.handed_out
            total += made.handed_out
        else:
            total -= live.pop(number)
        if total > most:
            most, alive = total, list(live)
    kept = {number for number in live if number in alive}
    passing = [ledger.allocations[number] for number in alive if number not in kept]
    largest = sorted(passing, key=lambda made: -made.nbytes)[:_LARGEST]
    return LoadPeak(
        device=str(device),
        held_bytes=ledger.live[device],
        peak_bytes=ledger.peak[device],
        tensors=tuple((_name(made), made.nbytes) for made in largest),
    )


def _name(made: Allocation) -> str:
    operator = made.operator.partition("::")[2].partition(".")[0] or made.operator
    return f"{operator} {made.dtype}{list(made.shape)} of {made.path or 'loading'}"


@contextlib.contextmanager
def _named(ledger: Ledger) -> Iterator[None]:
    """Tell the ledger which tensor of the model is made."""

    def named(own: Callable[..., Any]) -> Callable[..., Any]:
        def convert(step: Any, layer_name: str, *given: Any, **named: Any) -> Any:
            ledger.path = layer_name
            return own(step, layer_name, *given, **named)

        return convert

    with contextlib.ExitStack() as stack:
        for kind in (loading.WeightRenaming, loading.WeightConverter):
            stack.enter_context(mock.patch.object(kind, "convert", named(kind.convert)))
        yield


def _torch(cards: Cards, found: list[Ledger]) -> Iterator[tuple[Any, str, Any]]:
    """Yield what torch has to say of the cards, to those who ask before and while loading."""

    def live(device: Any = None) -> int:
        return found[0].live[torch.device("cuda", _number(device))] if found else 0

    card = kernels_of(cards.capability)
    facts = SimpleNamespace(
        name=card.name,
        total_memory=cards.total_bytes,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=card.processors,
    )
    functions: dict[str, Any] = {
        **dict.fromkeys(("is_available", "_is_compiled", "is_initialized"), lambda: True),
        **dict.fromkeys(("init", "_lazy_init", "empty_cache"), lambda: None),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), live),
        "device_count": lambda: cards.count,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,  # noqa: ARG005 torch's interface
        "get_device_properties": lambda device=None: facts,  # noqa: ARG005
        "get_device_capability": lambda device=None: card.capability,  # noqa: ARG005
        "get_device_name": lambda device=None: card.name,  # noqa: ARG005
        "mem_get_info": lambda device=None: (cards.total_bytes - live(device), cards.total_bytes),
        "set_device": lambda device: None,  # noqa: ARG005
        "device": lambda device: contextlib.nullcontext(),  # noqa: ARG005
    }
    yield from ((torch.cuda, name, value) for name, value in functions.items())
    yield torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")  # noqa: ARG005
    yield torch.accelerator, "is_available", lambda: True
    yield torch._C, "_cuda_getDevice", lambda: 0
    yield fake_tensor, "init_gpu_context", lambda _: None
    yield fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda _: True)


@contextlib.contextmanager
def _asked_anew() -> Iterator[None]:
    """Have the libraries ask whether there is a card, inside and again after it, which they do once and remember."""
    modules = (transformers.utils.import_utils, accelerate.utils.imports)
    known = [getattr(module, name) for module in modules for name in dir(module) if "cuda" in name or "available" in name]
    forget = [found.cache_clear for found in known if hasattr(found, "cache_clear")]
    for each in forget:
        each()
    try:
        yield
    finally:
        for each in forget:
            each()


def _number(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0 if device is not None else 0


def _transformers(loader: Loader) -> Iterator[tuple[Any, str, Any]]:
    """Yield what transformers does differently with fake tensors: files are read outside of the modes, or not at all."""
    yield loading, "_materialize_copy", _materialize_copy
    yield modeling_utils, "load_state_dict", _load_state_dict
    if loader.dispatches:
        yield accelerate.hooks, "set_module_tensor_to_device", _set_on_device
    else:
        yield modeling_utils, "accelerate_dispatch", lambda *_: None  # hooks hold no tensors
    if loader.ahead:
        yield loading, "spawn_materialize", _spawn_ahead
    if not loader.warm:
        yield modeling_utils, "caching_allocator_warmup", lambda *_: None
    try:
        import bitsandbytes
    except ImportError:
        return
    yield bitsandbytes.functional, "name2qmap", dict[str, Any]()  # its own is kept for good, and would hold a fake tensor
    for name in ("Int8Params", "Params4bit"):
        yield bitsandbytes.nn, name, functools.partial(_Quantized, getattr(bitsandbytes.nn, name))


def _written_in_python() -> Rules:
    """Return the operators of packages whose kernels are Python: run step by step, so that what they take on the way is counted."""
    try:
        import optimum.quanto  # noqa: F401 registers its operators
    except ImportError:
        return {}
    own = (torch.ops.quanto.quantize_symmetric.default, torch.ops.quanto.quantize_affine.default)
    return {operator: functools.partial(operator._op_dk, _IN_PYTHON) for operator in own}


_IN_PYTHON = torch._C.DispatchKey.CompositeExplicitAutograd


def _materialize_copy(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
    """Copy a stored tensor, of which its header says enough, but where whole numbers may be the shape of another."""
    if not isinstance(tensor, torch.Tensor):
        named, shape = modeling_utils.str_to_torch_dtype[tensor.get_dtype()], tensor.get_shape()
        if named.is_floating_point or math.prod(shape) > _MOST_SIDES:
            tensor = torch.empty(shape, dtype=named, device="cpu")
        else:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                tensor = tensor[...]
    moved: torch.Tensor = tensor.to(device=device, dtype=dtype)
    return moved


def _spawn_ahead(_: Any, tensor: Any, device: Any = None, dtype: Any = None, **sharding: Any) -> Callable[[], torch.Tensor]:
    """Have a tensor copied before anybody asks for it, as a thread may."""
    assert sharding.get("sharding_op") is None
    copied = _materialize_copy(tensor, device, dtype)
    return lambda: copied


def _set_on_device(module: torch.nn.Module, name: str, device: Any, value: Any = None, **_: Any) -> None:
    """Move a tensor of a module as accelerate's hooks do, which would make a parameter of a fake's class."""
    path, last = name.rpartition(".")[::2]
    owner = module.get_submodule(path)
    before = getattr(owner, last)
    moved = (before if value is None else value).to(device)
    setattr(owner, last, torch.nn.Parameter(moved, requires_grad=False) if last in owner._parameters else moved)


_LOAD_STATE_DICT = modeling_utils.load_state_dict


def _load_state_dict(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
    """Map a .bin file, outside of the modes."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return _LOAD_STATE_DICT(*given, **named)


class _Quantized:
    """Stands for a parameter of bitsandbytes while it quantizes: its classes cannot be made of fake tensors.

    What runs is their own `_quantize`; what it leaves is a plain parameter with the same parts.
    """

    def __init__(self, kind: Any, data: torch.Tensor, **settings: Any) -> None:
        self.kind, self.data = kind, data
        self.__dict__.update(settings)

    def to(self, device: Any) -> torch.nn.Parameter:
        """Quantize on a device."""
        self.kind._quantize(self, device)
        made = torch.nn.Parameter(self.data, requires_grad=False)
        for name in ("CB", "SCB", "quant_state"):
            if name in self.__dict__:
                setattr(made, name, self.__dict__[name])
        return made
