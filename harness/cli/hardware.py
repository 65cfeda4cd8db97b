"""`fitmatrix hardware`: memory tiers, bandwidth and links of this machine, or of one described by its parts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.options import add_options
from harness.core.errors import UsageError
from harness.core.text import print_note
from harness.core.units import format_bandwidth, format_gib, significant
from harness.report.terminal import output

if TYPE_CHECKING:
    from harness.core.records import Machine, Tier
    from harness.machine.accelerators import TorchReport
    from harness.machine.probe import Link

HARDWARE_SCHEMA = 1
UNKNOWN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_options(parser, "hardware", "json", "measure")
    other = parser.add_argument_group("describe another machine", "Sizes that are not given are unknown.")
    add_options(other, "hardware", "gpu", "cpu", "ram", "disk")


def run(given: argparse.Namespace) -> int:
    """Show a machine; raises UsageError for an unknown card or size."""
    described = _described(given)
    is_here, machine = described is None, described or _here(given.measure)
    links, versions, torch = _links(machine, is_here), _versions(is_here), _torch(machine, is_here)
    if given.json:
        from harness.core.records import to_builtins

        known = {"gpu_problem": torch.problem if torch else None, "links": links, "versions": versions, "torch": torch}
        output.print_json({"schema": HARDWARE_SCHEMA, **to_builtins(machine), **known})
    else:
        _show(machine, is_here, links, versions, torch)
    return 0


def _described(given: argparse.Namespace) -> Machine | None:
    """Return the machine that --gpu, --cpu, --ram and --disk describe, or None without them."""
    if not (given.gpu or given.cpu or given.ram or given.disk):
        return None
    if given.measure:
        raise UsageError("--measure is for this machine; --gpu, --cpu, --ram and --disk describe another: drop --measure or those")
    from harness.machine.described.machine import assemble

    return assemble(given.gpu or (), given.cpu, given.ram, given.disk)


def _here(measure: bool) -> Machine:
    """Probe this machine; measure what has not been measured yet, or only under load; everything if `measure`."""
    from harness.machine.probe import probe

    machine = probe()
    lacking = [tier for tier in machine.tiers if _can_be_measured(tier) and (tier.bytes_per_s is None or tier.is_under_load)]
    if not measure and not lacking:
        return machine
    once = "" if measure else ", once" if any(tier.bytes_per_s is None for tier in lacking) else " again"
    print_note(f"measuring the read bandwidth of RAM and disk{once} (1 to 3 s) ...", name="")
    return probe(measure=True)


def _can_be_measured(tier: Tier) -> bool:
    """Say whether measuring can give a figure; otherwise every call would wait for it in vain."""
    if tier.kind == "disk":
        return hasattr(os, "posix_fadvise") and os.access(Path.cwd(), os.W_OK)
    return tier.kind == "cpu"


def _links(machine: Machine, is_here: bool) -> tuple[Link, ...]:
    from harness.machine.probe import Link, links

    return links() if is_here else tuple(Link(tier=tier.name, bytes_per_s=tier.link_bytes_per_s) for tier in machine.gpus)


def _versions(is_here: bool) -> dict[str, str]:
    """Return the versions that decide how models load; unknown for a described machine."""
    from harness.machine.probe import versions

    return versions() if is_here else {}


def _torch(machine: Machine, is_here: bool) -> TorchReport | None:
    """Return what torch can do with the cards; it is asked only where there are any. None without torch, or for another machine."""
    from harness.machine import accelerators

    return accelerators.report(machine) if is_here else None


def _estimates(machine: Machine) -> str:
    """Say what the estimates of this machine rest on: what was calibrated here, or the package alone."""
    from harness.planning.calibrating import kept_calibration

    found = kept_calibration.corrected((), machine)
    said = found.note or "by the constants of the package: fitmatrix calibrate corrects them by results"
    return f"{said}: {', '.join(found.fitted)}" if found.fitted else said


def _show(machine: Machine, is_here: bool, links: Iterable[Link], versions: dict[str, str], torch: TorchReport | None) -> None:
    from harness.report.terminal import tables

    estimates = _estimates(machine) if is_here else None

    table = tables.table("tier", "device", "total\nGiB", "free\nGiB", "limit\nGiB", "usable\nGiB", "read at\nGB/s", left=2)
    for tier in machine.tiers:
        limit = "none" if is_here and tier.limit_bytes is None else _gib(tier.limit_bytes)
        speed = UNKNOWN if tier.bytes_per_s is None else significant(tier.bytes_per_s / 1e9)
        speed = f"at least {speed}" if tier.is_under_load else speed
        sizes = (_gib(tier.total_bytes), _gib(tier.free_bytes), limit, _gib(tier.capacity_bytes))
        table.add_row(tier.name, _device(tier, is_here), *sizes, speed)
    tables.show(tables.title(machine.name), table, tables.facts(_facts(machine, links, versions, torch, estimates)))


def _gib(size: int | None) -> str:
    return UNKNOWN if size is None else format_gib(size)


def _device(tier: Tier, is_here: bool) -> str:
    from harness.report.terminal.tables import line

    shared = ", shares the RAM" if tier.shared else ""
    return line((tier.model or ("current directory" if tier.kind == "disk" and is_here else "")) + shared, 34)


def _facts(
    machine: Machine, links: Iterable[Link], versions: dict[str, str], torch: TorchReport | None, estimates: str | None
) -> Iterator[tuple[str, str | list[str]]]:
    ways = [sentence for link in links if (sentence := _way(link))]
    if ways:
        yield "links", ways
    if machine.cpu:
        usable = " usable" if machine.system else ""  # which is unknown of a machine that is only described
        yield "cpu", machine.cpu + (f", {machine.cores} cores{usable}" if machine.cores else "")
    if machine.assumed:
        yield "assumed", list(machine.assumed)
    if machine.system:
        yield "system", machine.system + (f", driver {machine.driver}" if machine.driver else "")
    if torch:
        from harness.machine.accelerators import overruled_order

        sees = f"; sees {len(torch.seen.cards)} of {len(machine.gpus)} GPUs" if torch.seen else ""
        said = (torch.problem, overruled_order(machine))
        yield "torch", [f"{torch.build.version}, {torch.build.title}{sees}", *(sentence for sentence in said if sentence)]
    marked = [tier.name for tier in machine.tiers if tier.is_under_load]
    if marked:
        yield (
            "load",
            f"the speed of {' and '.join(marked)} was measured while other programs worked, and is measured again next time",
        )
    if estimates:
        yield "plans", estimates
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _way(link: Link) -> str | None:
    """Say how a card is linked to the RAM: "gpu:0 to RAM: PCIe 4 x8, 15.8 GB/s"."""
    bus = f"PCIe {link.generation} x{link.lanes}" if link.generation and link.lanes else None
    speed = format_bandwidth(link.bytes_per_s) + " one way" if link.bytes_per_s else None
    words = ", ".join(word for word in (bus, speed) if word)
    return f"{link.tier} to RAM: {words}" if words else None
