"""Readings for tests: each takes what the test is about and fills in the rest; and those of a real run, which the kernel ended.

The run: 8 layers of 16 heads of 64 in fp32, 16 sequences, 1 MiB of KV cache a token, in a control group of 560 MiB. It was killed
after the last of the readings, whose beat has token 200.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from harness.core.records import TierEstimate, Workload
from harness.core.units import GIB, MIB
from harness.live.reading import DiskReading, GpuReading, RamReading, Reading
from harness.measure.beacon import Announced, Beat, Outlook
from harness.measure.sampler import Memory

WATCHED = Path(__file__).parents[1] / "data/watched"


def recorded() -> tuple[list[Reading], Announced]:
    """Return the readings of the real run, in their order, and what it announced."""
    readings = [msgspec.json.decode(one, type=Reading) for one in (WATCHED / "readings.jsonl").read_bytes().splitlines()]
    return readings, msgspec.json.decode((WATCHED / "announced.json").read_bytes(), type=Announced)


def reading(at_s: float = 0.0, **changes: Any) -> Reading:
    """A process of 4 GiB anonymous and 1 GiB mapped memory on a machine of 32 GiB, of which 20 can be had."""
    given: dict[str, Any] = {
        "at_s": at_s,
        "clock": "2026-11-29T12:00:00+00:00",
        "ram": RamReading(total_bytes=32 * GIB, available_bytes=20 * GIB, cached_bytes=6 * GIB, floor_bytes=GIB),
        "disk": DiskReading(total_bytes=100 * GIB, free_bytes=40 * GIB),
        "pid": 4242,
        "program": "python",
        "memory": Memory(ram_bytes=5 * GIB, anon_bytes=4 * GIB),
        "read_bytes": 0,
    }
    return Reading(**given | changes)


def beat(tokens: int = 0, at_s: float = 0.0, **changes: Any) -> Beat:
    """A worker that generates; it held 1 GiB before it loaded, 2.5 GiB after."""
    given: dict[str, Any] = {
        "phase": "warm",
        "begun_s": 0.0,
        "at_s": at_s,
        "tokens": tokens,
        "made": tokens,
        "start": Memory(ram_bytes=GIB, anon_bytes=GIB // 2),
        "loaded": Memory(ram_bytes=5 * GIB // 2, anon_bytes=3 * GIB // 2),
    }
    return Beat(**given | changes)


def card(**changes: Any) -> GpuReading:
    """A card of 12 GiB: our process has 8, others 1."""
    given: dict[str, Any] = {"total_bytes": 12 * GIB, "used_bytes": 9 * GIB, "process_bytes": 8 * GIB}
    return GpuReading(**given | changes)


def estimate(**changes: int) -> TierEstimate:
    given: dict[str, Any] = dict.fromkeys(
        ("weights_bytes", "kv_bytes", "activation_bytes", "overhead_bytes", "allocated_bytes", "peak_bytes", "load_peak_bytes"), 0
    )
    given |= {"low_bytes": 0, "high_bytes": 0, "capacity_bytes": None}
    return TierEstimate(**given | changes)


def announced(**changes: Any) -> Announced:
    """A model of 6 GiB on a card and 2 GiB in the RAM; a token takes 1 MiB of the card and half of that in the RAM."""
    card_plan = estimate(
        weights_bytes=6 * GIB,
        activation_bytes=256 * MIB,
        overhead_bytes=512 * MIB,
        peak_bytes=9 * GIB,
        load_peak_bytes=7 * GIB,
        needed_high_bytes=10 * GIB,
    )
    ram_plan = estimate(
        weights_bytes=2 * GIB, activation_bytes=128 * MIB, overhead_bytes=GIB, peak_bytes=6 * GIB, load_peak_bytes=5 * GIB
    )
    given: dict[str, Any] = {
        "case": "chatglm-6b/int8/gpu+cpu",
        "workload": Workload(prompt_tokens=64, new_tokens=256),
        "tiers": {"gpu:0": card_plan, "cpu": ram_plan},
        "outlook": Outlook(
            kv={"gpu:0": [(1, MIB), (2048, 2048 * MIB)], "cpu": [(1, MIB // 2), (2048, 1024 * MIB)]},
            lighter={"gpu:0": "Try --precision int4."},
        ),
        "weights_bytes": {"gpu:0": 6 * GIB, "cpu": 2 * GIB},
        "device_map": {"embed": "0", "layers.0": "0", "layers.1": "0", "layers.2": "cpu", "head": "0"},
    }
    return Announced(**given | changes)


def growing(tokens: Sequence[int], held: Sequence[int]) -> list[Reading]:
    """Readings a second apart, of a process that holds so many anonymous bytes when so many tokens are in its cache."""
    return [
        reading(float(second), memory=Memory(ram_bytes=size + GIB, anon_bytes=size), beat=beat(count, float(second)))
        for second, (count, size) in enumerate(zip(tokens, held, strict=True))
    ]
