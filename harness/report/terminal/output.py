"""What commands print for other programs: JSON, and text as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.core.records import Machine

PLAN_SCHEMA = 1
_TIER_KEYS = ("name", "kind", "total_bytes", "free_bytes", "limit_bytes", "bytes_per_s")


def print_json(value: object) -> None:
    """Print records and plain values as one JSON object, in ASCII: standard output may have any encoding."""
    import json

    import msgspec

    print(json.dumps(msgspec.to_builtins(value), indent=2))


def print_text(text: str) -> None:
    """Print text for a file or another program: in UTF-8 and with its own line ends, whatever the terminal uses."""
    import sys

    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())


def machine_json(machine: Machine) -> dict[str, Any]:
    """Return a machine as the JSON of `plan` describes it."""
    tiers = [{key: getattr(tier, key) for key in _TIER_KEYS} for tier in machine.tiers]
    known = {"cpu": machine.cpu, "gpu_problem": machine.gpu_problem, "assumed": list(machine.assumed)}
    return {"name": machine.name, "tiers": tiers, **{key: value for key, value in known.items() if value}}
