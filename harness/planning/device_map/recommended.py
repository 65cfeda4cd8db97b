"""The device map that we recommend: GPUs filled in order, with the room that inference takes left free.

transformers' "auto" knows nothing of inference. It counts no KV cache, spreads evenly, and holds back the size of the largest
block or embedding on the first GPU, needed or not. Here every block comes with its KV cache, what spills is the last blocks, and
the first GPU keeps room for what running them there copies at once: one Linear, not one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product

from harness.architecture.skeleton import Skeleton
from harness.core.records import Record
from harness.core.units import format_size
from harness.planning.device_map.infer import BFLOAT16, Bytes, Device, Widths, device_of, infer, measure, merge

_SPILL = ("cpu", "disk")


class RecommendedMap(Record, frozen=True, kw_only=True):
    """A map, the bytes that it puts on each device, and how it compares with "auto"."""

    device_map: dict[str, Device]
    weights_bytes: dict[Device, int]
    kv_bytes: dict[Device, int]
    blocks: int
    blocks_off: int  #: of these, not on a GPU
    bytes_off: int  #: of the weights, not on a GPU
    why: str


class _Part:
    """What goes to one device. `largest` is the most that one of its modules owns: accelerate copies spilled ones one by one.

    Each is itself alone, so that it is looked up by no more than its identity: a thousand times.
    """

    __slots__ = ("block", "kv", "largest", "paths", "weights")

    def __init__(self, paths: tuple[str, ...], weights: Bytes, largest: Bytes, kv: int, block: bool) -> None:
        self.paths, self.weights, self.largest, self.kv, self.block = paths, weights, largest, kv, block


_Placed = dict[_Part, Device]
_Auto = Callable[[Mapping[Device, int]], _Placed]


def recommend_map(
    skeleton: Skeleton,
    budgets: Mapping[Device, int],
    widths: Widths = BFLOAT16,
    *,
    kv_bytes: Sequence[int] = (),
    reserve: Mapping[Device, int] | None = None,
    explain: bool = True,
) -> RecommendedMap:
    """Fill the devices so that what inference needs is left, and say how the map differs from "auto".

    `budgets` are bytes that may be used in all, GPUs in order of preference; what fits nowhere goes to the disk.
    `widths.weights` are the bytes of each tensor by path, in the first piece of each kind (default: as `infer.measure` counts
    them). `kv_bytes` is the KV cache of each layer, which lies where the layer runs; what spills runs on the first GPU. `reserve`
    is what else must stay free: activations, context. Without `explain` the words, which take longer than the map, are left out.
    """
    return Recommender(skeleton, budgets, widths, kv_bytes=kv_bytes).recommend(reserve or {}, explain=explain)


class Recommender:
    """The maps of one model on devices of these budgets, for one reserve after the other; what they share is counted once.

    For the arguments see `recommend_map`.
    """

    def __init__(
        self, skeleton: Skeleton, budgets: Mapping[Device, int], widths: Widths = BFLOAT16, *, kv_bytes: Sequence[int] = ()
    ) -> None:
        self._skeleton, self._budgets = skeleton, budgets
        self._plain = widths._replace(weights=None)  # "auto" counts no bytes but its own
        self._parts = _parts(skeleton, widths.weights or measure(skeleton, self._plain), kv_bytes)
        self._by_room: dict[tuple[int, ...], _Placed] = {}

    def recommend(self, reserve: Mapping[Device, int], *, explain: bool) -> RecommendedMap:
        """Fill the devices but for what must stay free; without `explain` the words are left out."""
        room = self._room(reserve)
        placed = self._placed(room)
        off = _off(placed)
        return RecommendedMap(
            device_map=merge({path: device for part, device in placed.items() for path in part.paths}),
            weights_bytes=_weights_by_device(placed),
            kv_bytes=_kv_by_device(placed),
            blocks=sum(part.block for part in self._parts),
            blocks_off=sum(part.block for part in off),
            bytes_off=_bytes_off(placed),
            why=_compare(placed, self._auto, room, self._budgets) if explain else "",
        )

    def places(self, reserve: Mapping[Device, int]) -> dict[str, Device]:
        """Return the same map piece by piece, or with one entry where one device has all."""
        placed = self._placed(self._room(reserve))
        homes = set(placed.values())
        return {"": homes.pop()} if len(homes) == 1 else {path: device for part, device in placed.items() for path in part.paths}

    def bytes_off(self, reserve: Mapping[Device, int]) -> int:
        """Return how many bytes of the weights are not on a GPU then."""
        return _bytes_off(self._placed(self._room(reserve)))

    def _room(self, reserve: Mapping[Device, int]) -> dict[Device, int]:
        return {device: size - reserve.get(device, 0) for device, size in self._budgets.items() if device != "disk"}

    def _placed(self, room: Mapping[Device, int]) -> _Placed:
        key = tuple(room.values())
        if key not in self._by_room:
            self._by_room[key] = _place_parts(self._parts, room)
        return self._by_room[key]

    def _auto(self, limits: Mapping[Device, int]) -> _Placed:
        return _placed_by(infer(self._skeleton, self._plain, max_memory=limits), self._parts)


def _parts(skeleton: Skeleton, weights: Mapping[str, Bytes], kv_bytes: Sequence[int]) -> list[_Part]:
    """List in order what is placed as one: whole blocks, other modules, bare tensors. Those with tied weights join the first."""
    parts: list[_Part] = []
    layers = iter(kv_bytes)
    owned = {
        kind: [sum(weights.get(weight.path, 0) for weight in module.weights) for module in kind.inside] for kind in skeleton.kinds
    }
    for path, whole, like in skeleton.pieces:
        kv = next(layers, 0) if whole else 0
        parts.append(_Part((path,), sum(owned[like]), max(owned[like]), kv, whole))
    for names in skeleton.tied.items():
        ends = [part for part in parts if any(f"{name}.".startswith(f"{path}.") for name in names for path in part.paths)]
        for other in ends[1:]:
            parts = [_join(ends[0], other) if part is ends[0] else part for part in parts if part is not other]
    return parts


def _join(first: _Part, other: _Part) -> _Part:
    sizes = first.weights + other.weights, max(first.largest, other.largest), first.kv + other.kv
    return _Part(first.paths + other.paths, *sizes, first.block and other.block)


def _place_parts(parts: list[_Part], room: Mapping[Device, int]) -> _Placed:
    """Keep as many bytes as can be on the GPUs (without any: in RAM), leaving out the first ones where that helps."""
    gpus = [device for device in room if device != "cpu"]
    sets = [gpus[first:] for first in range(len(gpus))] + [[]]
    best: _Placed = dict.fromkeys(parts, "disk")
    least = float("inf")
    whole: Bytes = sum(part.weights for part in parts)
    wanted = whole + sum(part.kv for part in parts)
    for some, order in product(sets, _orders(parts)):
        if gpus and not some and least <= whole:
            break  # without the GPUs all would be away
        placed = _spill_first(order, room, some, parts=parts, wanted=wanted, below=least if some else whole + 1)
        if placed and _bytes_away(placed, bool(gpus)) < least:
            best, least = placed, _bytes_away(placed, bool(gpus))
        if least == 0:
            break
    return best


def _bytes_away(placed: _Placed, has_gpu: bool) -> Bytes:
    away = _SPILL if has_gpu else ("disk",)
    return sum(part.weights for part, device in placed.items() if device in away)


def _orders(parts: list[_Part]) -> Iterator[list[_Part]]:
    """List orders to spill in: the blocks from the last, before or after the largest of what else there is."""
    blocks = [part for part in reversed(parts) if part.block]
    others = [part for part in reversed(parts) if not part.block]
    large = sorted(others, key=lambda part: -part.weights)[:2]
    for first in ([], *([part] for part in large), large):
        yield [*first, *blocks, *(part for part in others if part not in first)]


def _spill_first(
    order: list[_Part], room: Mapping[Device, int], gpus: list[Device], *, parts: list[_Part], wanted: Bytes, below: Bytes
) -> _Placed | None:
    """Spill as few as can be in this order; None if these GPUs, or the first of them, would only pass weights through.

    `wanted` are the bytes of all parts and of their KV cache; what is spilled leaves its cache and takes the room of a copy. None
    as well if the weights that are spilled come to `below`.
    """
    near = gpus or ["cpu"]
    most, largest, gone = sum(room.get(device, 0) for device in near), 0, 0.0
    for count in range(len(order) + 1):
        if count:
            last = order[count - 1]
            wanted, largest, gone = wanted - last.weights, max(largest, int(last.largest)), gone + last.weights
        if gone >= below:
            return None
        if wanted + largest > most:
            continue  # no need to pour: that is too much for all of them together
        away = set(order[:count])
        spilled = [part for part in parts if part in away]
        free = {device: room.get(device, 0) for device in near}
        free[near[0]] -= sum(part.kv for part in spilled) + largest
        kept = _fill({part: part.weights + part.kv for part in parts if part not in away}, free)
        lacks_blocks = kept and not any(part.block for part in kept) and any(part.block for part in parts)
        useful = kept and gpus[0] in kept.values() and not lacks_blocks if gpus else True
        if kept is not None and useful:
            placed = kept | _spill(spilled, room["cpu"] if gpus and "cpu" in room else 0)
            return {part: placed[part] for part in parts}
    return None


def _largest(parts: Iterable[_Part]) -> int:
    return int(max((part.largest for part in parts), default=0))


def _fill(parts: Mapping[_Part, Bytes], free: Mapping[Device, Bytes]) -> _Placed | None:
    """Pour parts of these sizes into devices in order, back into earlier ones when the later are full; None if they do not fit."""
    placed: _Placed = {}
    left = dict(free)
    devices = list(free)
    for part, size in parts.items():
        if size > left[devices[0]]:  # go on with the next that has room
            device = next((device for device in devices if size <= left[device]), None)
            if device is None:
                return None
            devices = devices[devices.index(device) :] + devices[: devices.index(device)]
        left[devices[0]] -= size
        placed[part] = devices[0]
    return placed


def _spill(parts: list[_Part], ram: int) -> _Placed:
    """Place in RAM, then on disk; what comes from the disk passes through the RAM."""
    weights = {part: part.weights for part in parts}
    return _fill(weights, {"cpu": ram}) or _fill(weights, {"cpu": ram - _largest(parts), "disk": float("inf")}) or {}


def _weights_by_device(placed: _Placed) -> dict[Device, int]:
    sizes: dict[Device, int] = {}
    for part, device in placed.items():
        sizes[device] = sizes.get(device, 0) + int(part.weights)
    return sizes


def _kv_by_device(placed: _Placed) -> dict[Device, int]:
    """Add up the KV cache where layers run: on their device or, if they spill, on the first."""
    first = next((device for device in placed.values() if device not in _SPILL), "cpu")
    cached: dict[Device, int] = {}
    for part, device in placed.items():
        where = first if device in _SPILL else device
        cached[where] = cached.get(where, 0) + part.kv
    return cached


def _placed_by(device_map: Mapping[str, Device], parts: Iterable[_Part]) -> _Placed:
    """Look up where another map puts the same parts. auto's never names a buffer that lies beside split modules."""
    return {part: device for part in parts if (device := device_of(device_map, part.paths[0])) is not None}


