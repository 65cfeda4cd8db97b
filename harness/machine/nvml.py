"""The door to NVML: the library if it is there, and its handles of the cards that CUDA will see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def lent() -> Iterator[Any]:
    """Lend the NVML module, initialised; None without the package, the driver's library or a driver."""
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

    CUDA_VISIBLE_DEVICES is a list of indices and of UUIDs, which may be cut short; CUDA ignores it from the first entry that
    names no card (CUDA C++ Programming Guide, "CUDA environment variables").
    """
    count = ask(library, "nvmlDeviceGetCount") or 0
    cards = [_slice(library, ask(library, "nvmlDeviceGetHandleByIndex", index)) for index in range(count)]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [card for card in cards if card is not None]
    chosen: list[Any] = []
    for word in wanted.split(","):
        card = _named(library, word.strip(), cards)
        if card is None:
            break
        chosen.append(card)
    return chosen


def _slice(library: Any, card: Any) -> Any:
    """Return the card, or the first slice of one that is cut into slices, which is the only one CUDA sees by index (MIG guide)."""
    mode = ask(library, "nvmlDeviceGetMigMode", card)
    if card is None or not mode or mode[0] != 1:
        return card
    return ask(library, "nvmlDeviceGetMigDeviceHandleByIndex", card, 0) or card


def _named(library: Any, word: str, cards: list[Any]) -> Any:
    """Return the card that one entry of CUDA_VISIBLE_DEVICES names: an index, or a UUID of a card or of a slice of one."""
    if word.isdecimal():
        return cards[int(word)] if int(word) < len(cards) else None
    if word.startswith("MIG-"):
        return ask(library, "nvmlDeviceGetHandleByUUID", word)
    same = [card for card in cards if word.startswith("GPU-") and str(ask(library, "nvmlDeviceGetUUID", card)).startswith(word)]
    return same[0] if len(same) == 1 else None
