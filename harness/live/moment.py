"""What a moment shows, from readings alone, as a frame.

The components of a tier add up to what is held there. For a case of ours they come from torch's counters and from its plan, and
what neither explains is "other"; of any other process only the whole is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from harness.core.records import TierEstimate
from harness.live import headroom
from harness.live.frame import NEARLY_FULL, PARTS, LiveFrame, TierFrame
from harness.live.reading import GpuReading, Reading
from harness.live.words import remarks
from harness.measure.beacon import Announced, Beat
from harness.measure.sampler import Memory

_RAM = "cpu"
_LOADING = ("start", "import", "tokenizer", "load")
_RATE_S = 10.0  # rates are of the last seconds: a token may take some


def frame(readings: Sequence[Reading], announced: Announced | None = None) -> LiveFrame:
    """Return what the last of some readings shows; those before it are for rates and growth. `announced` is what the case says."""
    now = readings[-1]
    beat = now.beat
    tiers = [*_gpus(now, announced), _ram(now, announced), *_disk(now, announced)]
    same = [one for one in readings if one.pid == now.pid and now.at_s - one.at_s <= _RATE_S]
    tokens_per_s, disk = _tokens_per_s(same), _disk_bytes_per_s(same)
    ends = {tier.name: (tier.held_bytes, tier.end_bytes) for tier in tiers if tier.end_bytes is not None and not tier.is_gone}
    found = LiveFrame(
        clock=now.clock,
        at_s=now.at_s,
        pid=now.pid,
        program=now.program,
        case=announced.case if announced else "",
        phase=beat.phase if beat else "",
        phase_s=max(now.at_s - beat.begun_s, 0.0) if beat else None,
        tokens=beat.tokens if beat and beat.tokens else None,
        tokens_per_s=tokens_per_s,
        disk_bytes_per_s=disk,
        disk_bytes_per_token=disk / tokens_per_s if disk and tokens_per_s else None,
        tiers=tiers,
        strip=_strip(announced.device_map) if announced else [],
        room=headroom.tokens_left(readings, announced, ends) if announced else None,
    )
    return replace(found, words=remarks(found, now, announced))


def _gpus(now: Reading, announced: Announced | None) -> list[TierFrame]:
    alive = [_gpu(name, card, now, announced) for name, card in now.gpus.items()]
    gone = [TierFrame(name=name, is_gone=True) for name in now.gone]
    return sorted([*alive, *gone], key=lambda tier: (len(tier.name), tier.name))  # gpu:10 after gpu:9


def _gpu(name: str, card: GpuReading, now: Reading, announced: Announced | None) -> TierFrame:
    torch = now.beat.vram.get(name) if now.beat else None
    plan = announced.tiers.get(name) if announced else None
    held = card.process_bytes
    if held is None and torch is not None:  # NVML does not list the process, as in a container
        held = min(torch[1] + (plan.overhead_bytes if plan else 0), card.used_bytes)
    ours = split(held or 0, _on_gpu(name, held, torch, now.beat, announced) if held is not None and announced else [])
    others = max(card.used_bytes - (held or 0), 0)
    free = max(card.total_bytes - (held or 0) - others, 0)
    limit = announced.limits_bytes.get(name) if announced else None
    end = min(size for size in ((held or 0) + free, limit) if size is not None)
    return TierFrame(
        name=name,
        total_bytes=card.total_bytes,
        parts=_in_order({**ours, "others": others, "free": free}),
        process_bytes=held,
        held_bytes=held or 0,
        end_bytes=end,
        predicted_bytes=_predicted(plan, now.beat),
        limit_bytes=limit,
        torch_bytes=torch,
        link_bytes_per_s=card.link_bytes_per_s,
        is_red=_is_red(held or 0, end, plan, now.beat),
    )


def _on_gpu(name: str, held: int, torch: tuple[int, int] | None, beat: Beat | None, announced: Announced) -> list[tuple[str, int]]:
    """Return what a card should hold of a case, most certain first: by torch's own counts, or by the plan where it tells none."""
    plan, weights = announced.tiers.get(name), _weights(name, announced)
    kv = headroom.planned_kv(announced, name, beat.tokens if beat else 0)
    if torch is None:
        context, runs = (plan.overhead_bytes, plan.activation_bytes) if plan else (0, 0)
        return [("context", context), ("weights", weights), ("kv", kv), ("activations", runs if _generates(beat) else 0)]
    allocated, reserved = torch
    weights = min(weights, allocated)
    kv = min(kv, allocated - weights)
    return [
        ("weights", weights),
        ("kv", kv),
        ("activations", allocated - weights - kv),
        ("reserve", max(reserved - allocated, 0)),
        ("context", max(held - reserved, 0)),
    ]


