"""The device map that transformers would infer, module for module, without torch. `device_map.recommended` has a better one.

`infer` gives what `from_pretrained(device_map="auto" | "balanced" | "balanced_low_0" | "sequential", max_memory=...)` gives in
transformers 5: its walk, its sizes (tied weights once, every buffer, bool as one byte), its margins. Where its result looks odd,
the oddity is kept; the comments name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from harness.architecture.skeleton import Module, Piece, Skeleton, Weight
from harness.core.dtypes import DTYPE_BYTES
from harness.core.errors import UsageError, did_you_mean
from harness.core.methods.config import CountedByName
from harness.core.quantizers import SCHEMES
from harness.core.records import Tier
from harness.core.units import parse_size
from harness.planning import calibration
from harness.planning.cost.memory import is_taken

Device = int | str
Bytes = float  # whole, or halves: a 4-bit weight is counted as half a byte per element

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# The part of the memory that transformers uses: of the only GPU and of the RAM when no `max_memory` is given; of everything
# once more where a quantizer is at work, for what that needs.
MARGIN = 0.9


class Widths(NamedTuple):
    """What tells the bytes of each tensor as transformers counts them for a device map."""

    dtype: str = "bfloat16"
    quantizer: str | None = None  #: a row of SCHEMES
    weights: Mapping[str, Bytes] | None = None  #: bytes by path, if modules are replaced before transformers infers: what is packed
    margin: bool | None = None  #: whether a tenth of everything is kept free for a quantizer; None: where one is at work
    names: CountedByName | None = None  #: which tensors the quantizer takes, if their names decide it


BFLOAT16 = Widths()


def infer(
    skeleton: Skeleton,
    widths: Widths = BFLOAT16,
    *,
    strategy: str = "auto",
    max_memory: Mapping[Device, int | str] | None = None,
    free: Mapping[Device, int] | None = None,
) -> dict[str, Device]:
    """Return the device map that transformers infers.

    `max_memory` is what the user passes: sizes by device number, "mps", "cpu" or "disk"; without "cpu" it spills to the disk. If
    it is None, `free` says what the machine has, and transformers' margins apply.

    Raises:
        UsageError: an unknown strategy, device or size; "balanced_low_0" without GPU 0.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"no device map strategy {strategy!r}: {did_you_mean(strategy, STRATEGIES)}")
    sizes = measure(skeleton, widths)
    budgets = _budgets(skeleton, sizes, strategy, max_memory, free or {})
    if widths.quantizer is not None if widths.margin is None else widths.margin:
        budgets = {device: size * MARGIN for device, size in budgets.items()}
    return merge(_Pour(skeleton, sizes, budgets).run())


def free_bytes(tier: Tier) -> int | None:
    """Return the bytes that accelerate finds free in a tier, None if unknown: it begins on every GPU before it looks.

    So a GPU lacks the CUDA context (accelerate, utils/modeling.py, get_max_memory).
    """
    if tier.capacity_bytes is None or tier.kind != "gpu":
        return tier.capacity_bytes
    return max(0, tier.capacity_bytes - (tier.context_bytes or int(calibration.default()["gpu_context_bytes"].best)))


def measure(skeleton: Skeleton, widths: Widths = BFLOAT16) -> Mapping[str, Bytes]:
    """Count bytes as transformers does for a device map: path of every piece and module around it -> bytes.

    The tensors inside a piece are there for the first of each kind, as they are in `widths.weights`.
    """
    if widths.weights is None:
        return _measure_plain(skeleton, widths)
    return _measure(skeleton, widths)


def _measure(skeleton: Skeleton, widths: Widths) -> dict[str, Bytes]:
    dtype, quantizer, weights, _, names = widths
    plain, scheme = DTYPE_BYTES[dtype], SCHEMES[quantizer] if quantizer is not None else None
    sizes: dict[str, Bytes] = {}
    for weight, _ in skeleton.tally:
        fixed = weight.tensor.dtype
        taken = scheme is not None and is_taken(weight, quantizer)
        width = scheme.counted if scheme is not None and taken else DTYPE_BYTES[fixed] if fixed else plain
        sizes[weight.path] = 0 if weight.tied_to else weights[weight.path] if weights else weight.elements * width
    of_kind = {kind: sum(_owned(module, sizes) for module in kind.inside) for kind in skeleton.kinds}
    sizes |= {piece.path: of_kind[piece.like] for piece in skeleton.pieces}
    if names is not None and scheme is not None:
        sizes |= {piece.path: _by_name(piece, names, plain, scheme.counted) for piece in skeleton.pieces}
    for module in reversed(skeleton.frame):  # children before parents
        sizes[module.path] = _owned(module, sizes) + sum(sizes[child.path] for child in module.children)
    return sizes