def _bytes_off(placed: _Placed) -> int:
    return int(sum(part.weights for part in _off(placed)))


def _off(placed: _Placed) -> list[_Part]:
    return [part for part, device in placed.items() if device in _SPILL]


def _compare(ours: _Placed, auto: _Auto, room: Mapping[Device, int], budgets: Mapping[Device, int]) -> str:
    here = _off(ours)
    if {*room} <= {"cpu"}:
        return "There is no GPU."
    if len(here) == len(ours):
        return f"No GPU can hold a block beside what inference needs.{_against_whole(auto(budgets), room)}"
    return _against_auto(ours, here, auto, room) + _against_whole(auto(budgets), room)


def _against_auto(ours: _Placed, here: list[_Part], auto: _Auto, room: Mapping[Device, int]) -> str:
    """Compare with auto under limits that leave the same room."""
    cached = _kv_by_device(ours)
    theirs = auto({device: max(0, size - cached.get(device, 0)) for device, size in room.items()})
    there = _off(theirs)
    if not here and not there:
        return "All of it is on the GPU."
    total = sum(part.block for part in ours)
    words = f"Off the GPU: {_format_parts(here, total)}; auto, told to leave the same room for inference,"
    more = sum(part.weights for part in here) - sum(part.weights for part in there)
    if more == 0:
        return f"{words} has as much there."
    short = _shortage(theirs, room) if more > 0 else ""
    return f"{words} has {_format_parts(there, total)} there{short and ', and would leave it ' + short}."