def _ram(now: Reading, announced: Announced | None) -> TierFrame:
    """Return the RAM: what a process has in pages of files is part of what can be had, as the kernel may drop them."""
    ram, memory = now.ram, now.memory
    anonymous = memory.anon_bytes if memory else 0
    mapped = memory.ram_bytes - anonymous if memory else 0
    wanted = _in_ram(memory, now.beat, announced) if memory and announced else []
    ours = split(anonymous + mapped, wanted)
    left = max(ram.total_bytes - anonymous - mapped, 0)
    droppable = max(min(ram.available_bytes, ram.total_bytes) - mapped, 0)
    others = max(left - droppable, 0)
    cache = min(max(ram.cached_bytes - mapped, 0), left - others)
    plan = announced.tiers.get(_RAM) if announced else None
    limit = announced.limits_bytes.get(_RAM) if announced else None
    counted = limit - (announced.uncounted_bytes if announced else 0) if limit is not None else None
    end = min(size for size in (anonymous + ram.available_bytes - ram.floor_bytes, counted) if size is not None)
    return TierFrame(
        name=_RAM,
        total_bytes=ram.total_bytes,
        parts=_in_order({**ours, "others": others, "cache": cache, "free": left - others - cache}),
        process_bytes=memory.ram_bytes if memory else None,
        held_bytes=anonymous if memory else None,
        end_bytes=end if memory else None,
        predicted_bytes=_predicted(plan, now.beat),
        limit_bytes=limit,
        anonymous_bytes=anonymous if memory else None,
        mapped_bytes=mapped if memory else None,
        is_red=memory is not None and _is_red(anonymous, end, plan, now.beat),
    )


def _in_ram(memory: Memory, beat: Beat | None, announced: Announced) -> list[tuple[str, int]]:
    """Return what the RAM should hold of a case: what was there before it loaded, the weights that came, and what grew since."""
    plan, weights = announced.tiers.get(_RAM), _weights(_RAM, announced)
    start = beat.start if beat else None
    overhead = start.ram_bytes if start else plan.overhead_bytes if plan else memory.ram_bytes
    if beat is None or beat.loaded is None or start is None:
        return [("overhead", overhead), ("weights", weights)]
    made = min(max(beat.loaded.anon_bytes - start.anon_bytes, 0), weights)
    mapped = max(memory.ram_bytes - memory.anon_bytes - (start.ram_bytes - start.anon_bytes), 0)
    grown = max(memory.anon_bytes - start.anon_bytes - made, 0)
    kv = min(headroom.planned_kv(announced, _RAM, beat.tokens), grown)
    runs = plan.activation_bytes if plan and _generates(beat) else 0
    weights = made + min(mapped, weights - made)
    return [("overhead", overhead), ("weights", weights), ("kv", kv), ("activations", min(runs, grown - kv))]


def _disk(now: Reading, announced: Announced | None) -> list[TierFrame]:
    if now.disk is None:
        return []
    total, free = now.disk.total_bytes, now.disk.free_bytes
    weights = min(_weights("disk", announced), total - free) if announced else 0
    parts = _in_order({"weights": weights, "files": total - free - weights, "free": free})
    return [TierFrame(name="disk", total_bytes=total, parts=parts)]


def split(whole: int, wanted: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Give each part of `whole` what it wants as long as there is something left; the rest is "other"."""
    found = {}
    left = whole
    for name, size in wanted:
        found[name] = min(max(size, 0), left)
        left -= found[name]
    return {**found, "other": left}


def _in_order(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: parts[name] for name in PARTS if parts.get(name)}


def _weights(tier: str, announced: Announced) -> int:
    """Return the bytes of weights there: what was loaded, before that what is planned."""
    planned = announced.tiers.get(tier)
    return announced.weights_bytes.get(tier, 0) if announced.weights_bytes else planned.weights_bytes if planned else 0


def _generates(beat: Beat | None) -> bool:
    return beat is not None and beat.phase not in _LOADING


def _predicted(plan: TierEstimate | None, beat: Beat | None) -> int | None:
    """Return the peak that is planned for what is done now."""
    if plan is None:
        return None
    return plan.peak_bytes if _generates(beat) else plan.load_peak_bytes


def _is_red(held: int, end: int, plan: TierEstimate | None, beat: Beat | None) -> bool:
    """Say whether a tier is nearly full, or has more than the plan said at worst."""
    worst = plan.needed_high_bytes if plan and _generates(beat) else 0
    return held >= NEARLY_FULL * end or (worst > 0 and held > worst)


def _tokens_per_s(readings: Sequence[Reading]) -> float | None:
    """Return how many tokens were made in a second, of all sequences, by the worker's own clock."""
    beats = [one.beat for one in readings if one.beat is not None]
    if len(beats) < 2 or beats[-1].phase != beats[0].phase:
        beats = [beat for beat in beats if beat.begun_s == beats[-1].begun_s]
    if len(beats) < 2 or beats[-1].at_s <= beats[0].at_s or beats[-1].made <= beats[0].made:
        return None
    return (beats[-1].made - beats[0].made) / (beats[-1].at_s - beats[0].at_s)


def _disk_bytes_per_s(readings: Sequence[Reading]) -> float | None:
    known = [(one.at_s, one.read_bytes) for one in readings if one.read_bytes is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return None
    return max(known[-1][1] - known[0][1], 0) / (known[-1][0] - known[0][0])


def _strip(device_map: Mapping[str, str]) -> list[tuple[str, int]]:
    """Collapse a device map into runs of modules on the same tier."""
    return [(place, len(list(run))) for place, run in itertools.groupby(map(_tier, device_map.values()))]


def _tier(place: str) -> str:
    return f"gpu:{place}" if place.isdecimal() else place.replace("cuda:", "gpu:")
