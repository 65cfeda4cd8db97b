"""CARDS: what a card's compute capability decides about memory. No torch.

Which kernel computes attention goes by it (`harness.worker.trace.kernels`), and when bitsandbytes unpacks a 4-bit weight. Cards of
one family run the same attention kernels but for cuDNN's, so that one record holds for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

from harness.core.precisions import PRECISIONS


class CardKernels(NamedTuple):
    """A kind of card as far as kernels are chosen by it: compute capability and number of multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def takes_cudnn(self) -> bool:
        """Whether torch tries cuDNN's attention before all others: on data center cards since Hopper."""
        return self.capability[0] in (9, 10)


CARDS = (
    CardKernels("V100", (7, 0), 80),
    CardKernels("T4", (7, 5), 40),
    CardKernels("A100", (8, 0), 108),
    CardKernels("RTX 3090", (8, 6), 82),
    CardKernels("RTX 4090", (8, 9), 128),
    CardKernels("H100", (9, 0), 132),
    CardKernels("B200", (10, 0), 148),
    CardKernels("RTX 5090", (12, 0), 170),
)
FLASH_SINCE = (8, 0)
BEFORE_FLASH, WITH_FLASH = "7.0", "8.0"  # the families: without flash attention and with it


def kernels_of(capability: str | None) -> CardKernels:
    """Return the card of the table for a compute capability ("8.6"): the newest that is not newer, else the oldest.

    None, of a card that nothing is known of, stands for `WITH_FLASH`.
    """
    major, _, minor = (capability or WITH_FLASH).partition(".")
    older = [card for card in CARDS if card.capability <= (int(major), int(minor or 0))]
    return older[-1] if older else CARDS[0]


def family(card: CardKernels, precision: str) -> str:
    """Return the compute capability that the records for a card are made for; flash attention has no float32 on any.

    Weights that are stored packed are multiplied by kernels that each kind of card has for itself.
    """
    if PRECISIONS[precision].is_packed_for_cards:
        return f"{card.capability[0]}.{card.capability[1]}"
    return BEFORE_FLASH if card.capability < FLASH_SINCE and precision != "fp32" else WITH_FLASH


def cards_of(capability: str, precision: str) -> tuple[CardKernels, ...]:
    """Return the cards of a family."""
    if PRECISIONS[precision].is_packed_for_cards:
        return (kernels_of(capability),)
    return tuple(card for card in CARDS if (card.capability < FLASH_SINCE) == (capability == BEFORE_FLASH))
