"""Frames: what is shown of a moment, which is what every end prints: the screen, a line, JSON."""

from __future__ import annotations

from harness.core.records import Record
from harness.live.headroom import Headroom

FRAME_SCHEMA = 1
# In the order of a bar. Up to OWN_PARTS it is the process's, after it what others hold, of a disk other files, and what is left.
OWN_PARTS = ("weights", "kv", "activations", "reserve", "context", "overhead", "other")
PARTS = (*OWN_PARTS, "others", "files", "cache", "free")
NEARLY_FULL = 0.95  # of the most that may be held


class TierFrame(Record, frozen=True, kw_only=True):
    """One tier, in bytes: `parts` by the names of PARTS add up to `total_bytes`, those of OWN_PARTS to `process_bytes`.

    `held_bytes` is what counts against a limit: of the RAM the anonymous part; `end_bytes` the most that this can become.
    `predicted_bytes` is the peak of the plan for what is done now, `limit_bytes` the limit of the case; `torch_bytes` are what
    torch has allocated and what it has reserved.
    """

    name: str
    total_bytes: int = 0
    parts: dict[str, int] = {}
    process_bytes: int | None = None
    held_bytes: int | None = None
    end_bytes: int | None = None
    predicted_bytes: int | None = None
    limit_bytes: int | None = None
    anonymous_bytes: int | None = None
    mapped_bytes: int | None = None
    torch_bytes: tuple[int, int] | None = None
    link_bytes_per_s: float | None = None
    is_gone: bool = False
    is_red: bool = False


class LiveFrame(Record, frozen=True, kw_only=True):
    """One moment. `strip` are runs of the device map: a tier, and how many modules in a row are on it."""

    schema: int = FRAME_SCHEMA
    clock: str
    at_s: float
    pid: int | None = None
    program: str = ""
    case: str = ""
    phase: str = ""
    phase_s: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    disk_bytes_per_token: float | None = None
    tiers: list[TierFrame] = []
    strip: list[tuple[str, int]] = []
    room: Headroom | None = None
    words: list[str] = []