def _by_name(piece: Piece, names: CountedByName, plain: int, counted: float) -> Bytes:
    """Return what a piece counts where a quantizer goes by the names of its tensors."""
    total: Bytes = 0
    for inside in piece.like.inside:
        for weight in inside.weights:
            path, block = piece.path + weight.path.removeprefix(piece.like.path), inside.block
            head, table = block.linear is not None and not weight.quantizes, "Embedding" in block.class_name
            is_matrix = len(weight.tensor.shape) == 2
            taken = names.takes(path, quantizes=weight.quantizes, head=head and is_matrix, table=table and is_matrix)
            width = counted if taken else DTYPE_BYTES[weight.tensor.dtype] if weight.tensor.dtype else plain
            total += 0 if weight.tied_to else weight.elements * width
    return total


_measure_plain = lru_cache(maxsize=16)(_measure)  # every placement asks for the same; no weights of their own, so hashable


def _owned(module: Module, sizes: Mapping[str, Bytes]) -> Bytes:
    return sum(sizes[weight.path] for weight in module.weights)


def merge(placed: Mapping[str, Device], path: str = "") -> dict[str, Device]:
    """Write every module whose parts share a device as one entry."""
    if len(placed) > 1 and len(set(placed.values())) == 1:
        return {path: next(iter(placed.values()))}
    groups: dict[str, dict[str, Device]] = {}
    for name, device in placed.items():
        end = name.find(".", len(path) + 1)
        groups.setdefault(name if end < 0 else name[:end], {})[name] = device
    merged: dict[str, Device] = {}
    for name, group in groups.items():
        merged |= group if name in group else merge(group, name)
    return merged


def device_of(device_map: Mapping[str, Device], path: str) -> Device | None:
    """Return the device that a map gives to a module or tensor, by the closest entry at or above it; None if it has none."""
    while path and path not in device_map:
        path = path.rpartition(".")[0]
    return device_map.get(path)


def _budgets(
    skeleton: Skeleton,
    sizes: Mapping[str, Bytes],
    strategy: str,
    max_memory: Mapping[Device, int | str] | None,
    free: Mapping[Device, int],
) -> dict[Device, Bytes]:
    given = free if max_memory is None else max_memory
    budgets = _in_order({device: parse_size(size) if isinstance(size, str) else size for device, size in given.items()})
    if max_memory is None and "cpu" in budgets:
        budgets["cpu"] *= MARGIN
    accelerators = [device for device, size in budgets.items() if device not in ("cpu", "disk") and size > 0]
    if strategy == "sequential" or not accelerators:
        return budgets
    if len(accelerators) == 1 and max_memory is None:
        # The first numbered device, even if it is another that has room.
        number = next((device for device in budgets if isinstance(device, int)), None)
        if number is not None:
            budgets[number] *= MARGIN
    if len(accelerators) == 1:
        return budgets  # nothing to balance
    return _balance(budgets, sizes, _largest_share(skeleton, sizes), len(accelerators), strategy == "balanced_low_0")


def _in_order(budgets: Mapping[Device, int]) -> dict[Device, Bytes]:
    """Sort devices as they are filled: GPUs by number, then mps, cpu, disk."""
    numbers = sorted(device for device in budgets if isinstance(device, int))
    order = [*numbers, *(name for name in ("mps", "cpu", "disk") if name in budgets)]
    unknown = [device for device in budgets if device not in order]
    if unknown:
        raise UsageError(f"max_memory names {unknown[0]!r}: a device is a GPU's number, 'mps', 'cpu' or 'disk'")
    return {device: budgets[device] for device in order}


def _largest_share(skeleton: Skeleton, sizes: Mapping[str, Bytes]) -> Bytes:
    """Return the size of the largest block that is not split, or of the largest set of tensors of one module."""
    around = [_owned(module, sizes) for module in skeleton.frame if module.path]
    beside = {weight.path for module in skeleton.frame for weight in module.weights}
    inside = [_owned(module, sizes) for kind in skeleton.kinds if kind.path not in beside for module in kind.inside if module.path]
    whole = [sizes[module.path] for module in (*skeleton.frame, *skeleton.kinds) if module.whole]
    return max(whole + around + inside, default=0)


def _balance(
    budgets: dict[Device, Bytes], sizes: Mapping[str, Bytes], largest: Bytes, count: int, low_zero: bool
) -> dict[Device, Bytes]:
    """Cap every GPU but the last at an even share and a margin, for a block never fits exactly."""
    share = sizes[""] // (count - 1 if low_zero else count) + int(1.25 * largest)
    numbers = [device for device, size in budgets.items() if isinstance(device, int) and size > 0]
    for number in numbers[:-1]:
        if not (low_zero and number == 0):
            budgets[number] = min(share, budgets[number])
    if low_zero:
        try:
            others = sum(budgets[number] for number in range(1, count))
            budgets[0] = min(max(0, sizes[""] - others), budgets[0])
        except KeyError as missing:
            raise UsageError(f"balanced_low_0 needs GPUs numbered from 0: max_memory lacks {missing}") from None
    return budgets


Item = Module | Weight


