"""What a frame says in remarks: how much room there is, what makes tokens slow, and what to try where memory ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from harness.core.units import format_bandwidth, format_size
from harness.live.frame import NEARLY_FULL, LiveFrame, TierFrame
from harness.live.headroom import CONTEXT, Headroom
from harness.live.reading import Reading
from harness.measure.beacon import Announced

# Less than this for each token is what a file system reads by the way.
_LEAST_DISK_BYTES = 1 << 20


def tier_title(tier: str) -> str:
    """Return what people call a tier."""
    return "RAM" if tier == "cpu" else tier


def remarks(found: LiveFrame, now: Reading, announced: Announced | None) -> list[str]:
    """Return what is to be said of a moment, the most urgent first."""
    return [*_red(found, announced), *_gone(found), *_room(found.room), *_slow(found), *_who(found, now)]


def _red(found: LiveFrame, announced: Announced | None) -> Iterator[str]:
    for tier in found.tiers:
        if not tier.is_red or tier.held_bytes is None or tier.end_bytes is None:
            continue
        name, is_full = tier_title(tier.name), tier.held_bytes >= NEARLY_FULL * tier.end_bytes
        full = f"{name} ends: {format_size(tier.held_bytes)} of {format_size(max(tier.end_bytes, 0))}"
        has = full if is_full else f"{name} holds more than planned: {_beyond(tier)}"
        yield f"{has}. {_try(tier, announced)}" if announced else f"{has}."


def _beyond(tier: TierFrame) -> str:
    planned = f", peak planned {format_size(tier.predicted_bytes)}" if tier.predicted_bytes else ""
    return f"{format_size(tier.held_bytes or 0)}{planned}"


def _try(tier: TierFrame, announced: Announced) -> str:
    model = shlex.quote(announced.typed or announced.case.partition("/")[0])
    return announced.outlook.lighter.get(tier.name) or f"fitmatrix plan {model} --best shows ways that take less."


def _gone(found: LiveFrame) -> Iterator[str]:
    yield from (f"{tier.name} is gone: NVML does not answer for it any more." for tier in found.tiers if tier.is_gone)


def _room(room: Headroom | None) -> Iterator[str]:
    if room is not None:
        what = "the model's context" if room.ends == CONTEXT else tier_title(room.ends)
        yield f"room for {room.tokens:,} more tokens, then {what} ends"


def _slow(found: LiveFrame) -> Iterator[str]:
    each = found.disk_bytes_per_token
    if each is not None and found.disk_bytes_per_s is not None and each > _LEAST_DISK_BYTES:
        yield f"reading {format_size(each)} a token from disk, {format_bandwidth(found.disk_bytes_per_s)}"


def _who(found: LiveFrame, now: Reading) -> Iterator[str]:
    if now.pid is None:
        yield "no case runs now: pytest cases/ or fitmatrix chat begins one, --pid N watches any process"
    elif now.memory is None:
        yield f"the memory of process {now.pid} may not be read, or it has just ended"
    elif not found.case and now.is_case:
        yield f"process {now.pid} is a case that has not begun to load"
    elif not found.case:
        yield f"process {now.pid} is no case of fitmatrix: what it holds is known only as a whole"
    if now.others:
        yield f"{now.others} more of your cases {'runs' if now.others == 1 else 'run'} now: --pid N chooses one"
