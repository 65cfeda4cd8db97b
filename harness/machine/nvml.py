"""The door to NVML: the library if it is there, and its handles of the cards that CUDA will see."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any, TypeVar


@contextmanager
def lent() -> Iterator[Any]:
    """Lend the NVML module, initialized; None without the package, the driver's library or a driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def ask(library: Any, call: str, *args: object) -> Any:
    """Return what NVML's `call` says, None if this card or driver does not support it."""
    if library is None:
        return None
    try:
        return getattr(library, call)(*args)
    except library.NVMLError:
        return None


def visible_gpus(library: Any) -> list[Any]:
    """Return NVML's handles of the cards CUDA will see, in its order when CUDA_DEVICE_ORDER is PCI_BUS_ID.

    An entry of CUDA_VISIBLE_DEVICES that names no card ends the list, and a card that is named twice empties it, as torch counts
    (torch/cuda/__init__.py, `_device_count_nvml`). Of several slices CUDA takes the first (MIG guide, "CUDA visible devices").
    """
    count = ask(library, "nvmlDeviceGetCount") or 0
    cards = [ask(library, "nvmlDeviceGetHandleByIndex", index) for index in range(count)]
    wanted = named_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if wanted and str(wanted[0]).startswith("MIG-"):
        first = ask(library, "nvmlDeviceGetHandleByUUID", wanted[0])
        return [] if first is None else [first]
    numbers = list(range(count)) if wanted is None else _numbers(library, wanted, cards)
    return [card for card in (_slice(library, cards[number]) for number in numbers) if card is not None]


def named_devices(text: str | None) -> list[int] | list[str] | None:
    """Read CUDA_VISIBLE_DEVICES as torch does (`_parse_visible_devices`): numbers, or starts of UUIDs; None if it is not set.

    A list that begins with a UUID ends at the first entry of another kind, one of numbers at the first that does not begin with
    one or is negative; what follows the digits is ignored, and an entry that is there twice empties the list.
    """
    if text is None:
        return None
    words = text.split(",")
    prefix = next((kind for kind in ("GPU-", "MIG-") if text.startswith(kind)), None)
    if prefix is not None:
        return _distinct(takewhile(lambda word: word.startswith(prefix), words))
    return _distinct(takewhile(lambda number: number >= 0, map(_leading_number, words)))


T = TypeVar("T")


def _distinct(entries: Iterable[T]) -> list[T]:
    """Return the entries, none of them if one is there twice."""
    found = list(entries)
    return found if len(set(found)) == len(found) else []


def _leading_number(word: str) -> int:
    """Return the number that a word begins with, as strtoul reads it; -1 if it begins with none."""
    found = re.match(r"[+-]?\d+", word.strip())
    return int(found[0]) if found else -1


def _numbers(library: Any, wanted: Sequence[int | str], cards: Sequence[Any]) -> list[int]:
    """Return the numbers of the cards that are wanted, up to the first that is none or could be several."""
    uuids = [str(ask(library, "nvmlDeviceGetUUID", card)) for card in cards] if wanted and isinstance(wanted[0], str) else []
    found = []
    for one in wanted:
        same = [one] if isinstance(one, int) else [number for number, uuid in enumerate(uuids) if uuid.startswith(one)]
        if len(same) != 1 or same[0] >= len(cards):
            break
        found.append(same[0])
    return _distinct(found)


def _slice(library: Any, card: Any) -> Any:
    """Return the card, or the first slice of one that is cut into slices, which is the only one CUDA sees by index (MIG guide).

    Which slices there are has gaps: a container may hold the third alone.
    """
    mode = ask(library, "nvmlDeviceGetMigMode", card)
    if card is None or not mode or mode[0] != 1:
        return card
    count = ask(library, "nvmlDeviceGetMaxMigDeviceCount", card) or 0
    slices = (ask(library, "nvmlDeviceGetMigDeviceHandleByIndex", card, index) for index in range(count))
    return next((one for one in slices if one is not None), None)
