"""Seconds of products as decoding does them: what a worker times on this processor, before any model is here."""

from __future__ import annotations

from harness.core.records import Record

# A token passes a norm and a Linear in turn, so that threads fall asleep between products as they do in a model. The narrow stack
# shows what starting takes, the wide one what reading takes; each is larger than the caches of most processors.
STACKS = ((512, 64), (1024, 48), (2048, 24))  # width, how many
ROWS = 64
STACKS_S = 25.0  # beyond which what is left is not timed


class ProductTime(Record, frozen=True, kw_only=True):
    """The median seconds of something done to `layers` square weights of `width` inputs.

    `done` is "product", of `rows` rows; "turned", the same by weights that lie inputs by outputs; "pack", what a first product
    takes beyond later ones; "quantize"; or "cast", to the dtype of the precision.
    """

    precision: str
    done: str
    width: int
    layers: int
    rows: int = 1
    held_bytes: int  #: of all weights
    seconds: float
    disturbed: bool = False  #: whether others were at work meanwhile

    @property
    def elements(self) -> int:
        """How many weights there are."""
        return self.width * self.width * self.layers