class _Pour:
    """The walk: take the next part, put it on the current device, else split it, else go on to the next device."""

    def __init__(self, skeleton: Skeleton, sizes: Mapping[str, Bytes], budgets: Mapping[Device, Bytes]) -> None:
        self.sizes = sizes
        self.budgets = budgets
        sources = dict.fromkeys(skeleton.tied.values())
        self.tied = [sorted([name for name, to in skeleton.tied.items() if to == source] + [source]) for source in sources]
        self.devices: list[Device] = [*budgets] if "disk" in budgets else [*budgets, "disk"]
        self.at = 0
        self.used: dict[Device, Bytes] = dict.fromkeys(self.devices, 0)
        self.placed: dict[str, Device] = {}
        gpus = [device for device in self.devices if device not in ("cpu", "disk")]
        # Devices that keep room for the largest part, to bring it back from where it was offloaded to.
        self.roomy: set[Device] = {"mps"} if "mps" in gpus else {*gpus[:1], "cpu"}
        self.queue: list[Item] = [*_direct(skeleton.root), *skeleton.root.children, *_direct(skeleton.root, buffers=True)]
        self.room, self.largest = self._find_largest(self.queue)
        self.left: Bytes = sum(sizes[item.path] for item in self.queue)  # to be placed yet, and buffers that splitting left out

    def run(self) -> dict[str, Device]:
        """Place everything; return path -> device, not merged."""
        while self.queue and not self._holds_the_rest():
            self._step(self.queue.pop(0))
        for item in self.queue:
            self.placed |= {one.path: self.devices[self.at] for one in (item, *(self._partners(item) if self.tied else ()))}
        return self.placed

    def _holds_the_rest(self) -> bool:
        """Say whether all that is left fits on this device: nothing of it is split then, as the room to keep never grows."""
        return self.left + self.used[self.devices[self.at]] <= self._limit

    @property
    def _limit(self) -> Bytes:
        device = self.devices[self.at]
        return float("inf") if device == "disk" else self.budgets[device] - (self.room if device in self.roomy else 0)

    def _step(self, item: Item) -> None:
        self._forget(item)
        partners = self._partners(item)
        device, limit = self.devices[self.at], self._limit
        alone = self.used[device] + self.sizes[item.path]
        together = alone + sum(self.sizes[partner.path] for partner in partners)
        if together <= limit:
            self._assign([item, *partners], device, together)
        elif alone <= limit and self._split_one(partners):
            self.queue.insert(0, item)
        elif _splits(item):
            self._put_back([*_parts(item), *self.queue])
        else:
            self.at += 1
            self.queue.insert(0, item)

    def _assign(self, items: list[Item], device: Device, used: Bytes) -> None:
        self.left -= used - self.used[device]
        self.used[device] = used
        self.placed |= {item.path: device for item in items}
        if len(items) > 1:
            self.queue = [item for item in self.queue if item.path not in self.placed]

    def _put_back(self, queue: list[Item]) -> None:
        self.queue = queue
        self.room, self.largest = self._find_largest(item for item in queue if isinstance(item, Module))

    def _split_one(self, partners: list[Item]) -> bool:
        """Split the first partner that can be, in its place; say whether there was one."""
        for partner in partners:
            if _splits(partner):
                place = self.queue.index(partner)
                self._put_back([*self.queue[:place], *_parts(partner), *self.queue[place + 1 :]])
                return True
        return False

    def _partners(self, item: Item) -> list[Item]:
        """Find the parts in the queue that hold weights tied to one inside `item`, and must go where it goes."""
        found: dict[str, Item] = {}
        for group in self.tied:
            outside = [name for name in group if not _within(name, item.path)]
            if len(outside) < len(group):
                for name in outside:
                    holder = next((other for other in self.queue if name.startswith(f"{other.path}.")), None)
                    if holder is not None:
                        found[holder.path] = holder
        return list(found.values())

    def _forget(self, item: Item) -> None:
        """Look for the next largest parts once those known are past. One that is put back has been forgotten all the same."""
        self.largest -= set(_ends(item))
        if not self.largest:
            self.room, self.largest = self._find_largest(other for other in self.queue if isinstance(other, Module))

    def _find_largest(self, items: Iterable[Item]) -> tuple[Bytes, set[str]]:
        ends = [path for item in items for path in _ends(item)]
        most = max((self.sizes[path] for path in ends), default=0)
        return most, {path for path in ends if self.sizes[path] == most}


def _within(name: str, path: str) -> bool:
    # Anywhere, not only at the start: transformers' own test.
    return f"{path}." in f"{name}."


def _splits(item: Item) -> bool:
    return isinstance(item, Module) and item.splits


def _parts(item: Item) -> list[Item]:
    """Split a module. Its own buffers are left out, and so are never placed."""
    return [*_direct(item), *item.children] if isinstance(item, Module) else []


def _direct(module: Module, buffers: bool = False) -> list[Weight]:
    return [weight for weight in module.weights if (weight.tensor.kind != "parameter") == buffers]


def _ends(item: Item) -> tuple[str, ...]:
    """Return the paths of the parts that are not split: whole blocks, modules without children, a bare tensor."""
    return item.ends if isinstance(item, Module) else (item.path,)
