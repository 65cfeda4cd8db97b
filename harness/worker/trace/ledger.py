"""A card that is not there: fake tensors on "cuda" in any build of torch, and a ledger of every storage that lives on it.

The code that runs is the libraries' own. What a build without CUDA lacks is lent (`lend_guard`), what a fake tensor would do
differently from a real one is put right (`_Indexed`, `taken_for_real`), and every allocation and release is written down in order.
Sizes are bytes, those of the ledger rounded as torch's allocator for CUDA rounds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
# How long what these return is, the values of their input say.
_SHAPED_BY_VALUES = (_aten.nonzero.default, _aten.repeat_interleave.Tensor, _aten.unique_consecutive.default)
CARD = torch.device("cuda:0")
GRAIN = 512  # torch's allocator for CUDA hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
# Tensors of so many elements and less are computed for real beside the fake, where they hold whole numbers: lengths, masks, ids.
MOST_SHADOWED = 1 << 22
TOKEN = 7  # any that no model gives a meaning
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
_CUDA, _META, _DEVICE_TYPES = 1, 14, 21  # c10/core/DeviceType.h

# An operator, and Python that allocates as its kernel for CUDA does.
Rules = Mapping[Any, Callable[..., Any]]


class Allocation(NamedTuple):
    """One storage: its bytes as asked for, what made it, for which tensor, in which module and decoder layer.

    `layer` is -1 before the first of a pass and their number after the last. `condition` names what decides whether the kernel
    takes it at all.
    """

    nbytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: str
    path: str
    layer: int
    condition: str | None
    device: torch.device

    @property
    def handed_out(self) -> int:
        """The bytes that torch's allocator hands out for it."""
        return -(-self.nbytes // GRAIN) * GRAIN


class Ledger(TorchDispatchMode):
    """Counts every storage by device, and keeps the order in which they came and went.

    `events` holds the number of an allocation in `allocations` when it is made, and ~number when it is gone. `path` and `layer`
    say which module runs; whoever runs the model keeps them. `guesses` counts values that code asked of a fake tensor and
    nobody knew.
    """

    def __init__(self, rules: Rules | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rules = rules or {}
        self.allocations: list[Allocation] = []
        self.events: list[int] = []
        self.live: dict[torch.device, int] = defaultdict(int)
        self.peak: dict[torch.device, int] = defaultdict(int)
        self.guesses: Counter[str] = Counter()
        self.path, self.layer = "", -1
        self.most_shadowed = MOST_SHADOWED
        self._condition: str | None = None
        self._operator: str | None = None
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._shadows = WeakIdKeyDictionary()

    def reset(self) -> None:
        """Forget the events and the peak; what is alive stays counted."""
        self.allocations, self.events = [], []
        self.peak = defaultdict(int, self.live)

    def number(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the allocation that holds a tensor; None of one made before the events began."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[1] if known and known[1] >= 0 else None

    @contextlib.contextmanager
    def only_if(self, condition: str) -> Iterator[None]:
        """Mark what is allocated inside as taken under a condition."""
        with swapped(self, "_condition", condition):
            yield

    def temporary(self, nbytes: int, operator: str) -> None:
        """Note bytes that a kernel takes from the allocator for itself alone."""
        with swapped(self, "_operator", operator):
            torch.empty(nbytes, dtype=torch.uint8, device=CARD)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        if func in (_aten._local_scalar_dense.default, _aten.is_nonzero.default) and isinstance(args[0], FakeTensor):
            value = self._value(args[0])
            return bool(value) if func is _aten.is_nonzero.default else value
        rule = self.rules.get(func)
        if rule is not None and any(isinstance(given, FakeTensor) and given.device.type == "cuda" for given in args):
            with self:
                return rule(*args, **kwargs)
        if func is _aten.index.Tensor:
            args = (args[0], self._numbered(args[1]))
        found = self._shaped_by_values(func, args, kwargs)
        out = func(*args, **kwargs) if found is None else found
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for leaf in made:
            self._note(leaf, func.name())
        self._shadow(func, args, kwargs, [leaf for leaf in made if isinstance(leaf, FakeTensor)])
        return out

    def _note(self, tensor: torch.Tensor, operator: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, device = storage._cdata, tensor.device
        if key in self._known:
            return
        number, events = len(self.allocations), self.events
        what = Allocation(
            storage.nbytes(),
            self._operator or operator,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            self.path,
            self.layer,
            self._condition,
            device,
        )
        size = what.handed_out

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live[device] -= size
            events.append(~number)  # of the list that it came in: a later one knows nothing of it

        self._known[key] = weakref.ref(storage, gone), number
        self.allocations.append(what)
        events.append(number)
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])

    def _value(self, tensor: FakeTensor) -> Any:
        """Return what a tensor holds where that is known, else a guess: False, or 1."""
        real = self._shadows.get(tensor)
        if real is not None:
            with unset_fake_temporarily():
                return real.item()
        self.guesses[self.path] += 1
        return False if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 1

    def real(self, tensor: Any) -> torch.Tensor | None:
        """Return the real tensor beside a fake one, if its values are known."""
        found: torch.Tensor | None = self._shadows.get(tensor) if isinstance(tensor, FakeTensor) else None
        return found

    def _shaped_by_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the fake of a result whose shape is in the values of a tensor, if these are known."""
        real = self.real(args[0]) if func in _SHAPED_BY_VALUES else None
        if real is None:
            return None
        with unset_fake_temporarily():
            found = func(real, *args[1:], **kwargs)
        return tree_map(lambda part: torch.empty(part.shape, dtype=part.dtype, device=args[0].device), found)

    def _numbered(self, index: Sequence[Any]) -> list[Any]:
        """Return an index with the numbers of what its masks choose, as ATen does (expandTensors), where its values are known."""
        made = list[Any]()
        for part in index:
            if self.real(part) is None or part.dtype is not torch.bool:
                made.append(part)
                continue
            with self:
                made += _aten.nonzero.default(part).unbind(1)
        return made

    def _shadow(self, func: Any, args: Any, kwargs: Any, made: list[FakeTensor]) -> None:
        """Compute small tensors for real beside the fake, where all that they are computed from is known."""
        for leaf in made:
            self._shadows.pop(leaf, None)
        if not made or any(leaf.numel() > self.most_shadowed for leaf in made) or "empty" in func.name():
            return
        if func in (_aten.argmax.default, _aten.topk.default) and self.real(args[0]) is None:
            self._choose(made[-1], args[0].shape[args[2] if len(args) > 2 else -1] if func is _aten.topk.default else None)
            return
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        if any(self.real(fake) is None for fake in fakes):
            return
        real_args, real_kwargs = tree_map(self._as_real, (args, kwargs))
        try:
            with unset_fake_temporarily(), torch.no_grad():
                got = func(*real_args, **real_kwargs)
        except NotImplementedError:  # a card has a kernel for it, the processor has none
            return
        for leaf, real in zip(made, [leaf for leaf in tree_leaves(got) if isinstance(leaf, torch.Tensor)], strict=True):
            self._shadows[leaf] = real

    def _choose(self, chosen: FakeTensor, among: int | None) -> None:
        """Choose for a model: experts among so many, all equally often, or else any token that no model gives a meaning."""
        with unset_fake_temporarily():
            numbers = torch.arange(chosen.numel()).reshape(chosen.shape)
            self._shadows[chosen] = numbers % among if among is not None else torch.full_like(numbers, TOKEN)

    def _as_real(self, given: Any) -> Any:
        if isinstance(given, torch.device):
            return torch.device("cpu")
        return given if not isinstance(given, FakeTensor) else self.real(given)


class _Indexed(TorchFunctionMode):
    """Says "cuda:0" for "cuda": which device is current is the guard's to say, and a borrowed one does not know."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and (real := self._ledger.real(args[0])) is not None:
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                return func(real, *args[1:], **kwargs)
        if func is torch.device and args and type(args[0]) is int:
            return torch.device("cuda", args[0])
        if func is torch.Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            copy = args[1][id(args[0])] = args[0].clone()  # else its mode would be copied with it
            return copy
        if func is torch.Tensor.cuda:
            return args[0].to(CARD)
        if func is torch.Tensor.to:
            args = (args[0], *map(_indexed, args[1:]))
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(kwargs["device"])
        return func(*args, **kwargs)


def _indexed(device: Any) -> Any:
    if type(device) is int:
        return torch.device("cuda", device)
    bare = device == "cuda" or (isinstance(device, torch.device) and device.type == "cuda" and device.index is None)
    return CARD if bare else device


def lend_guard() -> None:
    """Lend CUDA the device guard of Meta, which does nothing, where this build of torch has none of its own.

    Raises:
        RuntimeError: this torch keeps its guards elsewhere.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        slots = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(ctypes.CDLL(str(library)), GUARDS)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"torch {torch.__version__} has no registry of device guards where it was in 2.13: {error}") from None
    if not slots[_CUDA]:
        slots[_CUDA] = slots[_META]


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in the place of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def taken_for_real() -> Iterator[None]:
    """Have transformers take fake tensors for real ones: it drops no mask, and reads no value, while it takes itself for traced."""
    from transformers.utils import import_utils

    own = import_utils.is_tracing
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("transformers", "harness")) and vars(module).get("is_tracing") is own:
                stack.enter_context(swapped(module, "is_tracing", lambda tensor=None: False))  # noqa: ARG005 its interface
        yield


@contextlib.contextmanager
def fake_card(rules: Rules, capability: tuple[int, int]) -> Iterator[Ledger]:
    """Have tensors on "cuda" be fake and counted inside the block, as on a card of this compute capability."""
    lend_guard()
    ledger = Ledger(rules)
    with (
        taken_for_real(),
        swapped(torch.cuda, "get_device_capability", lambda device=None: capability),  # noqa: ARG005 torch's interface
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        ledger,
        _Indexed(ledger),
    ):
        yield ledger
