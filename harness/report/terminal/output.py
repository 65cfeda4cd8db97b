"""What commands print for other programs: JSON, and text as it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.core.records import Machine

PLAN_SCHEMA = 1
_TIER_KEYS = ("name", "kind", "total_bytes", "free_bytes", "limit_bytes", "bytes_per_s")


def json_text(value: object) -> str:
    """Write records and plain values as one JSON object, in ASCII: standard output may have any encoding."""
    import json

    import msgspec

    plain = msgspec.to_builtins(value)
    try:  # json itself indents in Python, which takes several times as long
        return msgspec.json.format(json.dumps(plain, allow_nan=False), indent=2)
    except (ValueError, msgspec.DecodeError):  # a number that is not finite, or a file's name that is no Unicode
        return json.dumps(_finite(plain), indent=2)


def print_json(value: object) -> None:
    """Print records and plain values as `json_text` writes them."""
    print(json_text(value))


def _finite(value: Any) -> Any:
    """Put null for numbers that are not finite: JSON has none of these."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
