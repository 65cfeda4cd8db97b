"""What torch's allocator takes of a GPU beyond what it has handed out: what it needs, and what it keeps where there is room.

Weights lie in one block that transformers reserves. How much it is beside them hangs on how tensors fall into the holes that others
leave, and so on every length of the prompt: a record of the model tells the middle and the ends of what replays of its allocations
took (`harness.worker.trace.reserve`), the constants those of the models of the catalog.
"""

from __future__ import annotations

from harness.architecture.traced_memory import Gaps, Spread
from harness.planning.calibration import Bytes, Calibration

SEGMENT_BYTES = 20 << 20  # what the allocator asks the driver for at least, of what is larger than 1 MiB


def fragmentation(gaps: Gaps | None, constants: Calibration, held: float, *, expandable: bool) -> tuple[Bytes, Bytes]:
    """Return what is needed and what is kept beyond `held` bytes of KV cache and activations; `gaps` are the model's, if known."""
    if gaps is None:
        kind = "expandable" if expandable else "usual"
        names = (f"gpu_fragmentation_share_{kind}", f"gpu_cached_share_{kind}")
        least, kept = ((one.low, one.best, one.high) for one in map(constants.__getitem__, names))
        gaps = Gaps(least=least, kept=kept)
    return _gap(gaps.least, held), _gap(gaps.kept, held)


def _gap(share: Spread, held: float) -> Bytes:
    """Return a share of what is held, and at least a segment if anything is; at worst one more."""
    low, best, high = (end * held for end in share)
    return Bytes(low=low, best=max(best, SEGMENT_BYTES), high=max(high, SEGMENT_BYTES) + SEGMENT_BYTES) if held else Bytes()