def _format_parts(parts: list[_Part], total: int) -> str:
    """Say how many of the blocks are among these parts, which other part is as large as a block, and the bytes."""
    if not parts:
        return "nothing"
    blocks = [part for part in parts if part.block]
    least = min((part.weights for part in blocks), default=0) / 2
    names = [f"{len(blocks)} of {total} blocks", *(part.paths[0] for part in parts if not part.block and part.weights > least)]
    return f"{', '.join(names)} ({format_size(sum(part.weights for part in parts))})"


def _against_whole(auto: _Placed, room: Mapping[Device, int]) -> str:
    short = _shortage(auto, room)
    return f" Given the whole budget, auto would leave inference {short}." if short else ""


def _shortage(placed: _Placed, room: Mapping[Device, int]) -> str:
    """Say how much too little a map leaves for inference on the worst GPU; nothing if it leaves enough."""
    needs = {device: size - room.get(device, 0) for device, size in _needs(placed).items() if device not in _SPILL}
    device, short = max(needs.items(), key=lambda item: item[1], default=("", 0))
    if short <= 0:
        return ""
    return f"{format_size(short)} short on gpu:{device}" if isinstance(device, int) else f"{format_size(short)} short on {device}"


def _needs(placed: _Placed) -> dict[Device, int]:
    """Add up weights, KV cache and, where spilled parts run, the copy of one."""
    cached = _kv_by_device(placed)
    needs = {device: size + cached.get(device, 0) for device, size in _weights_by_device(placed).items()}
    main = next((device for device in placed.values() if device not in _SPILL), "cpu")
    return needs | {main: needs.get(main, 0) + _largest(_off(placed))}
