"""A case must stay within the capacity of its memory tiers."""

import pytest

from harness.core.records import Machine, Result
from harness.core.units import format_size

pytestmark = pytest.mark.stage(4)


def test_memory(result: Result, machine: Machine) -> None:
    for tier in machine.tiers:
        for phase in result.phases:
            used = phase.ram_anon_bytes if tier.name == "cpu" else phase.vram_reserved_bytes.get(tier.name)
            most = tier.limit_bytes or tier.total_bytes
            if used is not None and most is not None:
                assert used <= most, f"{phase.name} used {format_size(used)} of {tier.name}, capacity {format_size(most)}"
