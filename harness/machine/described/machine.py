"""The machine that names and sizes of its parts describe, with what is assumed of the parts that nobody named."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from harness.core.records import Machine, Tier
from harness.machine.described.memory import Disk, Ram, disk_speed, ram_speed
from harness.machine.described.processors import Processor, usual_host
from harness.machine.gpus import profile


def assemble(gpus: Sequence[str], cpu: Processor | None = None, ram: Ram | None = None, disk: Disk | None = None) -> Machine:
    """Describe a machine that is not here: cards by name or size, processor, RAM and disk. What is not given is unknown.

    `Machine.assumed` says what was taken for granted of the parts that were named in part.

    Raises:
        UsageError: no such card, or several that the name could mean.
    """
    machine = profile(gpus, ram=ram.size if ram else None, disk=disk.free if disk else None)
    (ram_rate, of_ram), (disk_rate, of_disk) = ram_speed(ram, cpu), disk_speed(disk)
    rates = {"cpu": ram_rate, "disk": disk_rate}
    host = cpu or next(filter(None, (usual_host(gpu.model) for gpu in machine.gpus)), None)
    of_host = f"the processor {host.name}, which its maker sells this card with" if host and not cpu else ""
    return replace(
        machine,
        tiers=tuple(_with_speed(tier, rates.get(tier.kind)) for tier in machine.tiers),
        cpu=cpu.name if cpu else None,
        cores=cpu.cores if cpu else None,
        avx512_bf16=cpu.design.avx512_bf16 if cpu else None,
        assumed=tuple(filter(None, (of_host, of_ram, of_disk))),
    )


def _with_speed(tier: Tier, bytes_per_s: float | None) -> Tier:
    return replace(tier, bytes_per_s=bytes_per_s) if bytes_per_s else tier
